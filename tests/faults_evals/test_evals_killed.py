"""Reconcilers, workers and MLflow killed at random: every result once, the same as undisturbed, and once in MLflow."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from story import Setting, problems_of, tell


def run_story(
    folder: Path, checkpoints: int, specs: int, kills: dict[str, int], reconcilers: int, seconds: float
) -> tuple[Setting, Counter[str]]:
    """A story told from a random seed; nothing may be wrong afterwards, and all kills must have landed."""
    setting, seed = Setting.make(folder, checkpoints, specs), random.randrange(2**32)
    setting.evaluate_undisturbed()
    assert len(setting.expected) == checkpoints * specs
    landed = tell(setting, kills=kills, seed=seed, reconcilers=reconcilers, seconds=seconds)
    print(f"seed {seed}: {dict(landed)} kills, {setting.evaluated()} results, {setting.logged()} logged")
    assert landed == Counter(kills)
    problems = problems_of(setting, sum(kills.values()))
    assert not problems, f"seed {seed}\n" + "\n".join(problems)
    return setting, landed


def test_a_few_kills(tmp_path: Path) -> None:
    run_story(tmp_path, 2, 2, {"worker": 1, "driver": 1, "mlflow": 1}, reconcilers=2, seconds=170)


@pytest.mark.long
def test_sixty_kills(tmp_path: Path) -> None:
    kills = {"worker": 40, "driver": 12, "mlflow": 10}
    run_story(tmp_path, 50, 2, kills, reconcilers=3, seconds=1700)


@pytest.mark.long
@pytest.mark.parametrize(
    ("bug", "kills", "seen"),
    [
        ("none", {"worker": 1}, ""),
        ("lease_ignored", {}, "scored more than once"),
        ("success_before_the_write", {}, "is not whole"),
        ("marker_before_the_write", {"mlflow": 2}, "MLflow has"),
    ],
)
def test_a_planted_bug_is_seen(tmp_path: Path, bug: str, kills: dict[str, int], seen: str) -> None:
    setting = Setting.make(tmp_path, 4, 2)
    setting.evaluate_undisturbed()
    try:
        tell(setting, kills=kills, seed=1, reconcilers=2, bug=bug, seconds=170)
        problems = problems_of(setting, sum(kills.values()))
    except AssertionError as error:
        problems = [str(error)]
    if seen:
        assert any(seen in problem for problem in problems), problems
    else:
        assert not problems
