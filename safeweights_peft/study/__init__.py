"""Saved results -> tables, pictures and pages. Reads plain JSON; computes nothing."""
