"""What a model answers, how answers are judged, and what a patch costs."""
