"""Fixtures that several unit tests share."""

from encoders import encoders, said

__all__ = ["encoders", "said"]
