"""Run the command line: `lwm`, or `python -m lwm`."""

from lwm.core import interrupts


def main() -> None:
    """Run the command line of this process; Ctrl-C ends it at any time."""
    try:
        interrupts.install()
        from lwm.cli.main import main as run
    except KeyboardInterrupt:
        interrupts.exit_interrupted()
    run()


if __name__ == "__main__":
    main()
