"""Learning-rate schedules against an independent NumPy version."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longspan.trainer import recipes
from longspan.trainer.config import RunConfig, ScheduleConfig, cross_problems
from longspan.trainer.schedules import learning_rate


def numpy_schedule(name: str, peak: float, warmup: int, total: int, fraction: float) -> np.ndarray:
    k = np.arange(total + 1, dtype=np.float64)
    if name == "rsqrt":
        body = peak * np.sqrt(max(warmup, 1)) / np.sqrt(np.maximum(k, max(warmup, 1)))
    else:
        angle = np.pi * np.clip((k - warmup) / (total - warmup), 0, 1)
        body = peak * fraction + peak * (1 - fraction) * (1 + np.cos(angle)) / 2
    return np.where(k < warmup, peak * k / max(warmup, 1), body)


@pytest.mark.parametrize("name", ["cosine", "rsqrt"])
@pytest.mark.parametrize("warmup", [0, 1, 30])
def test_schedule_equals_numpy(name: str, warmup: int) -> None:
    config = ScheduleConfig(name=name, warmup_steps=warmup, final_fraction=0.1)
    ours = [learning_rate(config, 3e-3, update, 200) for update in range(201)]
    np.testing.assert_allclose(ours, numpy_schedule(name, 3e-3, warmup, 200, 0.1), rtol=1e-12)


def test_paper_schedule_is_one_over_root_of_step() -> None:
    """arXiv:2203.07852: 1 / sqrt(max(step, 1000)), so a peak of 0.0316."""
    config = ScheduleConfig(name="rsqrt", warmup_steps=1000)
    assert learning_rate(config, 1000**-0.5, 4000, 500_000) == pytest.approx(4000**-0.5)
    assert learning_rate(config, 1000**-0.5, 1000, 500_000) == pytest.approx(0.0316, abs=1e-4)


def test_paper_recipe_is_the_papers_optimizer(tmp_path: Path) -> None:
    """As a base of a training recipe: valid, and the numbers of section 4."""
    recipe = tmp_path / "paper.yaml"
    recipe.write_text("base: [configs/quickstart.yaml, configs/optimizer/paper.yaml]\n")
    config = recipes.load(RunConfig, recipe, cross_check=cross_problems)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.decay_rate) == ("adafactor", 0.9, 0.8)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.gain_lr_multiplier) == (0.0, 0.0, 1.0)
    for update in (1, 500, 999, 1000, 1001, 4000, 500_000):
        rate = learning_rate(config.schedule, optimizer.lr_peak, update, 500_000)
        assert rate == pytest.approx(min(update / 1000, 1) / max(update, 1000) ** 0.5, rel=1e-12)


def test_cosine_stays_at_its_floor_beyond_the_last_update() -> None:
    config = ScheduleConfig(name="cosine", warmup_steps=10, final_fraction=0.1)
    assert learning_rate(config, 1.0, 150, 100) == pytest.approx(0.1)


def test_warmup_longer_than_the_run_only_rises() -> None:
    config = ScheduleConfig(name="cosine", warmup_steps=1000)
    assert learning_rate(config, 1.0, 20, 20) == pytest.approx(0.02)
