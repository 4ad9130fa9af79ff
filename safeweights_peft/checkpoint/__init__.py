"""Checkpoint directories as transformers saves them: lazy reads and patched copies."""
