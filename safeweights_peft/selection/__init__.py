"""From requests to selected weights: objectives, scores, exact top-k, safety maps."""
