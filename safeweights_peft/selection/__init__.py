"""From gradients to indices: objectives, ESI, exact top-k, controls, safety maps, patterns."""
