"""What a model answers, how answers are judged, and what that amounts to."""
