"""What the user sees: plain lines on stderr, and other libraries' chatter kept down."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def set_up_logging(file: str | None = None) -> None:
    """Our own messages as they are, on the screen or at the end of a file; warnings of others when they matter."""
    logger = logging.getLogger("flipkd_dist")
    if not logger.handlers:
        logger.addHandler(_handler(file))
        logger.propagate = False
    logger.setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost peers come with stack traces
    quiet_others()


def _handler(file: str | None) -> logging.Handler:
    handler = logging.FileHandler(file, encoding="utf-8") if file else logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s" if file else "%(message)s"))
    return handler


@contextmanager
def logging_to(file: str) -> Iterator[None]:
    """Our own messages go to the end of a file meanwhile, with the time."""
    set_up_logging()
    logger = logging.getLogger("flipkd_dist")
    others, logger.handlers = logger.handlers, [_handler(file)]
    try:
        yield
    finally:
        logger.handlers[0].close()
        logger.handlers = others


def log_file() -> str | None:
    """Where our messages go, if that is a file: for processes that work for this one."""
    handlers = logging.getLogger("flipkd_dist").handlers
    return next((handler.baseFilename for handler in handlers if isinstance(handler, logging.FileHandler)), None)


def quiet_others() -> None:
    """Other libraries say only what matters."""
    for name in ("DeepSpeed", "mlflow", "alembic", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of a kernel that it can do without
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with the password that it may hold
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
