"""Fixtures of several unit tests."""

from tests.helpers.kernel_toy import gpu, toy

__all__ = ["gpu", "toy"]
