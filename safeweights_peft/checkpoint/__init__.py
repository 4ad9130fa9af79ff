"""Checkpoint directories as transformers saves them: index, lazy reads, patched copies."""
