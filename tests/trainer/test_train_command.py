"""`longspan train` as a command: exit codes, messages, summary, and what a person sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_training import read_log, tiny_config
from trainer_toy import free_port

from longspan.trainer.cli import main
from longspan.trainer.device import available_cores, process_age_seconds
from longspan.trainer.progress import Progress


@pytest.fixture
def recipe(shards: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(shards, training__steps=3).model_dump(mode="json")))
    return path


def test_json_is_one_object_on_the_last_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run"), "--json", "--set", "seed=3"]) == 0
    out = capsys.readouterr().out
    summary = json.loads(out)
    assert out.count("\n") == 1
    assert summary["steps"] == 3
    assert 0 < summary["first_step_seconds"] < process_age_seconds()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 3


def test_without_json_a_table_and_the_next_commands(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--run-dir", str(run)]) == 0
    out = capsys.readouterr().out
    for text in ("Training finished", "bits/byte", "skipped steps", f"longspan report {run}", "longspan evaluate"):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--set", "data.shards=nowhere"], 2, "data.shards = nowhere: there is no corpus"),
        (["--set", "data.segment_tokens=20"], 2, "not a multiple of model.window_tokens = 8. Nearest: 16 or 24"),
        (["--set", "data.lanes=6"], 2, "data.lanes = 6: not a multiple of training.micro_batch_lanes = 4"),
        (["--init-from", "nowhere"], 2, "nowhere does not exist"),
    ],
)
def test_usage_errors_end_with_their_code_and_write_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], exit_code: int, message: str
) -> None:
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run"), *arguments]) == exit_code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def progress_lines(capsys: pytest.CaptureFixture, steps: int, peak: float | None = None, **fields: Any) -> list[str]:
    record = {
        "loss": 2.0,
        "bits_per_byte": 2.885,
        "tokens_per_second": 12345.6,
        "model_flops_per_second": 2.5e12,
        "memory_gib": 1.5,
        "lr": 3e-4,
        "grad_norm": 0.5,
        "skips": 0,
        "skipped": False,
    }
    with Progress(num_steps=100, interval_steps=5, peak_flops=peak, silent=False) as progress:
        for step in range(1, steps + 1):
            progress.step(record | fields, step, 9.0 if step <= 3 else 1.0)
    return capsys.readouterr().err.splitlines()


def test_plain_lines_at_the_interval_with_the_time_left(capsys: pytest.CaptureFixture) -> None:
    lines = progress_lines(capsys, 20, peak=989e12)
    assert [line.split()[1] for line in lines] == ["1/100", "5/100", "10/100", "15/100", "20/100"]
    assert "12,346 tok/s  2.5 TFLOP/s (0.3% of peak)  1.50 GiB  lr 3.00e-04" in lines[-1]
    assert "left" not in lines[1]
    assert lines[-1].endswith("left 1:20"), "80 steps at one second: the slow first steps do not count"


def test_a_skipped_step_says_so(capsys: pytest.CaptureFixture) -> None:
    assert "SKIPPED: loss or gradient not finite" in progress_lines(capsys, 1, skipped=True, loss=float("nan"))[0]


def test_cores_follow_the_containers_quota(tmp_path: Path) -> None:
    affinity = len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_cores(tmp_path / "cpu.max") == affinity
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert available_cores(tmp_path / "cpu.max") == 1
    assert available_cores(tmp_path / "missing") == affinity


@pytest.mark.long
def test_under_torchrun_one_rank_speaks(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(free_port()), "-m", "longspan.trainer.cli", "train", str(recipe), "--json"]
    command += ["--run-dir", str(tmp_path / "run"), "--set", "training.micro_batch_lanes=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert json.loads(done.stdout)["world_size"] == 2
    assert done.stderr.count("step 3/3") == 1
    assert len(read_log(tmp_path / "run", "step")) == 3
