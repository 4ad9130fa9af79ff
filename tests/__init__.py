"""Tests of safeweights_peft; the tree mirrors the package."""
