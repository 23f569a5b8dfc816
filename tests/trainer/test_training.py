"""Whole runs of the tiny model: log, resume, signals, skipped steps, divergence, two ranks against one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_training import read_log, tiny_config
from trainer_toy import fingerprint

from longspan.cluster.mesh import Mesh
from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.errors import CheckpointError, DivergenceError, Stopped
from longspan.modeling.model import LanguageModel
from longspan.trainer.checkpoint.load import load_model
from longspan.trainer.checkpoint.store import CheckpointStore, SaveResult
from longspan.trainer.config import RunConfig
from longspan.trainer.lanes import Lanes
from longspan.trainer.loop import Run, train
from longspan.trainer.recorder import Recorder

PAYLOAD = ("weights/*", "optimizer/*", "state/*", "data.json", "rng.json")


def payload_hashes(checkpoint: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint that a resume restores."""
    files = [file for part in PAYLOAD for file in checkpoint.glob(part)]
    assert len(files) >= len(PAYLOAD)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Run], None]) -> None:
    """Call `action` once, at the end of this step."""
    original = Run._one_step

    def patched(self: Run) -> Any:
        result = original(self)
        if self.step == step:
            monkeypatch.setattr(Run, "_one_step", original)
            action(self)
        return result

    monkeypatch.setattr(Run, "_one_step", patched)


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> list[int]:
    """Make the loss NaN at the training forwards whose number, from 1, is `bad`; returns the counter."""
    original, calls = LanguageModel.forward, [0]

    def forward(self: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        y, state, aux = original(self, *args, **kwargs)
        if self.training:
            calls[0] += 1
            y = y * math.nan if bad(calls[0]) else y
        return y, state, aux

    monkeypatch.setattr(LanguageModel, "forward", forward)
    return calls


def test_a_run_writes_log_checkpoints_and_summary(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    summary = train(tiny_config(shards), run)
    assert [record["step"] for record in read_log(run, "step")] == list(range(1, 13))
    assert [record["step"] for record in read_log(run, "validation")] == [6, 12]
    assert [record["step"] for record in read_log(run, "checkpoint")] == [4, 8, 12]
    assert [record["kind"] for record in read_log(run)][0 :: len(read_log(run)) - 1] == ["start", "end"]
    last = read_log(run, "step")[-1]
    assert last["tokens"] == sum(round(r["tokens_per_second"] * r["seconds"]) for r in read_log(run, "step"))
    assert last["lr"] == pytest.approx(1e-3)
    assert summary["checkpoint"] == str(run / "checkpoints" / "step-00000012")
    assert summary["validation_bits_per_byte"] == read_log(run, "validation")[-1]["bits_per_byte"]
    assert summary["loss"] == last["loss"] < read_log(run, "step")[0]["loss"]
    assert summary["quarantined_documents"] == []
    numbers = [value for value in summary.values() if isinstance(value, int | float)]
    assert all(math.isfinite(value) for value in numbers)
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "tiny"
    assert "step 12/12 (100.0%)" in capsys.readouterr().err


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_a_resume_is_bit_identical(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: signal.Signals
) -> None:
    config = tiny_config(shards, model__dropout=0.1, training__micro_batch_lanes=2)
    straight = train(config, tmp_path / "straight")
    at_step(monkeypatch, 5, lambda run: os.kill(os.getpid(), name))
    with pytest.raises(Stopped, match=rf"{name.name} after step 6.*step-00000006.*--resume") as caught:
        train(config, tmp_path / "stopped")
    assert caught.value.exit_code == 75
    resumed = train(config, tmp_path / "stopped", resume=True)
    assert payload_hashes(Path(resumed["checkpoint"])) == payload_hashes(Path(straight["checkpoint"]))
    steps = [record["step"] for record in read_log(tmp_path / "stopped", "step")]
    assert steps == list(range(1, 13))
    losses = [[record["loss"] for record in read_log(tmp_path / run, "step")] for run in ("straight", "stopped")]
    assert losses[0] == losses[1]
    assert resumed["tokens"] == straight["tokens"]
    assert resumed["validation_bits_per_byte"] == straight["validation_bits_per_byte"]


def test_dropout_draws_matter_to_a_resume(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted mistake that the test above must notice: a resume that forgets the random generators."""
    config = tiny_config(shards, model__dropout=0.1)
    straight = train(config, tmp_path / "straight")
    at_step(monkeypatch, 5, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train(config, tmp_path / "stopped")
    monkeypatch.setattr("longspan.trainer.saving.rng.restore", lambda state: None)
    resumed = train(config, tmp_path / "stopped", resume=True)
    assert payload_hashes(Path(resumed["checkpoint"])) != payload_hashes(Path(straight["checkpoint"]))


def test_a_signal_during_validation_gives_it_up_and_saves(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(shards)
    at_step(monkeypatch, 6, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="after step 6"):
        train(config, tmp_path / "run")
    assert read_log(tmp_path / "run", "validation") == []
    train(config, tmp_path / "run", resume=True)
    assert [record["step"] for record in read_log(tmp_path / "run", "validation")] == [6, 12]


def test_log_of_steps_after_the_checkpoint_is_written_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies without saving: steps 5 and 6 are in the log, the checkpoint is of step 4."""

    def die(run: Run) -> None:
        raise MemoryError

    at_step(monkeypatch, 6, die)
    with pytest.raises(MemoryError):
        train(tiny_config(shards), tmp_path / "run")
    assert [record["step"] for record in read_log(tmp_path / "run", "step")] == [1, 2, 3, 4, 5, 6]
    train(tiny_config(shards), tmp_path / "run", resume=True)
    assert [record["step"] for record in read_log(tmp_path / "run", "step")] == list(range(1, 13))


def test_a_skipped_step_changes_nothing_but_the_place_in_the_data(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = poison(monkeypatch, lambda call: call == 3)
    seen: list[tuple[str, str, list[str]]] = []

    def look(self: Run, original: Any = Run._one_step) -> Any:
        before = (fingerprint(self.engine.weights()), self.lanes.packed())
        result = original(self)
        if result.skipped:
            started = self.reader.batch(self.step - 1).reset.any(dim=1)
            now = self.lanes.packed()
            kept = {name: torch.equal(now[name][~started], value[~started]) for name, value in before[1].items()}
            assert not started.all()
            assert all(kept.values()), kept
            assert fingerprint(self.engine.weights()) == before[0]
            seen.append(before)
        return result

    monkeypatch.setattr(Run, "_one_step", look)
    summary = train(tiny_config(shards, validation__sample_tokens=0), tmp_path / "run")
    assert len(seen) == 1
    assert calls[0] == 12
    assert summary["skips"] == 1
    steps = read_log(tmp_path / "run", "step")
    assert [record["skipped"] for record in steps] == [False, False, True] + [False] * 9
    assert steps[2]["loss"] is None
    assert steps[2]["lr"] == steps[3]["lr"], "the schedule went on although nothing was updated"
    assert [record["skips"] for record in steps[1:4]] == [0, 1, 1]


def test_a_lane_whose_document_started_in_a_skipped_step_forgets_the_old_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 1 starts a document in every lane; after skipping it, states are initial whatever they were."""
    poison(monkeypatch, lambda call: call == 1)
    original = Lanes.roll_back
    found: list[bool] = []

    def roll_back(self: Lanes) -> None:
        self.carried = [{**state, "layer1": {k: v + 7 for k, v in state["layer1"].items()}} for state in self.carried]
        original(self)
        with self._engine.evaluating() as model:
            fresh = model.init_state(4)
        found.append(all(torch.equal(fresh["layer1"][k], v) for k, v in self.carried[0]["layer1"].items()))

    monkeypatch.setattr(Lanes, "roll_back", roll_back)
    train(tiny_config(shards, training__steps=2, validation__sample_tokens=0), tmp_path / "run")
    assert found == [True]


def test_too_many_bad_steps_in_a_row_end_the_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: call in (2, 3) or call >= 6)
    config = tiny_config(shards, training__max_consecutive_skips=3)
    with pytest.raises(DivergenceError, match=r"3 steps in a row.*step 8\..*step-00000004") as caught:
        train(config, tmp_path / "run")
    assert caught.value.exit_code == 72
    assert len(read_log(tmp_path / "run", "step")) == 8
    assert read_log(tmp_path / "run", "end")[0]["status"] == "FAILED"


def test_a_failed_save_is_counted_and_training_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CheckpointStore.save

    def save(self: CheckpointStore, state: Any) -> SaveResult:
        if state.step == 4:
            return SaveResult(False, None, 0.1, "checkpoint of step 4 not saved: disk full")
        return original(self, state)

    monkeypatch.setattr(CheckpointStore, "save", save)
    summary = train(tiny_config(shards), tmp_path / "run")
    assert summary["checkpoint_failures"] == 1
    assert [record["step"] for record in read_log(tmp_path / "run", "checkpoint_failure")] == [4]
    assert [record["step"] for record in read_log(tmp_path / "run", "checkpoint")] == [8, 12]


def test_a_last_save_that_fails_is_no_success(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointStore, "save", lambda self, state: SaveResult(False, None, 0.1, "disk full"))
    with pytest.raises(CheckpointError, match=r"last step 2 could not be saved. No checkpoint has been saved"):
        train(tiny_config(shards, training__steps=2), tmp_path / "run")


def test_validation_is_exact_and_carries_state(shards: Path, tmp_path: Path) -> None:
    """Against each document read whole, one at a time, in one forward."""
    config = tiny_config(shards, validation__max_document_tokens=70)
    summary = train(config, tmp_path / "run")
    model = load_model(tmp_path / "run").model
    manifest = Manifest.load(shards)
    reader = DocumentReader(manifest)
    nats, num_bytes = 0.0, 0
    for entry in manifest.split("held_out"):
        ids = torch.from_numpy(reader.tokens(entry)[:71].astype(np.int64))[None]
        labels = ids[:, 1:]
        reset = torch.zeros(1, -(-labels.shape[1] // 8), dtype=torch.bool)
        reset[0, 0] = True
        with torch.no_grad():
            nll, _, _ = model(ids[:, :-1], model.init_state(1), reset=reset, labels=labels)
        nats += float(nll.double()[labels < 256].sum())
        num_bytes += int((labels < 256).sum())
    assert read_log(tmp_path / "run", "validation")[-1]["bytes"] == num_bytes
    assert summary["validation_bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2), abs=1e-6)


def test_a_sample_does_not_change_the_run(shards: Path, tmp_path: Path) -> None:
    config = tiny_config(shards, model__dropout=0.1)
    with_sample = train(config, tmp_path / "with")
    without = train(tiny_config(shards, model__dropout=0.1, validation__sample_tokens=0), tmp_path / "without")
    assert with_sample["loss"] == without["loss"]
    assert "sample" in read_log(tmp_path / "with", "validation")[0]
    assert "sample" not in read_log(tmp_path / "without", "validation")[0]


def test_bad_documents_of_other_ranks_are_saved_and_known_after_a_resume(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 saves, and met no bad document in its own lanes."""
    bad = Manifest.load(shards).split("train")[0].id
    monkeypatch.setattr(Mesh, "gather", lambda self, mine: [mine, {bad: "cut off"}])
    summary = train(tiny_config(shards, training__steps=4), tmp_path / "run")
    assert summary["quarantined_documents"] == [bad]
    assert read_log(tmp_path / "run", "checkpoint")[-1]["quarantined"] == [bad]
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    assert json.loads((newest / "data.json").read_text())["quarantine"] == [[bad, "cut off"]]
    monkeypatch.setattr(Mesh, "gather", lambda self, mine: [mine])
    train(tiny_config(shards, training__steps=8), tmp_path / "run", resume=True)
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-00000008"
    assert json.loads((newest / "data.json").read_text())["quarantine"] == [[bad, "cut off"]]


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_goes_on_in_another_precision(shards: Path, tmp_path: Path, before: str, after: str) -> None:
    def config(precision: str, steps: int) -> RunConfig:
        return tiny_config(shards, training__precision=precision, training__steps=steps, parallel__zero_stage=1)

    train(config(before, 4), tmp_path / "run")
    train(config(after, 8), tmp_path / "run", resume=True)
    losses = [record["loss"] for record in read_log(tmp_path / "run", "step")]
    straight = train(config(before, 8), tmp_path / "straight")
    assert len(losses) == 8
    assert losses[-1] == pytest.approx(straight["loss"], abs=0.01)


def test_adafactor_trains(shards: Path, tmp_path: Path) -> None:
    train(tiny_config(shards, optimizer__name="adafactor", optimizer__lr_peak=0.05), tmp_path / "run")
    losses = [record["loss"] for record in read_log(tmp_path / "run", "step")]
    assert losses[-1] < losses[0] - 0.3


def test_recorder_closes_the_log_when_a_step_fails(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Recorder, *args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Recorder, "step", fail)
    with pytest.raises(MemoryError):
        train(tiny_config(shards), tmp_path / "run")
    assert read_log(tmp_path / "run", "end")[0]["status"] == "FAILED"
