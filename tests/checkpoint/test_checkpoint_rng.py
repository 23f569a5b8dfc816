"""Random generators go on exactly where they were."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from longspan.errors import CheckpointError
from longspan.trainer.checkpoint import rng


def draw() -> list[object]:
    """One odd number of normal variates each, so that the cached second one of a pair counts."""
    return [
        random.gauss(0, 1),
        random.random(),
        float(np.random.standard_normal()),
        int(np.random.randint(1 << 30)),
        torch.randn(3).tolist(),
        torch.nn.functional.dropout(torch.ones(64), 0.5).tolist(),
    ]


def test_round_trip_through_json() -> None:
    draw()
    state = json.loads(json.dumps(rng.capture(), allow_nan=False))
    expected = [draw() for _ in range(3)]
    draw()
    rng.restore(state)
    assert [draw() for _ in range(3)] == expected


def test_without_restore_the_draws_differ() -> None:
    assert draw() != draw()


@pytest.mark.parametrize("part", ["python", "numpy", "torch", "cuda"])
def test_a_state_without_a_part_is_refused(part: str) -> None:
    state = rng.capture()
    del state[part]
    with pytest.raises(CheckpointError, match=r"rng\.json"):
        rng.restore(state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_round_trip() -> None:
    torch.cuda.init()
    state = json.loads(json.dumps(rng.capture()))
    expected = torch.randn(8, device="cuda").tolist()
    rng.restore(state)
    assert torch.randn(8, device="cuda").tolist() == expected
