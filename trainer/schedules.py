"""Learning rate as a pure function of the update's number; nothing to save, nothing to restore."""

from __future__ import annotations

import math

from longspan.trainer.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, lr_peak: float, update: int, num_updates: int) -> float:
    """Learning rate of update number `update`, counted from 1.

    Both shapes rise linearly from 0 to `lr_peak` over `warmup_steps` updates. Then `cosine` falls to
    `final_fraction * lr_peak` at update `num_updates`; `rsqrt` is 1 / sqrt(max(update, warmup)) scaled so that its
    highest value is `lr_peak` (arXiv:2203.07852, section 4: warm-up 1000 gives a peak of 0.0316).

    Args:
        schedule: shape and warm-up.
        lr_peak: highest learning rate.
        update: number of the update, from 1; 0 gives the value before the first one.
        num_updates: updates of the whole run.
    """
    warmup = schedule.warmup_steps
    if update < warmup:
        return lr_peak * update / warmup
    if schedule.name == "rsqrt":
        plateau = max(warmup, 1)
        return lr_peak * math.sqrt(plateau / max(update, plateau))
    progress = min((update - warmup) / max(num_updates - warmup, 1), 1.0)
    floor = schedule.final_fraction
    return lr_peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
