"""Tests of the PEFT room."""
