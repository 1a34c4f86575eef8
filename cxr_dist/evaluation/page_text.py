"""The text of a report: sentences, the model card, tables, and numbers as text. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from tfrecords_builder.common.figure_style import display_name
from tfrecords_builder.splitting.overlap import Kind

_NOTHING = "–"  # noqa: RUF001


def uncertainty_words(uncertainty: Mapping[str, Any]) -> str:
    """How the confidence intervals were computed, and what they cover."""
    unit, units, patients = uncertainty["unit"], uncertainty["units"], uncertainty["patients"]
    if unit == "image":
        of = "images; which images are duplicates or of one patient is unknown"
    elif patients:
        of = f"groups of images (duplicates and images of one patient form a group; {patients:,} known patients)"
    else:
        of = "groups of images (duplicates form a group; which images are of one patient is unknown)"
    return (
        f"Values in brackets are {uncertainty['level']:.0%} confidence intervals from {uncertainty['resamples']:,} "
        f"bootstrap resamples of {units:,} {of}. They cover sampling of similar images, not a change of hospital."
    )


def missing_words(metrics: Mapping[str, Any]) -> str:
    """Which classes have no images, and are left out of the macro averages."""
    missing = [display_name(name) for name in metrics["missing_classes"]]
    if not missing:
        return ""
    averaged = [display_name(name) for name in metrics["averaged_classes"]]
    return f"There are no images of {' and '.join(missing)}. Macro averages are over {', '.join(averaged)}."


def seen_warning(metrics: Mapping[str, Any]) -> str:
    """A warning where the run has seen some of the images, unless the user asked for these; else nothing."""
    seen = metrics["seen"]
    if seen is None or seen["asked_for"] or not seen["share"]:
        return ""
    of_split = {
        "its training images": seen["training"],
        "its validation images, which selected the best epoch": seen["validation"],
    }
    parts = " and ".join(f"{number:,} match {images}" for images, number in of_split.items() if number)
    text = (
        f"The model has seen some of these {count(metrics['n'])}: {parts} ({percent(seen['share'])} in all). "
        f"By kind: {_kind_words(seen['kinds'])}."
    )
    unseen = metrics["metrics_unseen"]
    if unseen is None:
        return f"{text} There are no other images, so the metrics do not estimate performance on new images."
    text += " The metrics on all images are therefore optimistic."
    intervals = unseen["uncertainty"]["intervals"]
    figures_of = [
        f"{words} {decimal(unseen[name])} {interval(intervals[name])}".rstrip()
        for name, words in (("accuracy", "accuracy"), ("f1_macro", "macro F1"))
    ]
    others = f"On the other {count(unseen['n'])}: {', '.join(figures_of)}."
    return f"{text} {others} {missing_words(unseen)}".rstrip()


def seen_words(metrics: Mapping[str, Any]) -> str:
    """How the images were compared with those that the run has seen, where there is nothing to warn of."""
    seen = metrics["seen"]
    if seen is None:
        return "Whether the model was trained on any of these images is unknown: its run has no list of its images."
    if seen["asked_for"]:
        kind = "training images" if seen["training"] else "validation images, which selected its best epoch"
        return f"These are the model's {kind}. The metrics do not estimate performance on new images."
    if seen["not_compared"]:
        none = "" if seen["share"] else "No file here is identical to a training or validation image of the model. "
        reason = seen["not_compared"]
        return f"{none}Near-duplicates and shared patients were not looked for: {reason}."
    if seen["share"]:
        return ""
    patients = ", or an image of the same patient" if metrics["uncertainty"]["patients"] else ""
    return f"No image here is a training or validation image of the model, or a near-duplicate of one{patients}."


def _kind_words(kinds: Mapping[str, int]) -> str:
    nouns = {
        Kind.IDENTICAL: ("identical file", "identical files"),
        Kind.NEAR_DUPLICATE: ("near-duplicate", "near-duplicates"),
        Kind.PATIENT: ("other image of the same patients", "other images of the same patients"),
    }
    return ", ".join(
        f"{kinds[kind]:,} {singular if kinds[kind] == 1 else plural}"
        for kind, (singular, plural) in nouns.items()
        if kinds.get(kind)
    )


def published_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the difference from the published result exceeds noise."""
    if not rows:
        return ""
    names = {"accuracy": "accuracy", "f1_macro": "macro F1"}
    parts = [
        f"{names[row['metric']]} is {abs(row['difference']):.3f} "
        + ("higher" if row["difference"] > 0 else "lower")
        + (", which is within noise" if row["verdict"] == "within noise" else ", which exceeds noise")
        for row in rows
        if row["verdict"] is not None
    ]
    return f"Compared with the published result, {'; '.join(parts)}." if parts else ""


