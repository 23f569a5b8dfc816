"""The engine with one model over two ranks: every ZeRO stage and precision steps as one rank does, alike on both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from tiny_training import tiny_config
from trainer_toy import fingerprint, run_ranks

from longspan.cluster.mesh import Mesh
from longspan.data_pipeline.batch import Batch
from longspan.modeling import state as states
from longspan.modeling.model import build_model
from longspan.trainer.config import RunConfig
from longspan.trainer.engine import Engine

LAYERS = "[{mixer: sliding_window}, {mixer: block_recurrent, gate: lstm, mode: dual, num_states: 4}]"
SETTINGS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
LANES, LENGTH, STEPS = 4, 16, 4


def config_of(stage: int, precision: str, tp: int, **sizes: int) -> RunConfig:
    """Two micro-batches a step, and a norm that is clipped in every step."""
    changes = {"parallel__zero_stage": stage, "parallel__tp": tp, "training__precision": precision}
    changes |= {"training__micro_batch_lanes": 2, "optimizer__clip_norm": 0.05, "model__layers": LAYERS}
    return tiny_config(Path("none"), **(changes | sizes))


def batch_of(step: int) -> Batch:
    ids = torch.randint(0, 384, (LANES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    labels = ids[:, 1:].clone()
    labels[:, -step - 1 :] = -100
    whole = Batch(
        tokens=ids[:, :-1],
        labels=labels,
        reset=torch.tensor([[step == 0, lane == step] for lane in range(LANES)]),
        doc_ids=torch.zeros(LANES, 2, dtype=torch.int64),
        target_bytes=(labels >= 0).int(),
        lane_ids=torch.arange(LANES),
        num_valid=0,
        num_bytes=0,
    )
    return whole.rows(0, LANES)


def train(mesh: Mesh, stage: int, precision: str, **sizes: int) -> dict[str, Any]:
    """Losses and norms of a few steps, whether both micro-batches saw a stop of the last rank, weights and state."""
    config = config_of(stage, precision, mesh.tp_size, **sizes)
    torch.manual_seed(0)
    engine = Engine(build_model(config.model), config, mesh)
    with engine.evaluating() as model:
        carried = [states.detach(model.init_state(2, mesh.device)) for _ in range(2)]
    results = []
    for step in range(STEPS):
        batch = batch_of(step).to(mesh.device)
        stop = step == 1 and mesh.rank == mesh.world_size - 1
        result, carried = engine.step([batch.rows(0, 2), batch.rows(2, 4)], carried, lr=0.01, stop=stop)
        results.append(result)
    tensors = dict(engine.weights())
    for name, entries in engine.optimizer_state().items():
        tensors |= {f"{name}/{key}": value for key, value in entries.items()}
    packed = engine.whole_heads(states.pack(carried[0]))
    return {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "stops": [r.stop for r in results],
        "tensors": tensors,
        "fingerprint": fingerprint(tensors | {name: tensor.float().cpu() for name, tensor in packed.items()}),
    }


def on_two_ranks(rank: int) -> list[dict[str, Any]]:
    mesh = Mesh.build(config_of(0, "fp32", 2).parallel, device="cpu")
    try:
        found = [train(mesh, *setting) for setting in SETTINGS]
    finally:
        mesh.close()
    # tensors do not outlive their process
    return [result | {"tensors": {name: t.numpy() for name, t in result["tensors"].items()}} for result in found]


@pytest.fixture(scope="module")
def one_rank() -> list[dict[str, Any]]:
    mesh = Mesh.build(config_of(0, "fp32", 1).parallel, device="cpu")
    try:
        return [train(mesh, *setting) for setting in SETTINGS]
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def two_ranks() -> list[list[dict[str, Any]]]:
    return run_ranks(on_two_ranks, 2)


@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=[f"ZeRO {stage} {name}" for stage, name in SETTINGS])
def test_two_ranks_step_as_one_and_alike(
    one_rank: list[dict[str, Any]], two_ranks: list[list[dict[str, Any]]], index: int
) -> None:
    want, (got, other) = one_rank[index], (rank[index] for rank in two_ranks)
    assert got["fingerprint"] == other["fingerprint"]
    assert got["stops"] == other["stops"] == [False, True, False, False]
    near = 1e-5 if SETTINGS[index][1] == "fp32" else 1e-2
    assert got["losses"] == pytest.approx(want["losses"], rel=near)
    assert got["norms"] == pytest.approx(want["norms"], rel=4 * near)
    assert got["tensors"].keys() == want["tensors"].keys()
    for name, tensor in want["tensors"].items():
        found = torch.from_numpy(got["tensors"][name])
        assert found.shape == tensor.shape, name
        if near == 1e-5 and not name.endswith("step"):
            assert (found - tensor).norm() <= 1e-3 * tensor.norm() + 1e-6, name


def on_gpus(rank: int, tp: int) -> list[dict[str, Any]]:
    mesh = Mesh.build(config_of(0, "fp32", tp).parallel, device="cuda")
    try:
        found = [train(mesh, 1, precision, model__head_dim=64, model__num_heads=4) for precision in ("fp32", "bf16")]
    finally:
        mesh.close()
    return [{key: value for key, value in result.items() if key != "tensors"} for result in found]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_step_as_one() -> None:
    """By the kernels, over NCCL."""
    alone, (first, second) = run_ranks(on_gpus, 1, 1)[0], run_ranks(on_gpus, 2, 2)
    for want, got, other, near in zip(alone, first, second, (1e-4, 2e-2), strict=True):
        assert got["fingerprint"] == other["fingerprint"]
        assert got["losses"] == pytest.approx(want["losses"], rel=near)
        assert got["norms"] == pytest.approx(want["norms"], rel=4 * near)
