"""What the user sees: plain lines on stderr, and other libraries' chatter kept down."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def set_up_logging() -> None:
    """Our own messages as they are; warnings of others only when they matter."""
    logger = logging.getLogger("flipkd_dist")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_others()


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Our own messages go to the end of a file meanwhile, with the time, and not to the screen."""
    logger = logging.getLogger("flipkd_dist")
    set_up_logging()
    others, handler = logger.handlers, logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.handlers = [handler]
    try:
        yield
    finally:
        logger.handlers = others
        handler.close()


def quiet_others() -> None:
    """Other libraries say only what matters."""
    for name in ("DeepSpeed", "mlflow", "alembic", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of a kernel that it can do without
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def quiet_ray_worker() -> None:
    """Run by Ray in each of its processes: its watchdog warns every second where no dashboard runs."""
    quiet_others()
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)
