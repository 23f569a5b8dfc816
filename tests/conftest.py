"""Set before torch is loaded: tests share the machine with each other."""

import os

from longspan.trainer.cli import OPENMP_SPIN_COUNT

os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import logging

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first imported


@pytest.fixture(autouse=True)
def own_logging() -> None:
    """Undo what a command did to the warnings, in a test or fixture of this process: a test may look for its own."""
    logger = logging.getLogger("longspan")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.WARNING)
