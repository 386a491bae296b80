"""What each process of Ray is told when it begins; Ray is stood in for."""

import logging
import logging.config
import os
import sys
from types import SimpleNamespace

from flipkd_dist import ray_process


def test_each_process_knows_its_own_cluster_and_keeps_quiet(monkeypatch):
    """Where two clusters run on a machine, Ray Train's cleaner would look for its controller on the other one."""
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get_runtime_context=lambda: context))
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    monkeypatch.delenv("FLIPKD_DEBUG", raising=False)
    noisy = [logging.getLogger(f"ray.train.v2._internal.{name}") for name in ray_process.NOISY]
    parent = {"level": "DEBUG", "handlers": [], "propagate": False}
    try:
        ray_process.set_up()
        assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"
        logging.config.dictConfig(  # as Ray Train does afterwards
            {"version": 1, "disable_existing_loggers": False, "loggers": {"ray.train": parent}}
        )
        assert not any(logger.isEnabledFor(logging.ERROR) for logger in noisy)
    finally:
        for logger in noisy:
            logger.disabled = False


def test_with_debug_ray_says_everything(monkeypatch):
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get_runtime_context=lambda: context))
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    monkeypatch.setenv("FLIPKD_DEBUG", "1")
    ray_process.set_up()
    assert logging.getLogger(f"ray.train.v2._internal.{ray_process.NOISY[0]}").isEnabledFor(logging.ERROR)
