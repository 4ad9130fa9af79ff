"""Models: load them, say where their parameters live, compute answers' logits."""
