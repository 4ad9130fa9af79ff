"""What needs both an adapter and a checkpoint, from disk to disk: numpy, no transformers."""
