"""Shared set-up: one thread a process, no hub, no telemetry, and the test folder importable."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    DS_ACCELERATOR="cpu",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "unit"))

import pytest
import torch

torch.set_num_threads(1)


# The longest modules that start clusters. Under `make test` one process runs them, one after the other, from the first
# minute on; the other one runs the rest, module by module.
CLUSTERS = {f"test_{name}" for name in ("compare", "doors", "elastic", "pool", "ray_faults", "slurm")}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in CLUSTERS)  # stable: within each half the order stays


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Halves(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            module = Path(nodeid.partition("::")[0]).stem
            return "clusters" if module in CLUSTERS else module

    config.option.loadscopereorder = False  # by size
    return Halves(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where everything was installed, as .ci/run says, a test that misses a program or root has failed."""
    report = yield
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    if os.environ.get("FLIPKD_TEST_ALL") and report.skipped and "install.sh" in reason:
        report.outcome, report.longrepr = "failed", reason
    return report


@pytest.fixture(autouse=True)
def no_group_is_left():
    """A test that trains in this process joins a process group, which forks of a later test would find."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def file_system(folder: Path, size: str):
    """A real file system of this size, in memory, mounted at a new folder."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(options, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    with file_system(tmp_path / "disk", "256k") as folder:
        yield folder


@pytest.fixture
def run_disk(tmp_path):
    """A file system for run folders of tiny models."""
    with file_system(tmp_path / "disk", "16m") as folder:
        yield folder
