"""A run with fake stages."""

from tests.pipeline.toy import finished, finished_once, toy

__all__ = ["finished", "finished_once", "toy"]