def model_card(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The model card (Mitchell et al. 2019), from the information of the run."""
    training = info.get("training")
    training = training if isinstance(training, Mapping) else {}
    parameters, seconds = training.get("parameters"), training.get("seconds")
    size = f" with {parameters:,} parameters" if isinstance(parameters, int) else ""
    rows = [
        ("Model", f"ResNet50{size}. Input: a grayscale image. Output: one probability per class."),
        ("Data", f"Evaluated on {info.get('images', 'images of unknown origin')}."),
        (
            "Intended use",
            "Research and teaching of the training and evaluation of classifiers. Not for diagnosis, triage or any "
            "other decision about a patient.",
        ),
        (
            "Limits",
            "The model was trained on one collection, in which class and source may coincide. If the collection does "
            "not identify patients, images of one patient may be in different splits. The model also assigns a class "
            "to images that are not chest X-rays.",
        ),
    ]
    if isinstance(seconds, Mapping) and isinstance(seconds.get("total"), (int, float)):
        where = f"{training.get('replicas', 1)} x {training.get('device', 'device')}"
        rows.append(
            ("Training cost", f"{seconds['total'] / 60:,.1f} minutes on {where} in {training.get('precision')}.")
        )
    return rows


def info_tables(info: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """`info` as tables of text, (title, rows of name and value).

    What is not nested comes first, without a title; then one table per group.
    """
    flat = {key: value for key, value in info.items() if not isinstance(value, Mapping)}
    groups = {key: value for key, value in info.items() if isinstance(value, Mapping) and value}
    tables = [("", [(_words(key), _value(value, separators=True)) for key, value in flat.items()])] if flat else []
    tables += [
        (_words(title), [(key, _value(value)) for key, value in _flattened(group)]) for title, group in groups.items()
    ]
    return tables


def count(number: int, kind: str = "", noun: str = "image") -> str:
    """A number with its noun in singular or plural."""
    return " ".join(word for word in (f"{number:,}", kind, noun if number == 1 else f"{noun}s") if word)


def _flattened(group: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in group.items():
        if isinstance(value, Mapping) and value:
            rows += _flattened(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _value(value: Any, separators: bool = False) -> str:
    if value is None or (isinstance(value, (str, Mapping, Sequence)) and not value):
        return _NOTHING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        # A seed or a port in the configuration is a name, not a quantity: no separators there.
        return f"{value:,}" if separators else str(value)
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(item, separators) for item in value)
    return str(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def interval(pair: Sequence[float | None] | None) -> str:
    if pair is None or pair[0] is None or pair[1] is None:
        return ""
    return f"[{pair[0]:.3f}, {pair[1]:.3f}]"


def percent_interval(pair: Sequence[float | None] | None) -> str:
    if pair is None or pair[0] is None or pair[1] is None:
        return ""
    return f"[{100 * pair[0]:.1f}, {100 * pair[1]:.1f}]"


def signed(number: float | None) -> str:
    return _NOTHING if number is None else f"{number:+.3f}".replace("-", "\u2212")


def decimal(number: float | None) -> str:
    return _NOTHING if number is None else f"{number:.3f}"
