"""The trainer with one model over several ranks: the same losses, norms, samples and checkpoints as one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from test_parallel_training import STEPS, losses, run_ranks, train_here
from tiny_training import build_tiny_corpus, read_log, tiny_config

from longspan.errors import ConfigError

# small enough to clip in every step, so that a wrong norm changes the losses
SETTINGS = {"optimizer__clip_norm": 0.05, "validation__sample_tokens": 5, "validation__interval_steps": STEPS // 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def one_rank(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    train_here(0, str(shards), str(run), SETTINGS, False)
    return run


def train_on(ranks: int, shards: Path, run: Path, resume: bool = False, **settings: Any) -> None:
    if ranks == 1:
        train_here(0, str(shards), str(run), SETTINGS | settings, resume)
    else:
        run_ranks(train_here, ranks, str(shards), str(run), SETTINGS | settings, resume)


def check_same(run: Path, one_rank: Path) -> None:
    assert losses(run) == pytest.approx(losses(one_rank), rel=1e-5)
    norms = [[record["grad_norm"] for record in read_log(folder, "step")] for folder in (run, one_rank)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    check_validations(run, one_rank)


def check_validations(run: Path, one_rank: Path) -> None:
    """Those that the run has made so far."""
    found, want = (read_log(folder, "validation") for folder in (run, one_rank))
    assert found
    want = want[: len(found)]
    assert [record["bytes"] for record in found] == [record["bytes"] for record in want]
    assert [r["bits_per_byte"] for r in found] == pytest.approx([r["bits_per_byte"] for r in want], rel=1e-5)
    assert [record["sample"] for record in found] == [record["sample"] for record in want]


def shapes(checkpoint: Path, kind: str) -> dict[str, list[int]]:
    found = {}
    for file in sorted((checkpoint / kind).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_slice(name).get_shape() for name in opened.keys()})  # noqa: SIM118
    return found


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("tp", "cp", "dp"), [(2, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_every_mesh_and_stage(
    shards: Path, one_rank: Path, tmp_path: Path, tp: int, cp: int, dp: int, stage: int
) -> None:
    sizes = {"parallel__tp": tp, "parallel__cp": cp, "parallel__zero_stage": stage}
    train_on(tp * cp * dp, shards, tmp_path / "run", **sizes, training__micro_batch_lanes=2)
    check_same(tmp_path / "run", one_rank)


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.long)])
def test_a_run_goes_on_with_another_number_of_ranks(
    shards: Path, one_rank: Path, tmp_path: Path, before: int, after: int
) -> None:
    run = tmp_path / "run"
    train_on(before, shards, run, parallel__tp=before, parallel__zero_stage=1, training__steps=STEPS // 2)
    check_validations(run, one_rank)
    last = f"checkpoints/step-{STEPS // 2:08d}"
    for kind in ("weights", "optimizer", "state"):
        assert shapes(run / last, kind) == shapes(one_rank / last, kind)
    train_on(after, shards, run, resume=True, parallel__tp=after, parallel__zero_stage=0)
    check_same(run, one_rank)


def test_sizes_that_do_not_divide_are_refused_all_at_once(shards: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_config(shards, parallel__tp=5, model__ffn_dim=34, optimizer__name="adafactor")
    text = str(refused.value)
    for part in ("num_heads = 2", "Use 5", "ffn_dim = 34", "Use 35", "vocab_size = 384", "Use 385", "adafactor"):
        assert part in text, text


def test_full_attention_with_dropout_is_refused(shards: Path) -> None:
    layers = '[{"mixer": "full_attention"}]'
    with pytest.raises(ConfigError, match=r"model.dropout = 0.1.*no dropout"):
        tiny_config(shards, parallel__tp=2, model__layers=layers, model__dropout=0.1)
