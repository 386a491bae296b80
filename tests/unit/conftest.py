"""Fixtures that several unit tests share."""

import sys

import pytest
from encoders import encoders, said

__all__ = ["encoders", "said"]
ABSENT = ("bitsandbytes", "deepspeed", "mlflow", "ray")


@pytest.fixture(autouse=True, scope="module")
def absent_libraries():
    """Importing one of these fails: unit tests pass without them."""
    loaded = [name for name in sys.modules if name.partition(".")[0] in ABSENT]
    with pytest.MonkeyPatch.context() as patch:
        for name in (*ABSENT, *loaded):
            patch.setitem(sys.modules, name, None)
        yield ABSENT
