"""`python -m cxr_dist` is `cxr-dist`."""

from cxr_dist.runs.interrupt import exit_on_interrupt


def main() -> None:
    """Entry point of `cxr-dist`."""
    exit_on_interrupt()
    from cxr_dist.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
