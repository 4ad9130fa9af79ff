"""What Ctrl-C does while the command line is imported: it ends the process, without a traceback."""

import signal
import sys
from os.path import basename

# How argv[0] names the command while this package is imported: its script, or `python -m`.
_COMMANDS = ("safeweights", "safeweights.exe", "safeweights-script.py", "-m")


def end_at_interrupts() -> None:
    """Let an interrupt end the process, as it ends one in C, if it is the command line."""
    # Nothing is begun that would need an end. Where a shell has it ignored, it stays so.
    is_command = basename(getattr(sys, "argv", [""])[0]) in _COMMANDS
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_at_interrupts() -> None:
    """Let an interrupt raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
