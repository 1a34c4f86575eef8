"""`python -m cxr_dist` is `cxr-dist`."""

from cxr_dist import terminal


def main() -> None:
    """Entry point of `cxr-dist`."""
    terminal.exit_on_interrupt()
    from cxr_dist.cli import main as run

    run()


if __name__ == "__main__":
    main()
