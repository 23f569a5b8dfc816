"""Activation checkpointing under DeepSpeed ZeRO 0 to 3: the same losses and weights to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import tiny_config
from trainer_toy import fingerprint

from longspan.cluster.mesh import Mesh
from longspan.data_pipeline.batch import Batch
from longspan.modeling import state as states
from longspan.modeling.model import build_model
from longspan.trainer.engine import Engine


def batch(step: int) -> Batch:
    """Two lanes of 16 tokens; a document starts in the middle of the second."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 256, (2, 16), generator=generator)
    return Batch(
        tokens=tokens,
        labels=tokens.roll(-1, 1),
        reset=torch.tensor([[step == 0, False], [step == 0, True]]),
        doc_ids=torch.zeros(2, 1, dtype=torch.int64),
        target_bytes=torch.ones(2, 16, dtype=torch.int32),
        lane_ids=torch.arange(2),
        num_valid=32,
        num_bytes=32,
    )


def train(mesh: Mesh, stage: int, policy: str) -> tuple[list[tuple[float, float]], str]:
    """Loss and gradient norm of three steps with dropout and a carried state; the weights' fingerprint."""
    config = tiny_config(
        Path("none"),
        model__dropout=0.1,
        data__lanes=2,
        training__micro_batch_lanes=2,
        training__activation_checkpointing=policy,
        parallel__zero_stage=stage,
    )
    torch.manual_seed(0)
    model = build_model(config.model)
    model.set_activation_checkpointing(config.training.activation_checkpointing)
    engine = Engine(model, config, mesh)
    with engine.evaluating() as whole:
        carried = [states.detach(whole.init_state(2))]
    torch.manual_seed(1)
    found: list[Any] = []
    for step in range(3):
        result, carried = engine.step([batch(step)], carried, lr=0.01)
        found.append((result.loss, result.grad_norm))
    return found, fingerprint(engine.weights())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_policy_trains_alike(mesh: Mesh, stage: int) -> None:
    want = train(mesh, stage, "none")
    assert want[0][0] != want[0][-1]
    for policy in ("mixer", "layer"):
        assert train(mesh, stage, policy) == want, policy
