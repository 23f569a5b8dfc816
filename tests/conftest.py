"""Set before torch is loaded: tests share the machine with each other."""

import os

from longspan.trainer.cli import OPENMP_SPIN_COUNT

os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first imported
