"""The PEFT method: nothing but PEFT, and everything that needs PEFT's internals."""

# Whole, and before any module here: the package's hook on this import needs them all.
import peft  # noqa: F401
