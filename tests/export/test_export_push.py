"""`longspan export --push` against a stand-in of the hub on this machine, over HTTP."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exports import run_directory
from hub_stand_in import TOKEN, Hub
from huggingface_hub import HfApi, constants

from longspan.errors import UsageError
from longspan.trainer import export_push
from longspan.trainer.cli import build_parser, main
from longspan.trainer.commands import export as command

NAME = "someone/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, in the place of the hub that HF_ENDPOINT names when the library is imported."""
    hub = Hub()
    monkeypatch.setattr(export_push, "HfApi", functools.partial(HfApi, endpoint=hub.address))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in takes large files in the older way
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_directory(tmp_path_factory.mktemp("push") / "run", "fixed_skip", (1, 2))


def export(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the command."""
    code = main(["export", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_repository_holds_the_folder_and_nothing_else(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, result = export(capsys, str(run), str(out), "--push", NAME, "--private")
    assert code == 0, result
    assert result["pushed"].startswith(f"{hub.address}/{NAME}/commit/")
    held = dict(hub.repositories[NAME])
    assert held.pop(".gitattributes") == b"" and held == listing(out)
    assert len(hub.large) == 2, "weights go by way of large files"
    assert hub.private[NAME] is True and hub.commits == [f"Step 2, checkpoint {result['fingerprint'][:16]}"]
    hub.repositories[NAME]["model-00002-of-00002.safetensors"] = b"of an earlier export"
    older = str(run / "checkpoints" / "step-00000001")
    code, result = export(capsys, older, str(out), "--overwrite", "--push", NAME)
    assert code == 0, result
    held = dict(hub.repositories[NAME])
    held.pop(".gitattributes", None)
    assert held == listing(out) and len(hub.commits) == 2


@pytest.mark.parametrize(
    ("fail", "token", "code", "message"),
    [
        (None, "hf_wrong", 2, "HF_TOKEN"),
        (("/commit/", 403), TOKEN, 2, "HF_TOKEN"),
        (("/commit/", 400), TOKEN, 70, "400"),
        (("/commit/", 409), TOKEN, 70, "409"),
        (("/commit/", 0), TOKEN, 70, "could not be reached or failed"),
        (("/repos/create", 401), TOKEN, 2, "HF_TOKEN"),
        (("/upload/", 403), TOKEN, 2, "HF_TOKEN"),
    ],
    ids=["wrong token", "may not write", "hub refuses", "other commit", "cut", "may not create", "may not upload"],
)
def test_a_failed_push_says_so_and_keeps_the_export(
    hub: Hub,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fail: tuple[str, int] | None,
    token: str,
    code: int,
    message: str,
) -> None:
    hub.fail = fail
    monkeypatch.setenv("HF_TOKEN", token)
    ended, result = export(capsys, str(run), str(tmp_path / "out"), "--push", NAME)
    assert ended == code and message in result["error"] and f"hf upload {NAME}" in result["error"]
    assert hub.requests and (tmp_path / "out" / "config.json").is_file() and hub.commits == []


def test_no_hub_at_all(hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.close()
    ended, result = export(capsys, str(run), str(tmp_path / "out"), "--push", NAME)
    assert ended == 70 and "could not be reached" in result["error"] and "hf upload" in result["error"]


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "some one/tiny", "someone/..", ""])
def test_bad_names_are_refused_before_anything_is_written(run: Path, tmp_path: Path, name: str) -> None:
    arguments = ["export", str(run), str(tmp_path / "out"), f"--push={name}", "--private"]
    with pytest.raises(UsageError, match="--p"):
        command.run(build_parser().parse_args(arguments))
    assert list(tmp_path.iterdir()) == []
