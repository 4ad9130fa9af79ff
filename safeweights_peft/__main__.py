"""The start of the command line: `safeweights`, or `python -m safeweights_peft`."""

import sys


def main() -> None:
    """Run the command line; end quietly if interrupted while it is imported."""
    try:
        from safeweights_peft.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
