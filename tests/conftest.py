"""Set before torch is loaded: tests share the machine with each other."""

import os

from longspan.trainer.cli import OPENMP_SPIN_COUNT

os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import logging
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first imported


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command that ran in this process has sent the warnings to standard error; the next test looks for its own."""
    logger = logging.getLogger("longspan")
    handlers, propagate = logger.handlers, logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagate
