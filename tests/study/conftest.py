"""The run that the tests of the jobs share."""

from tests.jobs.conftest import requests, run

__all__ = ["requests", "run"]
