"""Evaluations on real Ray: a cluster of the command's own, one that runs already, and nobody without the token."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from longspan.cluster import ray_local
from longspan.errors import ClusterError, SecurityError
from longspan.trainer import cli

CONNECT = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False)
    print("nodes", len(ray.nodes()))
except BaseException as error:
    print("refused", type(error).__name__, error)
"""
HOST = """
import json, os, sys
from longspan.cluster.ray_local import local_cluster
with local_cluster(2) as ray:
    print(json.dumps([ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN_PATH"]]), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Path]]:
    """Address and token of a Ray cluster in another process."""
    process = subprocess.Popen([sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    address, token = json.loads(process.stdout.readline())
    yield address, Path(token)
    process.stdin.close()
    process.wait(60)
    assert not Path(token).exists()


def connect(address: str, **variables: str) -> str:
    """What another process gets to see of the cluster."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT, address],
        env={**clean, "HOME": "/nonexistent", "RAY_AUTH_MODE": "token", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout


def test_nobody_comes_in_without_the_token(cluster: tuple[str, Path], tmp_path: Path) -> None:
    address, token = cluster
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    (tmp_path / "wrong").write_text("0" * 64)
    right, *others = (
        {"RAY_AUTH_TOKEN_PATH": str(token)},
        {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")},
        {},
        {"RAY_AUTH_MODE": "disabled"},
    )
    with ThreadPoolExecutor() as threads:  # Ray takes its time to give up
        answers = list(threads.map(lambda variables: connect(address, **variables), (right, *others)))
    assert answers[0].startswith("nodes 1")
    assert [answer.split()[0] for answer in answers[1:]] == ["refused"] * 3


def test_a_run_is_evaluated_on_a_cluster_that_runs(
    cluster: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address, token = cluster
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    corpus = tiny_run.corpus(tmp_path / "corpus")
    run = tiny_run.run_directory(tmp_path / "runs" / "tiny", tiny_run.config(corpus, tracked=True), steps=(1, 2, 3))
    (run / "log.jsonl").write_text('{"kind": "step", "step": 1, "time": 1.0, "loss": 2.0}\n')
    weights = next((run / "checkpoints" / "step-00000002" / "weights").iterdir())
    weights.write_bytes(weights.read_bytes()[:-1])
    arguments = tiny_run.one_pass(run, tmp_path)
    arguments += ["--address", address, "--workers", "2", "--json"]
    assert cli.main(arguments) == 70  # one of three is damaged
    assert "step-00000002 does not verify" in capsys.readouterr().err
    done = list((run / "evals").glob("[!.]*/_SUCCESS"))
    assert len(done) == 2 and all((path.parent / "_LOGGED").exists() for path in done)
    assert len(list((run / "evals" / "failed").iterdir())) == 1
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["submitted"] == [] and len(report["already_evaluated"]) == 2 and len(report["failed_before"]) == 1
    assert (tmp_path / "runs" / "mlflow.db").is_file()


@pytest.mark.long
def test_a_cluster_of_ones_own_comes_and_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tiny_run.corpus(tmp_path / "corpus")
    run = tiny_run.run_directory(tmp_path / "runs" / "tiny", tiny_run.config(corpus), steps=(1,))
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    arguments = tiny_run.one_pass(run, tmp_path)
    assert cli.main([*arguments, "--workers", "1"]) == 0
    assert "Submitted 1, evaluated 1." in capsys.readouterr().out
    assert {name: value for name, value in os.environ.items() if name.startswith("RAY_")} == before


@pytest.fixture(scope="module")
def deaf() -> Iterator[dict[str, str]]:
    """Addresses: nobody listens; somebody listens and never says a word; somebody speaks something else."""
    silent, stranger = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))

    def talk() -> None:
        with suppress(OSError):  # closed at the end
            while True:
                connection, _ = stranger.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=talk, daemon=True).start()
    ports = {"silent": silent.getsockname()[1], "stranger": stranger.getsockname()[1], "nobody": 1}
    yield {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    silent.close()
    stranger.close()


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("who", ["nobody", "silent", "stranger"])
def test_an_address_where_no_ray_answers(
    deaf: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, who: str, scheme: str
) -> None:
    monkeypatch.setattr(ray_local, "CONNECT_SECONDS", 1.0)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no token either"))
    run = tiny_run.run_directory(
        tmp_path / "runs" / "tiny", tiny_run.config(tiny_run.corpus(tmp_path / "corpus")), steps=(1,)
    )
    spec, address = str(tiny_run.spec_file(tmp_path, **tiny_run.QUICK)), scheme + deaf[who]
    started = time.monotonic()
    code = cli.main(["evals", "reconcile", str(run), "--spec", spec, "--once", "--json", "--address", address])
    assert code == 70 and time.monotonic() - started < 30  # Ray itself waits for minutes
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert f"no Ray cluster at --address {address} (" in said["error"] and said["exit_code"] == 70
    reason = {"nobody": "ConnectionRefused", "silent": "TimeoutError", "stranger": "HTTP/1.1"}[who]
    assert reason in said["error"] and said["failed"] == said["evaluated"] == []
    assert list((run / "evals" / "leases").glob("[0-9a-f]*")) == [] and not (run / "evals" / "failed").exists()


def test_a_token_must_be_there_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_local, "knock", lambda address: None)
    monkeypatch.setattr(ray_local, "_greet", lambda address: None)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ClusterError, match="no token for the Ray cluster"), ray_local.ray_session("127.0.0.1:9", 1):
        pass
    ray_local.write_token(tmp_path / "token")
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600 and len((tmp_path / "token").read_text()) == 64
    with pytest.raises(FileExistsError):
        ray_local.write_token(tmp_path / "token")
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(SecurityError, match="mode 644"), ray_local.ray_session("127.0.0.1:9", 1):
        pass


def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_local.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(ray_local.tempfile, "tempdir", str(tmp_path))
    left, used = tmp_path / "longspan-ray-left", tmp_path / "longspan-ray-used"
    for folder in (left, used):
        folder.mkdir()
        (folder / "owner").touch()
    with (used / "owner").open() as file:
        ray_local.fcntl.flock(file, ray_local.fcntl.LOCK_EX)
        with ray_local._own_folder() as own:
            assert not left.exists() and used.exists() and own.exists()
        assert not own.exists()
