"""How a run may start, and every way in which it must not: messages, exit codes, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from tiny_training import read_log, tiny_config

from longspan.errors import UsageError
from longspan.trainer.log import RunLog
from longspan.trainer.loop import train
from longspan.trainer.restore import differences
from longspan.trainer.run_directory import RunDirectory
from longspan.trainer.signals import StopRequest


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_config(shards, training__steps=4), run)
    return run


def refused(match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        train(*args, **kwargs)
    assert caught.value.exit_code == 2


def test_missing_shards_name_the_command_that_builds_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "nothing", data__recipe="configs/data/quickstart.yaml")
    advice = r"nothing: there is no corpus.*`longspan data build configs/data/quickstart.yaml --out .*nothing`"
    refused(advice, config, tmp_path / "run")
    refused(r"`longspan data build RECIPE --out .*nothing`", tiny_config(tmp_path / "nothing"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_is_too_small(shards: Path, tmp_path: Path) -> None:
    config = tiny_config(shards, model__vocab_size=256)
    refused(r"model.vocab_size = 256 is smaller.*384", config, tmp_path / "run")


def test_lanes_must_divide(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(shards, data__lanes=6, training__micro_batch_lanes=2)
    monkeypatch.setattr("longspan.trainer.loop.Mesh.build", staticmethod(lambda parallel, **_: _FakeMesh()))
    refused(r"data.lanes = 6: do not divide over 2 data-parallel ranks.*multiple of 4", config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class _FakeMesh:
    dp_size = 2

    def close(self) -> None:
        pass


def test_a_run_directory_that_cannot_be_made(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(r"file is a file, not a folder. Choose another --run-dir", tiny_config(shards), tmp_path / "file" / "run")
    refused(r"not writable", tiny_config(shards), Path("/proc/run"))


def test_a_folder_for_checkpoints_that_cannot_be_made(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = tiny_config(shards, checkpoint__folder=str(tmp_path / "file" / "kept"))
    refused(r"checkpoint.folder = .*file is a file, not a folder. Choose another folder", config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_read_only_place(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    refused(r"not writable: no permission to write in", tiny_config(shards), tmp_path / "run")


def test_checkpoints_are_not_overwritten(shards: Path, finished: Path) -> None:
    before = sorted(finished.rglob("*"))
    refused(r"holds checkpoints of an earlier run.*--resume", tiny_config(shards), finished)
    assert sorted(finished.rglob("*")) == before


def test_resume_without_a_checkpoint_starts_from_the_first_step(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    summary = train(tiny_config(shards, training__steps=2), tmp_path / "run", resume=True)
    assert summary["steps"] == 2
    said = capsys.readouterr().err
    assert "run holds no checkpoint yet; starting from the first step" in said
    assert "--resume" not in said, "a launcher may have given it"


def test_resume_lists_every_differing_model_field(shards: Path, finished: Path) -> None:
    config = tiny_config(shards, training__steps=8, model__dim=32, model__head_dim=16)
    refused(
        r"(?s)another configuration:\n  model.dim: 16 in the checkpoint, 32 now\n"
        r"  model.head_dim: 8 in the checkpoint, 16 now\n.*--run-dir",
        config,
        finished,
        resume=True,
    )


def test_resume_with_another_optimizer(shards: Path, finished: Path) -> None:
    config = tiny_config(shards, training__steps=8, optimizer__name="adafactor")
    refused("optimizer.name: adamw in the checkpoint, adafactor now", config, finished, resume=True)


def test_resume_with_other_data_settings(shards: Path, finished: Path) -> None:
    refused("(?s)other data settings.*seed: 0 saved, 1 now", tiny_config(shards, seed=1), finished, resume=True)


def test_resume_beyond_the_last_step(shards: Path, finished: Path) -> None:
    refused("at step 4, beyond training.steps = 2", tiny_config(shards, training__steps=2), finished, resume=True)


def test_resume_of_a_finished_run_changes_nothing(shards: Path, finished: Path, capsys: pytest.CaptureFixture) -> None:
    before = read_log(finished, "step")
    summary = train(tiny_config(shards, training__steps=4), finished, resume=True)
    assert (summary["steps"], summary["first_step_seconds"]) == (4, None)
    assert read_log(finished, "step") == before
    assert "resuming from" in capsys.readouterr().err


def test_resume_says_what_changed(shards: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(finished, tmp_path / "run")
    train(tiny_config(shards, training__steps=5), tmp_path / "run", resume=True)
    assert "changed since: training.steps: 4 in the checkpoint, 5 now" in capsys.readouterr().err


def test_resume_with_other_threads_says_so(
    shards: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    train(tiny_config(shards, training__steps=5, training__threads=2), tmp_path / "run", resume=True)
    assert "2 CPU threads now, 1 before" in capsys.readouterr().err
    assert read_log(tmp_path / "run", "start")[-1]["threads"] == 2


def test_init_from_takes_the_weights(shards: Path, finished: Path, tmp_path: Path) -> None:
    fresh = train(tiny_config(shards, training__steps=1), tmp_path / "fresh")
    warm = train(tiny_config(shards, training__steps=1), tmp_path / "warm", init_from=finished)
    assert warm["loss"] < fresh["loss"]
    assert read_log(tmp_path / "warm", "step")[0]["step"] == 1


def test_init_from_lists_what_differs(shards: Path, finished: Path, tmp_path: Path) -> None:
    config = tiny_config(shards, model__num_heads=4, model__head_dim=4)
    refused(
        r"(?s)--init-from: .*step-00000004 holds another model:\n  model.num_heads: 2 in the checkpoint, 4 now",
        config,
        tmp_path / "run",
        init_from=finished,
    )
    assert not (tmp_path / "run").exists()


def test_differences_reach_into_lists() -> None:
    saved, now = {"layers": [{"mixer": "a", "n": 1}]}, {"layers": [{"mixer": "a", "n": 2}, {"mixer": "b"}]}
    assert [line for _, line in differences(saved, now)] == [
        "layers.0.n: 1 in the checkpoint, 2 now",
        "layers.1: absent in the checkpoint, {'mixer': 'b'} now",
    ]


def test_a_second_trainer_is_refused_and_told_who_is_there(shards: Path, tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run")
    refused(
        rf"another trainer is at work in .*run: pid {os.getpid()} on host {socket.gethostname()}",
        tiny_config(shards),
        tmp_path / "run",
    )
    first.release()
    train(tiny_config(shards, training__steps=1), tmp_path / "run")


def test_the_lock_of_a_dead_trainer_is_taken_over(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text(json.dumps({"pid": 999999, "host": "elsewhere"}))
    train(tiny_config(shards, training__steps=1), tmp_path / "run")
    assert "took over the lock of a trainer that is gone" in capsys.readouterr().err


def test_log_is_cut_at_the_step_and_at_a_torn_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, None)
    for step in (1, 2, 3):
        log.write("step", step, loss=float("nan"), skips=0)
        log.write("validation", step, loss=1.0)
    log.close()
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text.splitlines()[0])["loss"] is None
    (tmp_path / "log.jsonl").write_text(text + '{"kind": "step", "step": 3, "ti')
    again = RunLog(tmp_path, 3)
    again.close()
    assert (tmp_path / "log.jsonl").read_text() == text
    again = RunLog(tmp_path, 2)
    again.close()
    assert [(r["kind"], r["step"]) for r in read_log(tmp_path)] == [
        ("step", 1),
        ("validation", 1),
        ("step", 2),
        ("validation", 2),
    ]
    assert again.validated == {1, 2}
    RunLog(tmp_path, None).close()
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), 15)
        assert stop.received == "SIGTERM"
        assert codes == []
        os.kill(os.getpid(), 10)
        assert codes == [], "a scheduler's notice may come twice"
        os.kill(os.getpid(), 2)
    assert codes == [128 + 2]


def test_a_run_that_is_not_tracked_names_no_store(shards: Path, finished: Path, tmp_path: Path) -> None:
    summary = train(tiny_config(shards, training__steps=4), finished, resume=True)
    assert summary["tracking_uri"] is None and not (finished.parent / "mlflow.db").exists()
    uri = f"sqlite:///{tmp_path / 'metrics.db'}"
    config = tiny_config(shards, training__steps=4, tracking__enabled="true", tracking__uri=uri)
    assert train(config, finished, resume=True)["tracking_uri"] == uri
