"""Self-contained HTML pages: what all of them share. Pure."""

import jinja2


def template_environment(package: str) -> jinja2.Environment:
    """Templates of `package`, with autoescaping, that may include this package's `page.css`."""
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader("tfrecords_builder")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
