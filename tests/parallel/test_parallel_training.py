"""The trainer with one sequence over several ranks: the same losses, lanes and checkpoints as one rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from tiny_training import build_tiny_corpus, read_log, tiny_config
from trainer_toy import run_ranks

from longspan.errors import ConfigError
from longspan.trainer.loop import train

STEPS = 8
# flat after the warm-up, so that a run of half the steps has the same learning rates
WIDE = {
    "data__segment_tokens": 32,
    "training__steps": STEPS,
    "validation__sample_tokens": 0,
    "schedule__final_fraction": 1.0,
}


def train_here(rank: int, shards: str, run_dir: str, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    config = tiny_config(Path(shards), **(WIDE | settings))
    return train(config, Path(run_dir), resume=resume)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_log(run_dir, "step")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def one_rank(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    train_here(0, str(shards), str(run), {}, False)
    return run


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), 2])
def test_two_ranks_of_one_sequence_train_as_one(shards: Path, one_rank: Path, tmp_path: Path, stage: int) -> None:
    settings = {"parallel__cp": 2, "parallel__zero_stage": stage, "parallel__state_slices": 2}
    run_ranks(train_here, 2, str(shards), str(tmp_path / "run"), settings, False)
    assert losses(tmp_path / "run") == pytest.approx(losses(one_rank), rel=1e-5)
    want, got = read_log(one_rank, "validation"), read_log(tmp_path / "run", "validation")
    assert [r["bytes"] for r in got] == [r["bytes"] for r in want]
    assert [r["bits_per_byte"] for r in got] == pytest.approx([r["bits_per_byte"] for r in want], rel=1e-5)


def test_a_run_goes_on_with_other_sizes_of_the_mesh(shards: Path, one_rank: Path, tmp_path: Path) -> None:
    """dp x cp = 1 x 2 for four steps, then 2 x 1: the same losses as one rank all the way."""
    run = tmp_path / "run"
    first = {"parallel__cp": 2, "training__steps": STEPS // 2, "training__micro_batch_lanes": 2}
    run_ranks(train_here, 2, str(shards), str(run), first, False)
    assert [file.name for file in (run / "checkpoints/step-00000004/state").iterdir()] == [
        "lanes-00000-00003.safetensors"
    ]
    run_ranks(train_here, 2, str(shards), str(run), {"training__micro_batch_lanes": 2}, True)
    assert losses(run) == pytest.approx(losses(one_rank), rel=1e-5)


def test_a_segment_that_does_not_divide_is_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel.cp = 3.*multiple of 24"):
        tiny_config(shards, parallel__cp=3, data__segment_tokens=32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parallel__zero_stage": 1}, "no gradient of the state's update, and parallel.zero_stage = 1"),
        ({"parallel__state_grad": "truncate"}, "no update of the state is ever trained"),
    ],
)
def test_one_recurrent_block_a_rank_is_refused_where_some_rank_lacks_a_gradient(
    shards: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_config(shards, parallel__cp=2, data__segment_tokens=16, **settings)
    assert words in str(refused.value) and "Use data.segment_tokens: 32" in str(refused.value)
    tiny_config(shards, parallel__cp=2, data__segment_tokens=16)
    tiny_config(shards, parallel__cp=2, data__segment_tokens=32, **settings)
