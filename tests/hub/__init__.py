"""Tests of what is shared on the Hub, against one on loopback."""
