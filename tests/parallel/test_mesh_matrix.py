"""ZeRO 0 to 3 x tensor x context x data parallel, other data on every data-parallel rank: the losses of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_parallel_training import train_here
from tiny_training import build_tiny_corpus, read_log, tiny_config
from worlds import in_world

from longspan.errors import ConfigError

STEPS = 20
# every mixer; a norm that is clipped in every step, so that a wrong one changes the losses; two micro-batches a rank
SETTINGS: dict[str, Any] = {
    "model__layers": '[{"mixer": "sliding_window"}, {"mixer": "block_recurrent", "gate": "lstm", "num_states": 4}, '
    '{"mixer": "linear_attention"}, {"mixer": "full_attention", "context_tokens": 20}]',
    "training__steps": STEPS,
    "training__micro_batch_lanes": 1,
    "optimizer__clip_norm": 0.05,
    "validation__interval_steps": STEPS,
    "checkpoint__interval_steps": STEPS,
}
STAGES = (0, 1, 2, 3)
DATA = 2  # data-parallel ranks
MESHES = [(1, 1), (1, 2), (2, 1), (2, 2)]


def settings_of(name: str, stage: int, tp: int, cp: int) -> dict[str, Any]:
    sizes = {"parallel__zero_stage": stage, "parallel__tp": tp, "parallel__cp": cp}
    return SETTINGS | sizes | {"optimizer__name": name}


def refusal(name: str, stage: int, tp: int) -> str | None:
    """The setting that the refusal has to name; None where training must work."""
    if name == "adafactor" and stage:
        return f"parallel.zero_stage = {stage}"
    return f"parallel.tp = {tp}" if name == "adafactor" and tp > 1 else None


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def one_rank(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("one")
    for name in ("adamw", "adafactor"):
        train_here(0, str(shards), str(folder / name), settings_of(name, 0, 1, 1), False)
    return {name: folder / name for name in ("adamw", "adafactor")}


def column(run: Path, name: str) -> list[float]:
    return [record[name] for record in read_log(run, "step")]


def check_same(run: Path, want: Path) -> None:
    assert len(column(want, "loss")) == STEPS
    assert column(run, "loss") == pytest.approx(column(want, "loss"), rel=1e-5)
    assert column(run, "grad_norm") == pytest.approx(column(want, "grad_norm"), rel=1e-4)
    assert min(column(run, "grad_norm")) > SETTINGS["optimizer__clip_norm"]


def train_all(
    shards: Path, folder: Path, tp: int, cp: int, kinds: list[tuple[str, int]]
) -> dict[tuple[str, int], Path]:
    """A run of each (optimizer, stage) on 2 x tp x cp ranks."""
    runs = {kind: folder / f"{kind[0]}-{kind[1]}" for kind in kinds}
    jobs = [
        (train_here, (str(shards), str(run), settings_of(name, stage, tp, cp), False))
        for (name, stage), run in runs.items()
    ]
    in_world(DATA * tp * cp, folder / "meet", jobs)
    return runs


@pytest.mark.long
@pytest.mark.parametrize(("tp", "cp"), MESHES, ids=[f"tp{tp}-cp{cp}" for tp, cp in MESHES])
def test_every_stage_and_optimizer_trains_as_one_rank_does(
    shards: Path, one_rank: dict[str, Path], tmp_path: Path, tp: int, cp: int
) -> None:
    kinds = [(name, stage) for name in one_rank for stage in STAGES if not refusal(name, stage, tp)]
    runs = train_all(shards, tmp_path, tp, cp, kinds)
    assert len(runs) == (5 if tp == 1 else 4)
    for (name, _), run in runs.items():
        check_same(run, one_rank[name])


@pytest.mark.parametrize(("name", "stage", "tp"), [("adafactor", 1, 1), ("adafactor", 3, 2), ("adafactor", 0, 2)])
def test_what_does_not_train_so_is_refused_with_the_reason(shards: Path, name: str, stage: int, tp: int) -> None:
    where = refusal(name, stage, tp)
    with pytest.raises(ConfigError) as refused:
        tiny_config(shards, **settings_of(name, stage, tp, 1))
    assert f"{where}: optimizer.name = adafactor" in str(refused.value)
    assert "real shapes" in str(refused.value) if stage else "means over whole parameters" in str(refused.value)
