"""Run states of a few kilobytes, and forked children that save them and die."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.snapshot import Source
from longspan.trainer.checkpoint.store import CheckpointStore


def tiny_state(step: int, lane_start: int = 0, lane_stop: int = 4) -> RunState:
    """A state whose every tensor depends on the step (and, for carried state, on the lane)."""
    generator = torch.Generator().manual_seed(step)
    embedding = torch.randn(12, 8, generator=generator)
    weights = {
        "embed.weight": embedding,
        "layer.0.proj": torch.randn(8, 16, generator=generator),
        "layer.0.gate": torch.randn(8, generator=generator).bfloat16(),
        "head.weight": embedding,  # tied
    }
    optimizer = {
        name: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(tensor.shape, generator=generator)}
        for name, tensor in weights.items()
        if name != "head.weight"
    }
    lanes = torch.arange(lane_start, lane_stop, dtype=torch.float32)
    return RunState(
        step=step,
        weights=weights,
        optimizer=optimizer,
        lanes={
            "layer.0.state": lanes[:, None, None] + step * torch.ones(1, 3, 2),
            "layer.0.keys": (lanes[:, None] + step * torch.ones(1, 5)).bfloat16(),
            "layer.1.filled": lanes.long() + step,
        },
        lane_start=lane_start,
        lane_stop=lane_stop,
        data={"next_step": step, "digest": "ab" * 32},
        rng={"words": [step, lane_start, 2**32 - 1]},
        counters={"tokens": 100 * step, "skips": 1},
        config_yaml=f"name: tiny\nseed: {step}\n",
    )


class ToyTraining:
    """Weights and optimizer state that `update` changes in place, as an optimizer does, and nothing else."""

    def __init__(self, state: RunState, device: str = "cpu") -> None:
        # the tied name and bfloat16 are of the files alone: what is trained is stored once and in float32
        self.state = state
        names = [name for name in state.weights if name in state.optimizer]
        self.weights = {name: state.weights[name].float().to(device, copy=True) for name in names}
        self.moments = {name: state.optimizer[name]["exp_avg"].to(device, copy=True) for name in names}
        self.steps = {name: state.optimizer[name]["step"].clone() for name in names}

    def sources(self) -> Iterator[Source]:
        """What a save takes."""
        for name in self.weights:
            yield Source(name, None, self.weights[name], True)
        for name in self.weights:
            yield Source(name, "exp_avg", self.moments[name], True)
            yield Source(name, "step", self.steps[name], True)

    def other_state(self) -> RunState:
        """What a save needs besides."""
        return replace(self.state, weights={}, optimizer={})

    def whole_state(self) -> RunState:
        """What a save now must give back, copied."""
        optimizer = {
            name: {"exp_avg": self.moments[name].cpu().clone(), "step": self.steps[name].clone()}
            for name in self.weights
        }
        weights = {name: tensor.cpu().clone() for name, tensor in self.weights.items()}
        return replace(self.state, weights=weights, optimizer=optimizer)

    def update(self) -> None:
        """One update, in place."""
        for tensors in (self.weights, self.moments, self.steps):
            for tensor in tensors.values():
                tensor += 1


def assert_same_state(left: RunState, right: RunState) -> None:
    """Equal in every bit, dtypes included."""
    assert_same_tensors(left.weights, right.weights)
    assert left.optimizer.keys() == right.optimizer.keys()
    for name in left.optimizer:
        assert_same_tensors(left.optimizer[name], right.optimizer[name])
    assert_same_tensors(left.lanes or {}, right.lanes or {})
    for field in ("step", "lane_start", "lane_stop", "data", "rng", "counters", "config_yaml"):
        assert getattr(left, field) == getattr(right, field), field


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def saved(root: Path, *steps: int, keep_last: int = 3) -> CheckpointStore:
    """A store with these steps saved."""
    store = CheckpointStore(root, keep_last=keep_last)
    for step in steps:
        result = store.save(tiny_state(step))
        assert result.ok, result.error
    return store


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; 0 if it returned, its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


KILLED = -signal.SIGKILL
