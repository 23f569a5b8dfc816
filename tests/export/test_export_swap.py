"""Putting an export in its place: a kill, a failing rename or somebody else's files at any step lose nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exports import run_directory
from life_server import LifeServer

from longspan.errors import CheckpointError, UsageError
from longspan.trainer import export, export_folder
from longspan.trainer.cli import main
from longspan.trainer.export import export_checkpoint
from longspan.trainer.export_folder import POINTS, exchange, published

MARKER = "export_manifest.json"
BEFORE, BETWEEN, AFTER = POINTS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_directory(tmp_path_factory.mktemp("runs") / "run", "sliding_window", (1, 2))


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the system can exchange names."""
    if not request.param:
        monkeypatch.setattr(export_folder, "exchange", lambda first, second: False)
    return bool(request.param)


def step_at(out: Path) -> int | None:
    path = out / MARKER
    return json.loads(path.read_text())["checkpoint"]["step"] if path.is_file() else None


def write(out: Path, text: str = "new", overwrite: bool = True, meanwhile: Callable[[], object] = lambda: None) -> None:
    """What an export does, with small files."""
    with published(out, overwrite, MARKER) as folder:
        (folder / MARKER).write_text(text)
        meanwhile()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_export(server: LifeServer, run: Path, out: Path, point: str, exchanges: bool) -> None:
    """Export step 2 over what is at `out` in a process that ends itself at `point`."""
    log = run.parent / "messages"
    more = {"exchanges": exchanges, "instead_of": None, "log": str(log)}
    assert server.live(run=str(run), out=str(out), point=point, **more) == -signal.SIGKILL, log.read_text()


@pytest.mark.parametrize(
    ("exchanges", "point"),
    [(exchanges, point) for exchanges in (True, False) for point in POINTS if not (exchanges and point == BETWEEN)],
    indirect=["exchanges"],
)  # where names are exchanged there is no moment between two renames
def test_a_kill_at_any_step_keeps_the_earlier_export_or_shows_the_new_one(
    export_server: LifeServer, run: Path, tmp_path: Path, exchanges: bool, point: str
) -> None:
    out = tmp_path / "out"
    export_checkpoint(run / "checkpoints" / "step-00000001", out)
    killed_export(export_server, run, out, point, exchanges)
    assert step_at(out) == {BEFORE: 1, BETWEEN: None, AFTER: 2}[point]
    assert [name for name in names(tmp_path) if name.startswith(".out.")], "a leftover"
    kept = 2 if point == AFTER else 1
    with pytest.raises(UsageError, match="exists"):
        write(out, overwrite=False)
    assert step_at(out) == kept and names(tmp_path) == ["out"], "mended before anything else"
    assert export_checkpoint(run, out, overwrite=True)["step"] == 2
    assert step_at(out) == 2 and names(tmp_path) == ["out"]


def test_a_first_export_that_was_killed_at_its_end_is_whole(
    export_server: LifeServer, run: Path, tmp_path: Path
) -> None:
    killed_export(export_server, run, tmp_path / "out", AFTER, exchanges=True)
    assert step_at(tmp_path / "out") == 2 and names(tmp_path) == ["out"]


def test_names_are_exchanged_in_one_step_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["b"], ["a"])
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "c")
    write(tmp_path / "out", "old")
    renamed: list[Any] = []
    monkeypatch.setattr(export_folder.os, "rename", lambda *given: renamed.append(given))
    write(tmp_path / "out")
    assert (tmp_path / "out" / MARKER).read_text() == "new" and renamed == []


@pytest.mark.parametrize("number", [1, 2], ids=["away", "into place"])
def test_a_rename_that_fails_gives_the_earlier_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = tmp_path / "out"
    write(out, "old")
    monkeypatch.setattr(export_folder, "exchange", lambda first, second: False)
    calls: list[Path] = []
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == number:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(export_folder.os, "rename", failing)
    with pytest.raises(CheckpointError, match=r"Input/output error.*untouched"):
        write(out)
    assert len(calls) == (1 if number == 1 else 3) and (calls[-1] == out) is (number == 2)
    assert (out / MARKER).read_text() == "old" and names(tmp_path) == ["out"]


