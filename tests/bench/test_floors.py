"""Counted operations and bytes against the model's own count and against arithmetic done by hand."""

from __future__ import annotations

import pytest

from longspan.modeling.config import BlockRecurrentConfig, ModelConfig, SlidingWindowConfig
from longspan.modeling.flops import train_flops_per_token
from longspan.trainer.bench.ceilings import Ceilings
from longspan.trainer.bench.clock import Timing, time_calls, time_in_turns
from longspan.trainer.bench.floors import Cost, chain_costs, floor_ms, loss_costs, step_costs, window_costs
from longspan.trainer.bench.profile import kernel_table

PAPER = ModelConfig(
    vocab_size=32128,
    layers=(SlidingWindowConfig(repeat=9), BlockRecurrentConfig(), SlidingWindowConfig(repeat=2)),
)


@pytest.mark.parametrize("segment", [512, 4096])
def test_a_steps_operations_are_those_that_the_model_counts(segment: int) -> None:
    counted = sum(cost.flops for cost in step_costs(PAPER, 3, segment, 2))
    assert counted == pytest.approx(train_flops_per_token(PAPER, segment) * 3 * segment, rel=1e-12)


def test_the_chain_of_the_papers_layer_is_what_the_reference_counts() -> None:
    """9.66 GFLOP a block and sequence: projection 4.295, reads 1.074 + 2.147, output 2.147."""
    layer = PAPER.layers[1]
    assert isinstance(layer, BlockRecurrentConfig)
    assert sum(cost.flops for cost in chain_costs(PAPER, layer, 1, 2)) == pytest.approx(9.66e9, rel=1e-3)


def test_window_and_loss_by_hand() -> None:
    forward, backward = window_costs(2, 100, 10, 64, 2, backward=True)
    assert (forward.flops, forward.num_bytes) == (2 * 2 * 2 * 100 * 10 * 64, 4 * 2 * 100 * 64 * 2)
    assert (backward.flops, backward.num_bytes) == (2.5 * forward.flops, 2 * forward.num_bytes)
    (loss,) = loss_costs(100, 8, 50, 2)
    assert (loss.flops, loss.num_bytes) == (6 * 100 * 8 * 50, 3 * 2 * (8 * 50 + 100 * 8))


def test_each_part_takes_the_longer_of_its_two_times() -> None:
    ceilings = Ceilings(matrix_side=1, matrix_flops=1e12, copy_bytes=1e9)
    assert floor_ms([Cost(2e9, 0), Cost(1e9, 5e6)], ceilings) == pytest.approx(2 + 5)


def test_the_profile_sorts_sums_and_cuts() -> None:
    rows = [(f"kernel_{index}", 1, 10.0) for index in range(30)] + [("sm90_gemm", 2, 700.0), ("idle", 4, 0.0)]
    lines = kernel_table("ours", rows, 1.5).splitlines()
    assert lines[0] == "== ours: 1.500 ms a call; 1.000 ms in 32 launches of 31 kernels"
    assert lines[1].split() == ["matrix", "products", "0.700", "ms", "70.0%"]
    assert lines[4].split() == ["0.700", "70.0%", "2", "350.0", "sm90_gemm"]
    assert lines[-1].split() == ["0.060", "6.0%", "6", "more", "kernels"]


def test_timing_counts_its_calls() -> None:
    import torch

    calls: list[int] = []
    timing = time_calls(lambda: calls.append(1), torch.device("cpu"), repeat=7, first_seconds=1.0)
    assert len(calls) == 7 + 2  # two to warm up
    assert timing.repeats == 7 and timing.first_call_seconds == 1.0
    assert timing.low_ms <= timing.median_ms <= timing.high_ms


def test_turns_alternate_and_give_each_call_its_own_times() -> None:
    import time

    import torch

    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    calls = [lambda: call("quick", 0.001), lambda: call("slow", 0.010)]
    quick, slow = time_in_turns(calls, torch.device("cpu"), repeat=6, first_seconds=[1.0, 2.0])
    assert isinstance(quick, Timing) and isinstance(slow, Timing)
    assert order == ["quick"] * 2 + ["slow"] * 2 + ["quick"] * 4 + ["slow"] * 8 + ["quick"] * 4
    assert quick.repeats == slow.repeats == 6
    assert (quick.first_call_seconds, slow.first_call_seconds) == (1.0, 2.0)
    assert quick.high_ms < slow.low_ms
