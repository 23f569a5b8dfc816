"""The real trainer under signals, damaged checkpoints and a full disk."""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from life_server import LifeServer
from trainer_lives import KILLED, LANES, Moment, Run

from longspan.errors import EXIT_FAULT, EXIT_REQUEUE
from longspan.trainer.checkpoint.verify import verify


def newest_step(run: Run) -> int:
    """Step of the newest checkpoint, which verifies."""
    newest = run.store.committed()[-1]
    return int(verify(newest)["step"])


def flip_bit(path: Path, generator: random.Random) -> int:
    """Flip one bit of a file; the offset of its byte."""
    content = bytearray(path.read_bytes())
    offset = generator.randrange(len(content))
    content[offset] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    return offset


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_run_goes_on_exactly(
    server: LifeServer, recipe: dict[str, Any], uninterrupted: Run, tmp_path: Path, number: signal.Signals
) -> None:
    seed = random.randrange(2**32)
    generator = random.Random(seed)
    run = Run(server, tmp_path, recipe)
    for after in ("step", "save"):
        moment = Moment(after, generator.randint(1, 4), generator.random())
        assert run.live(moment, number) == EXIT_REQUEUE, f"seed {seed}: {run.messages()[-2000:]}"
        last = run.records("step")[-1]["step"]
        assert last - newest_step(run) <= 1, f"seed {seed}"
        assert f"stopped by {number.name}" in run.messages() and "--resume" in run.messages()
    assert run.finish() == uninterrupted.digests(), f"seed {seed}: stopped, resumed at {run.resumes}"
    assert len(run.resumes) == 2 and run.losses() == uninterrupted.losses()


@pytest.mark.parametrize("kind", ["weights", "state", "manifest.json"])
def test_resume_falls_back_over_one_flipped_bit(stopped: Run, uninterrupted: Run, tmp_path: Path, kind: str) -> None:
    run = stopped.copy(tmp_path / "copy")
    older, newest = run.store.committed()
    damaged = next(path for path in sorted(newest.rglob("*")) if path.is_file() and kind in str(path))
    seed = random.randrange(2**32)
    offset = flip_bit(damaged, random.Random(seed))
    assert run.finish() == uninterrupted.digests(), f"seed {seed}"
    assert run.resumes[-1] == int(older.name.removeprefix("step-"))
    name = damaged.relative_to(newest).as_posix()
    named = re.search(rf"{newest.name} does not verify: {re.escape(name)}, bytes (\d+)-(\d+)", run.messages())
    assert named is not None, run.messages()
    assert int(named[1]) <= offset <= int(named[2])


def test_no_checkpoint_that_verifies_is_a_fault(stopped: Run, tmp_path: Path) -> None:
    run = stopped.copy(tmp_path / "copy")
    for folder in run.store.committed():
        flip_bit(folder / "rng.json", random.Random(1))
    assert run.live() == EXIT_FAULT
    assert run.messages().count("rng.json, bytes 0-") >= 2


def test_a_full_disk_costs_one_checkpoint(
    server: LifeServer, recipe: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    run = Run(server, tmp_path, recipe)
    assert run.finish(plant="full_disk_at_second_save") == uninterrupted.digests()
    failures = run.records("checkpoint_failure")
    assert [record["step"] for record in failures] == [4]
    assert "File too large" in failures[0]["error"] and "checkpoint of step 4 not saved" in failures[0]["error"]
    assert [record["step"] for record in run.records("checkpoint")][:2] == [2, 6]
    state, _ = run.store.load_newest(0, LANES)
    assert state.counters["checkpoint_failures"] == 1


def test_the_old_checkpoint_stays_good_when_the_disk_is_full(
    server: LifeServer, recipe: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    run = Run(server, tmp_path, recipe)
    assert run.live(Moment("failure"), plant="full_disk_at_second_save") == KILLED
    assert newest_step(run) in (2, 6)  # 6 only if the kill came late
    assert run.finish() == uninterrupted.digests()


def test_training_outlives_a_disk_that_takes_nothing(
    server: LifeServer, recipe: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    run = Run(server, tmp_path, recipe)
    assert run.finish(plant="full_disk_from_second_to_fourth_save") == uninterrupted.digests()
    assert [record["step"] for record in run.records("checkpoint_failure")] == [4, 6]
    assert [record["step"] for record in run.records("checkpoint")][:2] == [2, 8]
    assert run.losses() == uninterrupted.losses(), "what did not fit into the log came later"
