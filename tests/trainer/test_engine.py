"""The engine against plain PyTorch: loss rule, clipping, skipped steps, logical state; the trainer on two ranks.

All tests of two ranks are here: a worker that takes this file launches them once.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import read_log, tiny_config
from torch import nn
from trainer_toy import EOS, ToyModel, ToyRun, toy_batch, toy_config

from longspan.cluster.mesh import Mesh
from longspan.errors import UsageError
from longspan.trainer.loop import train
from longspan.trainer.optimizers import build_optimizer

STAGES = (0, 1, 2, 3)


def plain_losses(steps: range, clip_norm: float = 1.0) -> list[tuple[float, float, float, float]]:
    """The same training without the engine: one process, the whole global batch, mean over valid tokens."""
    torch.manual_seed(0)
    model = ToyModel()
    config = toy_config()
    optimizer = build_optimizer(model, config.optimizer)
    state = {"h": model.init_state(4)["h"].detach()}
    found = []
    for step in steps:
        batch = toy_batch(step)
        nll, state, aux = model(batch.tokens, state, reset=batch.reset, labels=batch.labels)
        state = {"h": state["h"].detach()}
        ((nll.sum() + aux["size"]) / batch.num_valid).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()
        bits = (nll * (batch.labels != EOS)).sum() / batch.num_bytes / math.log(2)
        found.append((nll.sum() / batch.num_valid, bits, aux["size"] / batch.num_valid, norm))
    return [tuple(float(torch.as_tensor(value).detach()) for value in row) for row in found]


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float, float, float]]:
    return plain_losses(range(5))


def test_clipping_matters_here(reference: list[tuple[float, ...]]) -> None:
    assert any(row[3] > 1.0 for row in reference)
    assert not np.allclose(reference, plain_losses(range(5), clip_norm=0.0), atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_micro", [1, 2])
def test_one_rank_equals_plain_pytorch(mesh: Mesh, reference: list[Any], stage: int, num_micro: int) -> None:
    run = ToyRun(mesh, num_micro, parallel__zero_stage=stage)
    np.testing.assert_allclose(run.losses(range(5)), reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_micro", [1, 2])
def test_two_ranks_with_different_data_equal_plain_pytorch(
    two_ranks: dict[str, Any], reference: list[Any], stage: int, num_micro: int
) -> None:
    for rank in two_ranks["ranks"]:
        np.testing.assert_allclose(rank["losses"][stage, num_micro], reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", [("resumed", 0), ("resumed", 1), ("resumed", 2), ("resumed", 3), "bf16", "adafactor"])
def test_state_by_name_gives_the_next_losses_to_the_last_bit(two_ranks: dict[str, Any], which: Any) -> None:
    for rank in two_ranks["ranks"]:
        found = rank["resumed"][which[1]] if isinstance(which, tuple) else rank[f"resumed_{which}"]
        assert found["exact"]
        assert found["names"], "some parameter has no optimizer state"
        assert found["fresh"] == found["straight"]


def test_state_of_two_ranks_at_stage_3_goes_on_with_one_rank_at_stage_0(mesh: Mesh, two_ranks: dict[str, Any]) -> None:
    saved = two_ranks["ranks"][0]["logical"]
    run = ToyRun(mesh)
    run.engine.load(
        {name: torch.from_numpy(value) for name, value in saved["weights"].items()},
        {name: {k: torch.from_numpy(v) for k, v in entry.items()} for name, entry in saved["state"].items()},
    )
    carried = np.concatenate([rank["logical"]["carried"] for rank in two_ranks["ranks"]])
    run.carried = [{"h": torch.from_numpy(carried)}]
    np.testing.assert_allclose(run.losses(range(3, 6)), saved["next"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_on_one_rank_skips_the_step_on_all(two_ranks: dict[str, Any], stage: int, kind: str) -> None:
    ranks = [rank["skips"][stage, kind] for rank in two_ranks["ranks"]]
    for found in ranks:
        assert found["skipped"]
        assert found["untouched"], "weights or optimizer state moved"
        assert found["rolled_back"], "carried state moved"
        assert np.isfinite(found["after"]).all()
    assert ranks[0]["after"] == ranks[1]["after"]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert two_ranks["ranks"][0]["skips"][0, "loss"]["after"] == two_ranks["ranks"][0]["skips"][0, "gradient"]["after"]


def test_without_the_agreement_the_ranks_would_part(two_ranks: dict[str, Any]) -> None:
    """The planted mistake that the test above must notice."""
    first, second = (rank["without_agreement"] for rank in two_ranks["ranks"])
    assert not first["skipped"]
    assert second["skipped"]
    assert not first["untouched"]


def test_other_ranks_end_with_rank_zeros_exit_code(two_ranks: dict[str, Any]) -> None:
    assert [rank["exit_code"] for rank in two_ranks["ranks"]] == [2, 2]


@pytest.mark.parametrize("stage", STAGES)
def test_a_document_that_started_on_one_rank_alone_is_rolled_back_there(two_ranks: dict[str, Any], stage: int) -> None:
    """At stage 3 all ranks gather the initial state's parameter, also those that need it not."""
    assert [rank["rolled_back"][stage] for rank in two_ranks["ranks"]] == [[True, False], [False, False]]


