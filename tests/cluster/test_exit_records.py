"""A worker's end reaches the launcher as it was, and torchrun restarts only what a restart can mend."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longspan.cluster import exit_records
from longspan.cluster.exit_records import ExitRecord
from longspan.cluster.launcher import NodeLaunch, messages, run_node

STAND_IN = """
import os, signal, sys, time
from longspan.cluster import exit_records
rank, what = os.environ["RANK"], sys.argv[1]
if what == "wait":
    open(sys.argv[2] + rank, "w").close()
    time.sleep(60)
if what == "codes":
    code = int(sys.argv[2 + int(rank)])
    exit_records.note(f"code {code}" if code else "", {"rank": rank})
    sys.exit(code)
raise ValueError("planted")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stand_in"


def worker(module: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, exit_records.FOLDER_VARIABLE: str(folder), "RANK": "0", "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "longspan.cluster.worker", module, *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("code", "seen_by_torchrun"), [(0, 0), (1, 1), (2, 0), (70, 70), (71, 71), (72, 0), (75, 0)], ids=str
)
def test_codes_that_a_restart_would_repeat_are_0_to_torchrun(
    module: str, tmp_path: Path, code: int, seen_by_torchrun: int
) -> None:
    assert worker(module, tmp_path, "codes", str(code)).wait(timeout=60) == seen_by_torchrun
    (record,) = exit_records.records(tmp_path)
    assert (record.exit_code, record.rank, record.result) == (code, 0, {"rank": "0"})
    assert exit_records.agreed_code([record]) == code


def test_an_unexpected_error_is_recorded_and_raised(module: str, tmp_path: Path) -> None:
    process = worker(module, tmp_path, "raise")
    assert process.wait(timeout=60) == 1
    assert "ValueError: planted" in process.stderr.read()
    assert exit_records.records(tmp_path)[0].message == "unexpected ValueError: planted"


def test_a_signal_before_training_ends_resumable(module: str, tmp_path: Path) -> None:
    process = worker(module, tmp_path, "wait", str(tmp_path / "waits"))
    while not (tmp_path / "waits0").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 0
    assert exit_records.records(tmp_path)[0].exit_code == 75


def test_attempts_are_told_apart(tmp_path: Path) -> None:
    for name in ("worker-0-100-11", "worker-1-150-12", "worker-1-300-22", "worker-0-290-21"):
        (tmp_path / name).touch()
    assert exit_records.attempts(tmp_path) == [{11, 12}, {21, 22}]


def test_the_first_end_that_is_not_0_decides() -> None:
    ends = [ExitRecord(0, 0, 1), ExitRecord(1, 2, 2, "bad"), ExitRecord(2, 70, 3, "bad")]
    assert exit_records.agreed_code(ends) == 2
    assert messages(ends) == ["rank 1: bad"]
    assert exit_records.agreed_code([]) == 70


def test_messages_come_in_order_of_rank_each_once() -> None:
    said = [(3, "late"), (1, "bad"), (2, "bad"), (0, ""), (5, "late")]  # in order of time
    ends = [ExitRecord(rank, 70, pid, text, time=pid) for pid, (rank, text) in enumerate(said)]
    assert messages(ends) == ["rank 1: bad", "rank 3: late"]
    followed = ExitRecord(0, 70, 9, exit_records.FOLLOWED)
    assert messages([followed, *ends]) == ["rank 1: bad", "rank 3: late"]
    assert messages([followed]) == [exit_records.FOLLOWED]


def test_without_a_launcher_codes_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(exit_records.FOLDER_VARIABLE, raising=False)
    assert [exit_records.leave(code) for code in (0, 2, 75)] == [0, 2, 75]


def start_rank(rank: int, folder: Path, port: int, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    """`longspan ARGUMENT...` as one of two ranks of this host, started by hand."""
    place = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "longspan.trainer.cli", *arguments]
    environment = {**os.environ, **place, **meeting, **changes}
    return subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)


def test_what_only_a_later_rank_of_a_host_knows_is_said_by_it(tmp_path: Path) -> None:
    for _ in range(2):  # a second start is no part of the first
        process = start_rank(1, tmp_path, 29801, "train", "nofile.yaml")
        said = process.communicate(timeout=60)[1].splitlines()
        assert process.returncode == 2
        assert len(said) == 1 and said[0].startswith("longspan: rank 1: no recipe at nofile.yaml"), said


def test_what_all_ranks_of_a_host_know_is_said_once(tmp_path: Path) -> None:
    ranks = [start_rank(rank, tmp_path, 29803, "train", "nofile.yaml") for rank in range(2)]
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert "no recipe at nofile.yaml" in said[0] and said[1] == ""


def test_another_problem_than_the_first_ranks_is_said_too(tmp_path: Path) -> None:
    ranks = [start_rank(rank, tmp_path, 29804, "train", f"{'ab'[rank]}.yaml") for rank in range(2)]
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert "longspan: no recipe at a.yaml" in said[0] and "longspan: rank 1: no recipe at b.yaml" in said[1]


def test_torchrun_around_two_workers_keeps_their_code_and_restarts_nothing(module: str) -> None:
    result = run_node(NodeLaunch(module, ("codes", "0", "75"), processes=2, max_restarts=2))
    assert (result.exit_code, result.restarts) == (75, 0)
    assert messages(result.ends) == ["rank 1: code 75"]


@pytest.mark.long
@pytest.mark.parametrize("code", [2, 70, 71, 72, 1])
def test_every_code_comes_through_torchrun(module: str, code: int) -> None:
    result = run_node(NodeLaunch(module, ("codes", str(code), str(code)), processes=2, max_restarts=1))
    assert result.exit_code == code
    assert result.restarts == (1 if code in (1, 70, 71) else 0)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_workers_and_not_torchrun(module: str, tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "from longspan.cluster.launcher import *; import json\n"
        f"r = run_node(NodeLaunch({module!r}, ('wait', {str(tmp_path / 'waits')!r}), processes=2, max_restarts=1))\n"
        "print(json.dumps([r.exit_code, r.restarts, len(r.ends)]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    while not all((tmp_path / f"waits{rank}").exists() for rank in range(2)):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert json.loads(process.communicate(timeout=60)[0]) == [75, 0, 2]
