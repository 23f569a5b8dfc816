"""Short calls on a GPU are timed as a training step runs them: the host has issued all of a call before it begins."""

from __future__ import annotations

import time

import pytest
import torch

from longspan.trainer.bench.clock import time_calls

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
HOST_SECONDS = 0.002


def test_the_time_of_a_short_call_is_the_devices() -> None:
    device = torch.device("cuda")
    x = torch.randn(1024, 1024, device=device)

    def call() -> None:
        torch.mm(x, x)
        time.sleep(HOST_SECONDS)
        torch.mm(x, x)

    ahead = time_calls(call, device, repeat=20, flush=True)
    assert ahead.median_ms < 1e3 * HOST_SECONDS / 4
    assert ahead.host_ms >= 1e3 * HOST_SECONDS
    assert time_calls(call, device, repeat=20).median_ms >= 1e3 * HOST_SECONDS
