"""Carried state that is kept only where it belongs, and runs that go on with other data settings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import token_corpora
import torch
from tiny_training import read_log, tiny_config

from longspan.data_pipeline.fork import fork_plan
from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
from longspan.errors import UsageError
from longspan.trainer import saving
from longspan.trainer.cli import main
from longspan.trainer.config import RunConfig
from longspan.trainer.data_source import open_data
from longspan.trainer.loop import Run, train

FORK = {"data__source_weights": '{"tales": 0.9, "laws": 0.1}', "data__segment_tokens": 32}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_corpora.corpus(tmp_path_factory.mktemp("mixed") / "corpus", ByteTokenizer())


def config(shards: Path, steps: int, **overrides: Any) -> RunConfig:
    """Without samples and with micro-batches that divide 2, 4 and 6 lanes."""
    common = {"validation__sample_tokens": 0, "training__micro_batch_lanes": 2, "schedule__name": "rsqrt"}
    return tiny_config(shards, training__steps=steps, validation__interval_steps=100, **common, **overrides)


@pytest.fixture
def four_steps(mixed: Path, tmp_path: Path) -> Path:
    train(config(mixed, 4), tmp_path / "run")
    return tmp_path / "run"


def lanes_at_start(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Every run from now on adds what its lanes carry before its first step, and what a fresh lane would."""
    seen: list[dict[str, torch.Tensor]] = []
    original = Run._train

    def look(self: Run) -> None:
        packed = {name: tensor.clone() for name, tensor in self.lanes.packed().items()}
        self.lanes.restore({}, [])
        seen.extend([packed, self.lanes.packed()])
        self.lanes.restore(packed, list(range(self.lanes.stop - self.lanes.start)))
        original(self)

    monkeypatch.setattr(Run, "_train", look)
    return seen


def fresh_lanes(seen: list[dict[str, torch.Tensor]]) -> list[bool]:
    """Of each lane, whether all that it carried was the initial state."""
    carried, initial = seen[-2], seen[-1]
    count = next(iter(carried.values())).shape[0]
    return [all(torch.equal(carried[name][lane], initial[name][lane]) for name in carried) for lane in range(count)]


def data_of(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "data.json").read_text())


def payload(run: Path, step: int) -> dict[str, str]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = [file for part in ("weights/*", "optimizer/*", "state/*", "data.json") for file in folder.glob(part)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_lane_goes_on_with_its_state(
    mixed: Path, four_steps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = lanes_at_start(monkeypatch)
    summary = train(config(mixed, 5), four_steps, resume=True)
    assert fresh_lanes(seen) == [False] * 4
    assert summary["lanes_reset"] == 0 and read_log(four_steps, "start")[-1]["lanes_reset"] == 0
    assert "initial state" not in capsys.readouterr().err


@pytest.mark.parametrize("planted", ["another document", "another place", "swapped"])
def test_state_of_another_document_or_place_is_reset_and_counted(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], planted: str
) -> None:
    right = saving.places_of

    def wrong(data: dict[str, Any]) -> list[Any]:
        places = right(data)
        if planted == "swapped":
            return [places[1], places[0], *places[2:]]
        name, offset = places[1]
        return [places[0], ("tales/none", offset) if planted == "another document" else (name, offset + 1), *places[2:]]

    monkeypatch.setattr(saving, "places_of", wrong)
    train(config(mixed, 4), tmp_path / "run")
    monkeypatch.setattr(saving, "places_of", right)
    seen = lanes_at_start(monkeypatch)
    summary = train(config(mixed, 5), tmp_path / "run", resume=True)
    count = 2 if planted == "swapped" else 1
    assert fresh_lanes(seen) == [planted == "swapped", True, False, False]
    assert summary["lanes_reset"] == count == read_log(tmp_path / "run", "start")[-1]["lanes_reset"]
    assert f"{count} of 4 lanes start in the initial state" in capsys.readouterr().err


def test_other_data_settings_are_refused_by_name(mixed: Path, four_steps: Path) -> None:
    before = sorted(four_steps.rglob("*"))
    with pytest.raises(UsageError) as caught:
        train(config(mixed, 8, **FORK), four_steps, resume=True)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "segment_tokens: 16 saved, 32 now" in message and "weights: {" in message and "--fork-data" in message
    assert sorted(four_steps.rglob("*")) == before


def test_a_fork_goes_on_and_is_remembered(
    mixed: Path, four_steps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = lanes_at_start(monkeypatch)
    train(config(mixed, 8, **FORK), four_steps, resume=True, fork_data=True)
    assert fresh_lanes(seen) == [False] * 4
    assert "the data plan is forked at step 4" in capsys.readouterr().err
    (record,) = read_log(four_steps, "data_fork")
    assert record["step"] == 4 and record["lanes_reset"] == record["lanes_new"] == 0
    assert record["changed"]["segment_tokens"] == [16, 32] and set(record["changed"]) == {"segment_tokens", "weights"}
    saved = data_of(four_steps, 8)["plan"]
    (past,) = saved["history"]
    assert (past["until_step"], past["segment_tokens"], saved["segment_tokens"]) == (4, 16, 32)
    plan = open_data(config(mixed, 4)).plan
    weights = {"tales": 0.9, "laws": 0.1}
    assert fork_plan(plan, 4, segment_tokens=32, source_weights=weights).description() == saved
    assert [record["step"] for record in read_log(four_steps, "step")] == list(range(1, 9))


def test_a_forked_run_resumes_bit_for_bit(mixed: Path, tmp_path: Path) -> None:
    for name in ("straight", "stopped"):
        train(config(mixed, 4), tmp_path / name)
    train(config(mixed, 8, **FORK), tmp_path / "straight", resume=True, fork_data=True)
    train(config(mixed, 6, **FORK), tmp_path / "stopped", resume=True, fork_data=True)
    train(config(mixed, 8, **FORK), tmp_path / "stopped", resume=True)  # the settings are the run's own now
    assert payload(tmp_path / "straight", 8) == payload(tmp_path / "stopped", 8)
    with pytest.raises(UsageError, match=r"segment_tokens: 32 saved, 16 now"):
        train(config(mixed, 10), tmp_path / "stopped", resume=True)


@pytest.mark.parametrize("lanes", [2, 6])
def test_a_fork_to_other_lanes_keeps_those_that_stay(
    mixed: Path, four_steps: Path, monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    seen = lanes_at_start(monkeypatch)
    train(config(mixed, 6, data__lanes=lanes), four_steps, resume=True, fork_data=True)
    assert fresh_lanes(seen) == [lane >= 4 for lane in range(lanes)]
    (record,) = read_log(four_steps, "data_fork")
    assert (record["lanes_reset"], record["lanes_new"]) == (0, max(0, lanes - 4))
    assert len(data_of(four_steps, 6)["lanes"]) == lanes


def test_what_no_fork_can_change_is_refused_even_so(mixed: Path, four_steps: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)seed: 0 saved, 1 now.*cannot change within a run"):
        train(config(mixed, 8, seed=1, **FORK), four_steps, resume=True, fork_data=True)


def test_a_fork_without_a_resume_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "configs/quickstart.yaml", "--fork-data"]) == 2
    assert "together with --resume" in capsys.readouterr().err
