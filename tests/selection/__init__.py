"""Tests of the way from gradients to indices."""
