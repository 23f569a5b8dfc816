"""Optimizer state in the host's memory: the same steps, and checkpoints that fit runs with and without it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from tiny_training import tiny_config
from trainer_toy import ToyRun
from worlds import in_world

from longspan.cluster.config import ParallelConfig
from longspan.cluster.mesh import Mesh
from longspan.errors import ConfigError

SETTINGS = [(1, "fp32", 2), (2, "bf16", 1), (3, "fp32", 1)]  # stage, precision, micro-batches


def both_ways(rank: int, device: str, stage: int, precision: str, micro: int) -> dict[bool, dict[str, Any]]:
    """Steps with and without, one of them skipped; then what the other kind makes of the state."""
    mesh = Mesh.build(ParallelConfig(), device=device)
    settings = {"parallel__zero_stage": stage, "training__precision": precision}
    found = {}
    for offload in (False, True):
        run = ToyRun(mesh, micro, parallel__offload_optimizer=offload, **settings)
        first = run.losses(range(4))
        before = run.fingerprint()
        run.model.poison = "gradient" if rank == 1 else None
        skipped = run.step(4).skipped
        run.model.poison = None
        untouched = run.fingerprint() == before
        other = ToyRun(mesh, micro, parallel__offload_optimizer=not offload, **settings)
        other.engine.load(run.engine.weights(), run.engine.optimizer_state())
        other.carried = run.carried
        same_state = other.fingerprint() == before
        rest, elsewhere = run.losses(range(5, 8)), other.losses(range(5, 8))
        devices = {tensor.device.type for tensor in run.engine._logical.optimized_tensors()}
        devices |= {value.device.type for state in run.engine.optimizer.state.values() for value in state.values()}
        kept = {"first": first, "rest": rest, "elsewhere": elsewhere, "devices": devices}
        found[offload] = kept | {"skipped": skipped, "untouched": untouched, "same_state": same_state}
    mesh.close()
    return found


def check(found: list[dict[bool, dict[str, Any]]], near: float) -> None:
    for rank in found:
        with_it, without = rank[True], rank[False]
        pairs = [(with_it[part], without[part]) for part in ("first", "rest")]
        for kind in rank.values():
            assert kind["skipped"] and kind["untouched"] and kind["same_state"]
            pairs.append((kind["elsewhere"], kind["rest"]))
        for got, want in pairs:
            np.testing.assert_allclose(got, want, rtol=near, atol=near)


@pytest.mark.parametrize("setting", SETTINGS, ids=[f"ZeRO {stage} {name}" for stage, name, _ in SETTINGS])
def test_steps_and_state_are_those_without(worlds: dict[Any, Any], setting: tuple[int, str, int]) -> None:
    check(worlds[setting], 1e-6)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    jobs = [(both_ways, ("cpu", *setting)) for setting in SETTINGS]
    return dict(zip(SETTINGS, in_world(2, tmp_path_factory.mktemp("meet"), jobs), strict=True))


def test_without_sharding_it_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"offload_optimizer = true: parallel.zero_stage = 0 keeps.*zero_stage: 1"):
        tiny_config(Path("none"), parallel__offload_optimizer=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus_the_state_lies_in_the_hosts_memory(tmp_path: Path) -> None:
    for setting in SETTINGS:
        [found] = in_world(2, tmp_path / str(setting[0]), [(both_ways, ("cuda", *setting))])
        check(found, 1e-4)
        assert all(rank[True]["devices"] == {"cpu"} and "cuda" in rank[False]["devices"] for rank in found)