def test_an_exchange_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    hit = []

    def failing(first: Path, second: Path) -> bool:
        hit.append(second)
        raise OSError("odd")

    monkeypatch.setattr(export_folder, "exchange", failing)
    with pytest.raises(CheckpointError, match=r"could not be written: odd\."):
        write(tmp_path / "out")
    assert hit == [tmp_path / "out"]
    assert (tmp_path / "out" / MARKER).read_text() == "old" and names(tmp_path) == ["out"]


def put_something_else(out: Path) -> None:
    """As another user does who takes the export away and keeps own files there."""
    out.mkdir(exist_ok=True)
    (out / MARKER).unlink(missing_ok=True)
    (out / "mine.txt").write_text("precious")


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("moment", ["while it is written", "after the last look"])
def test_what_somebody_else_puts_there_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool, earlier: bool, moment: str
) -> None:
    out = tmp_path / "out"
    if earlier:
        write(out, "old")
    if moment == "while it is written":
        with pytest.raises(UsageError, match="not an earlier export"):
            write(out, meanwhile=lambda: put_something_else(out))
    else:
        looks: list[Path] = []
        look = export_folder.check_target

        def looked(given: Path, *more: Any) -> None:
            look(given, *more)
            looks.append(given)
            if len(looks) == 2 and earlier:
                put_something_else(out)

        monkeypatch.setattr(export_folder, "check_target", looked)
        if not earlier:  # nothing stood there at the last look, and something does when the name is given
            exists = os.path.lexists

            def no_more(path: Path) -> bool:
                found = exists(path)
                if path == out and len(looks) == 2:
                    put_something_else(out)
                return found

            monkeypatch.setattr(export_folder.os.path, "lexists", no_more)
        with pytest.raises(UsageError, match="by somebody else meanwhile"):
            write(out)
        assert len(looks) == 2
    assert names(out) == ["mine.txt"] and names(tmp_path) == ["out"]


def test_without_leave_to_overwrite_a_folder_that_came_meanwhile_stays(tmp_path: Path) -> None:
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    write(theirs, "theirs")
    with pytest.raises(UsageError, match="exists"):
        write(out, overwrite=False, meanwhile=lambda: theirs.rename(out))
    assert (out / MARKER).read_text() == "theirs" and names(tmp_path) == ["out"]


def test_a_link_means_the_folder_that_it_leads_to(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    export_checkpoint(run / "checkpoints" / "step-00000001", real)
    link.symlink_to(real)
    assert export_checkpoint(run, link, overwrite=True)["bytes"] > 0
    assert link.is_symlink() and step_at(link) == step_at(real) == 2 and names(tmp_path / "disk") == ["real"]
    (tmp_path / "new").symlink_to(tmp_path / "disk" / "later")
    export_checkpoint(run, tmp_path / "new")
    assert (tmp_path / "new").is_symlink() and step_at(tmp_path / "disk" / "later") == 2
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert main(["export", str(run), str(tmp_path / "circle"), "--overwrite", "--json"]) == 2
    assert "circle" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert names(tmp_path) == ["circle", "disk", "link", "new"]


def test_leftovers_of_a_name_with_special_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out[a-z]*"
    write(out, "old")
    export_folder._beside(out, "partial").mkdir()
    (tmp_path / ".outb.partial-1").mkdir()
    write(out)
    assert names(tmp_path) == [".outb.partial-1", "out[a-z]*"]
    os.rename(out, export_folder._beside(out, "replaced"))
    with pytest.raises(UsageError, match="exists"):
        write(out, overwrite=False)
    assert (out / MARKER).read_text() == "new", "given back"


def test_a_folder_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".out.replaced-{os.getppid()}"
    other.mkdir()
    write(tmp_path / "out")
    assert names(tmp_path) == [other.name, "out"]


def test_a_sync_that_fails_at_the_end_says_what_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    write(tmp_path / "out", "old")
    monkeypatch.setattr(export_folder, "sync_folder", failing)
    with pytest.raises(CheckpointError, match=r"is written, but the disk .*Input/output error"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / MARKER).read_text() == "new" and names(tmp_path) == ["out"]


def test_the_command_mends_too(run: Path, tmp_path: Path) -> None:
    """Only what `published` is given by the exporter makes that so: its target and its marker."""
    out = tmp_path / "out"
    export_checkpoint(run / "checkpoints" / "step-00000001", out)
    os.rename(out, tmp_path / ".out.replaced-999999999")
    with pytest.raises(UsageError, match="exists"):
        export.export_checkpoint(run, out)
    assert step_at(out) == 1 and names(tmp_path) == ["out"]
