"""SIGKILL at random moments, as often as it takes: the final state is bit for bit that of an uninterrupted run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from life_server import LifeServer
from trainer_lives import KILLED, Moment, Run

KILLS_A_RUN = 9


def kill_and_finish(run: Run, seed: int) -> dict[str, str]:
    """A run whose trainer is killed up to `KILLS_A_RUN` times; digests of its final state."""
    generator = random.Random(seed)
    for _ in range(KILLS_A_RUN):
        moment = Moment.draw(generator)
        status = run.live(moment)
        if status == 0:
            break
        assert status == KILLED, f"exit {status}, not by our signal:\n{run.messages()[-3000:]}"
    return run.finish()


def run_until(kills: int, server: LifeServer, recipe: dict[str, Any], uninterrupted: Run, folder: Path) -> list[Run]:
    """Runs with this many kills in all, each compared with the uninterrupted run."""
    expected, losses = uninterrupted.digests(), uninterrupted.losses()
    base = random.randrange(2**32)
    runs: list[Run] = []
    while sum(len(run.kills) for run in runs) < kills:
        assert len(runs) < kills, "the kills do not land"
        seed = base + len(runs)
        run = Run(server, folder / f"run-{len(runs)}", recipe)
        digests = kill_and_finish(run, seed)
        what = f"seed {seed}, killed at {run.kills}, resumed at {run.resumes}"
        different = [name for name in expected if digests[name] != expected[name]]
        assert not different, f"{', '.join(different)} differ from the uninterrupted run. {what}"
        assert run.losses() == losses, f"the logged losses differ from the uninterrupted run's. {what}"
        runs.append(run)
    return runs


def check_that_it_happened(runs: list[Run], kills: int) -> None:
    """The test was what it says: kills landed, some inside saves, and runs went on from checkpoints."""
    landed = [moment for run in runs for moment in run.kills]
    in_saves = [moment for run in runs for moment in run.kills_in_saves]
    resumed = [step for run in runs for step in run.resumes if step > 0]
    print(f"{len(landed)} kills in {len(runs)} runs, {len(in_saves)} inside saves, {len(resumed)} resumes")
    assert len(landed) >= kills and len(runs) >= 2
    assert len(in_saves) >= kills // 5, "too few kills landed inside saves"
    assert len(resumed) >= kills // 3 and len(set(resumed)) >= 4, "too few lives went on from a checkpoint"


def test_25_kills(server: LifeServer, recipe: dict[str, Any], uninterrupted: Run, tmp_path: Path) -> None:
    check_that_it_happened(run_until(25, server, recipe, uninterrupted, tmp_path), 25)


@pytest.mark.long
def test_200_kills(server: LifeServer, recipe: dict[str, Any], uninterrupted: Run, tmp_path: Path) -> None:
    check_that_it_happened(run_until(200, server, recipe, uninterrupted, tmp_path), 200)


def test_two_uninterrupted_runs_are_equal(
    server: LifeServer, recipe: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    again = Run(server, tmp_path, recipe)
    assert again.finish() == uninterrupted.digests()


def test_another_seed_is_another_state(
    server: LifeServer, recipe: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    other = Run(server, tmp_path, {**recipe, "seed": 2})
    digests, expected = other.finish(), uninterrupted.digests()
    assert all(digests[name] != expected[name] for name in ("weights", "optimizer", "lanes", "rng", "data"))


@pytest.mark.parametrize(
    "bug",
    [
        "forget_random_states",
        "forget_optimizer",
        "forget_optimizer_step",
        "forget_carried_state",
        "mix_up_lanes",
        "skip_one_position",
    ],
)
def test_a_planted_bug_is_seen(stopped: Run, uninterrupted: Run, tmp_path: Path, bug: str) -> None:
    run = stopped.copy(tmp_path / "copy")
    digests = run.finish(plant=bug)
    assert run.resumes and run.resumes[-1] >= 7
    assert digests["weights"] != uninterrupted.digests()["weights"]
    assert digests["step"] == uninterrupted.digests()["step"]


def test_without_a_planted_bug_nothing_is_seen(stopped: Run, uninterrupted: Run, tmp_path: Path) -> None:
    run = stopped.copy(tmp_path / "copy")
    assert run.finish() == uninterrupted.digests()
    assert run.resumes and run.resumes[-1] >= 7
