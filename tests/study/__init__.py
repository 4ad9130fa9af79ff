"""Tests of tables, pictures and pages."""
