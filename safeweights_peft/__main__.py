"""The start of the command line: `safeweights`, or `python -m safeweights_peft`."""

import sys

from safeweights_peft.startup import raise_at_interrupts


def main() -> None:
    """Run the command line; say in one line that it was interrupted, imports included."""
    try:
        raise_at_interrupts()
        from safeweights_peft.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
