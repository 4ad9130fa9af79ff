"""Tests of the whole jobs."""
