"""The whole jobs, from names and settings to results on disk; no job prints anything."""
