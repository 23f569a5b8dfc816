"""Set before torch is loaded: tests share the machine with each other."""

import os

from longspan.trainer.cli import OPENMP_SPIN_COUNT

os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import logging
import multiprocessing
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first imported

# Of the one server of a worker, whichever file starts it: with the trainer loaded a rank costs a second and not ten
multiprocessing.set_forkserver_preload(["longspan.trainer.loop", "longspan.trainer.commands.train"])

# Files that take longest on one core, longest first: two workers take a file at a time, in this order, and none is left
# with a long one while the other has nothing more to do.
SLOW_FILES = (
    "kernels/test_state_scan.py",
    "kernels/test_window_attention_fused.py",
    "parallel/test_context_parallel.py",
    "export/test_export_parity.py",
    "cluster/test_watchdog.py",
    "faults/test_random_kills.py",
    "faults_evals/test_evals_killed.py",
    "faults/test_trainer_faults.py",
    "parallel/test_parallel_training.py",
    "trainer/test_engine.py",
    "evaluation/test_evals_ray.py",
    "parallel/test_tensor_parallel.py",
    "parallel/test_tensor_parallel_engine.py",
    "bench/test_bench_context_parallel.py",
    "modeling/test_laws.py",
    "bench/test_benchmarks.py",
    "plan/test_plan_saved.py",
    "export/test_export_lm_eval.py",
    "parallel/test_bad_ranks.py",
    "tracking/test_evaluations.py",
    "data_pipeline/test_plan_reference.py",
    "data_pipeline/test_synthetic_tasks.py",
    "faults_data/test_data_kills.py",
    "kernels/test_state_chain_forward.py",
    "parallel/test_offload.py",
    "ux/test_bad_input.py",
    "parallel/test_tensor_parallel_training.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first; the others, and the tests of a file, stay in their order."""
    folder = Path(__file__).parent
    places = {folder / name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def own_logging() -> None:
    """Undo what a command did to the warnings, in a test or fixture of this process: a test may look for its own."""
    logger = logging.getLogger("longspan")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.WARNING)
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("longspan.")]:
        logging.getLogger(name).setLevel(logging.NOTSET)  # a file's tests run after those of any other on a worker
