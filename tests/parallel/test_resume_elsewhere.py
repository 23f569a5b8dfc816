"""A run that is saved on one mesh and goes on with another: the losses and lanes of the run that was never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_mesh_matrix import SETTINGS
from tiny_training import build_tiny_corpus, read_log, tiny_config
from worlds import command_line, in_world

STEPS = 12
SAVED = 6
# as (dp, tp, cp)
BEFORE = (2, 2, 1)
AFTER = [(1, 1, 1), (1, 2, 2), (4, 1, 1)]
LANES = 4


def recipe_of(shards: Path) -> dict[str, Any]:
    changes = SETTINGS | {
        "training__steps": STEPS,
        "checkpoint__interval_steps": SAVED,
        "validation__interval_steps": STEPS,
        "validation__sample_tokens": 0,
        "schedule__warmup_steps": 2,
        "data__lanes": LANES,
        "data__segment_tokens": 32,
    }
    return tiny_config(shards, **changes).model_dump(mode="json")


def train_on(mesh: tuple[int, int, int], folder: Path, recipe: Path, run: Path, stage: int, *options: str) -> None:
    """`longspan train` on each rank of the mesh."""
    dp, tp, cp = mesh
    values = {"parallel.tp": tp, "parallel.cp": cp, "parallel.zero_stage": stage}
    sets = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    arguments = ["train", str(recipe), "--run-dir", str(run), *sets, *options]
    [ends] = in_world(dp * tp * cp, folder, [(command_line, (arguments,))])
    for code, text in ends:
        assert code == 0, text


def steps_of(run: Path, name: str) -> list[float]:
    """A column of the log; steps that were done again count once."""
    return list({record["step"]: record[name] for record in read_log(run, "step")}.values())


def lanes_of(checkpoint: Path) -> list[Any]:
    """What each lane goes on with."""
    return json.loads((checkpoint / "data.json").read_text())["lanes"]


def states_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What each lane carries, all lanes together."""
    parts = [load_file(path) for path in sorted((checkpoint / "state").iterdir())]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_of(build_tiny_corpus(folder / "corpus"))))
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank all the way."""
    folder = tmp_path_factory.mktemp("one")
    train_on((1, 1, 1), folder / "meet", recipe, folder / "run", 0)
    return folder / "run"


@pytest.fixture(scope="module")
def saved(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the run."""
    folder = tmp_path_factory.mktemp("saved")
    # the learning rate is a function of the number of steps, so the run is stopped by taking its later part away
    train_on(BEFORE, folder / "meet", recipe, folder / "run", 1)
    shutil.rmtree(folder / "run/checkpoints" / f"step-{STEPS:08d}")
    return folder / "run"


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("after", AFTER, ids=[f"dp{dp}-tp{tp}-cp{cp}" for dp, tp, cp in AFTER])
def test_losses_and_lanes_are_those_of_the_run_that_went_on(
    recipe: Path, uninterrupted: Path, saved: Path, tmp_path: Path, after: tuple[int, int, int], stage: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    train_on(after, tmp_path / "meet", recipe, run, stage, "--resume")
    starts = read_log(run, "start")
    assert [record["world_size"] for record in starts] == [4, after[0] * after[1] * after[2]]
    assert starts[-1]["step"] == SAVED and starts[-1]["resumed"] and starts[-1]["lanes_reset"] == 0
    assert steps_of(run, "loss") == pytest.approx(steps_of(uninterrupted, "loss"), rel=1e-5)
    assert steps_of(run, "grad_norm") == pytest.approx(steps_of(uninterrupted, "grad_norm"), rel=1e-4)
    check_same_lanes(run, uninterrupted)


def check_same_lanes(run: Path, uninterrupted: Path) -> None:
    """At the end: the places in the documents, and what is carried."""
    got, want = (folder / f"checkpoints/step-{STEPS:08d}" for folder in (run, uninterrupted))
    assert lanes_of(got) == lanes_of(want) and len(lanes_of(want)) == LANES
    found, wanted = states_of(got), states_of(want)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape and tensor.shape[0] == LANES, name
        near = 1e-4 * float(tensor.float().abs().max()) + 1e-6
        assert torch.allclose(found[name].float(), tensor.float(), rtol=0, atol=near), name