def test_bad_data_on_one_rank_end_all_ranks_with_its_exit_code(two_ranks: dict[str, Any]) -> None:
    assert [rank["bad_data"] for rank in two_ranks["ranks"]] == [("ClusterError", 70), ("DataError", 70)]


def test_gather_gives_every_rank_all_values(two_ranks: dict[str, Any]) -> None:
    assert [rank["gathered"] for rank in two_ranks["ranks"]] == [[{0: "bad"}, {1: "bad"}]] * 2


def test_an_infinite_gradient_skips_too(mesh: Mesh) -> None:
    run = ToyRun(mesh)
    run.losses(range(2))
    before = run.fingerprint()
    run.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    result = run.step(2)
    assert result.skipped
    assert math.isfinite(result.loss)
    assert run.fingerprint() == before


def test_a_step_without_any_label_changes_nothing_but_what_decays(mesh: Mesh) -> None:
    run = ToyRun(mesh, optimizer__weight_decay=0.0)
    batch = toy_batch(0)
    empty = dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100), num_valid=0, num_bytes=0)
    before = {name: value.clone() for name, value in run.engine.weights().items()}
    result, _ = run.engine.step([empty], run.carried, lr=0.1)
    assert not result.skipped
    assert result.num_tokens == 0
    assert math.isnan(result.loss)  # nothing was measured
    assert math.isnan(result.bits_per_byte)
    assert result.grad_norm == 0.0  # of the auxiliary loss neither: no count of tokens to divide it by
    assert all(torch.equal(before[name], value) for name, value in run.engine.weights().items())


def test_load_lists_every_parameter_that_does_not_fit(mesh: Mesh) -> None:
    run = ToyRun(mesh)
    weights = run.engine.weights()
    del weights["norm.bias"]
    weights["embedding"] = weights["embedding"][:5]
    weights["extra"] = torch.zeros(1)
    with pytest.raises(UsageError, match="3 parameters") as caught:
        run.engine.load(weights)
    for line in (
        "norm.bias: not given",
        "extra: not in this model",
        "embedding: shape [5, 13], this model has [37, 13]",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_group_with_a_multiplier_learns_faster(mesh: Mesh, stage: int) -> None:
    """The first AdamW update moves every element by the learning rate."""
    run = ToyRun(mesh, parallel__zero_stage=stage, optimizer__weight_decay=0.0)
    run.engine.optimizer.param_groups[0]["lr_multiplier"] = 10.0
    before = run.engine.weights()
    run.step(0)
    after = run.engine.weights()
    moved = {name: float((after[name] - value).abs().max()) for name, value in before.items()}
    assert moved["layers.0.weight"] == pytest.approx(0.5, rel=1e-3)  # the only one in group 0, `decay`
    assert moved["embedding"] == pytest.approx(0.05, rel=1e-3)


def test_weights_are_copies(mesh: Mesh) -> None:
    run = ToyRun(mesh)
    weights = run.engine.weights()
    run.step(0)
    assert not torch.equal(weights["embedding"], run.engine.weights()["embedding"])


def test_two_ranks_equal_one_for_twenty_steps(shards: Path, tmp_path: Path, two_ranks: dict[str, Any]) -> None:
    """Four lanes: one rank with one micro-batch of four, two ranks with two micro-batches of one each."""
    config = tiny_config(
        shards,
        training__steps=20,
        validation__interval_steps=10,
        checkpoint__interval_steps=20,
        schedule__name="rsqrt",
    )
    train(config, tmp_path / "one")
    one, two = (read_log(run, "step") for run in (tmp_path / "one", two_ranks["runs"] / "dp2"))
    for field in ("loss", "bits_per_byte", "grad_norm"):
        np.testing.assert_allclose([r[field] for r in one], [r[field] for r in two], rtol=0, atol=1e-5)
    assert [r["tokens"] for r in one] == [r["tokens"] for r in two]
    zero3 = read_log(two_ranks["runs"] / "dp2_zero3", "step")
    np.testing.assert_allclose([r["loss"] for r in one[:8]], [r["loss"] for r in zero3], rtol=0, atol=1e-5)
    held_out = [read_log(run, "validation")[-1] for run in (tmp_path / "one", two_ranks["runs"] / "dp2")]
    assert held_out[0]["bits_per_byte"] == pytest.approx(held_out[1]["bits_per_byte"], abs=1e-5)
    assert held_out[0]["bytes"] == held_out[1]["bytes"]


def test_a_run_of_two_ranks_goes_on_with_one(shards: Path, tmp_path: Path, two_ranks: dict[str, Any]) -> None:
    common = {"schedule__name": "rsqrt", "validation__interval_steps": 100, "checkpoint__interval_steps": 100}
    straight = train(tiny_config(shards, training__steps=24, **common), tmp_path / "one")
    shutil.copytree(two_ranks["runs"] / "dp2", tmp_path / "two")
    resumed = train(tiny_config(shards, training__steps=24, **common), tmp_path / "two", resume=True)
    assert resumed["loss"] == pytest.approx(straight["loss"], abs=1e-5)
    assert resumed["tokens"] == straight["tokens"]


def test_only_rank_zero_has_a_log(two_ranks: dict[str, Any]) -> None:
    assert len(read_log(two_ranks["runs"] / "dp2", "step")) == 20
    assert [rank["dp2"]["steps"] for rank in two_ranks["ranks"]] == [20, 20]
