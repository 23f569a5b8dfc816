"""`longspan evaluate` on what it cannot use: which exit code, what it says, and that nothing is left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import tiny_run
import yaml

from longspan.data_pipeline.manifest import Manifest
from longspan.trainer import cli
from longspan.trainer.evaluation import run as evaluation_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Path:
    return tiny_run.run_directory(tmp_path / "runs" / "tiny", tiny_run.config(corpus))


def call(*arguments: object) -> int:
    return cli.main(["evaluate", *map(str, arguments)])


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "step-00000001"


def test_a_folder_that_is_no_published_checkpoint_ends_with_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint_of(run) / "COMMITTED").unlink()
    assert call(checkpoint_of(run), "--spec", tiny_run.spec_file(tmp_path)) == 2
    assert "holds no COMMITTED file" in capsys.readouterr().err
    assert call(run, "--spec", tiny_run.spec_file(tmp_path)) == 2  # the run has no published one
    assert not (run / "evals").exists()


def test_a_committed_hash_of_another_manifest_ends_with_70(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint_of(run) / "COMMITTED").write_text(f"{'0' * 64}  manifest.json\n")
    assert call(checkpoint_of(run), "--spec", tiny_run.spec_file(tmp_path)) == 70
    assert "manifest.json" in capsys.readouterr().err
    assert not (run / "evals").exists()


def test_a_damaged_document_ends_with_70(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tiny_run.corpus(tmp_path / "damaged")
    run = tiny_run.run_directory(tmp_path / "runs" / "tiny", tiny_run.config(corpus))
    entry = Manifest.load(corpus).document("t/b.txt")
    shard = corpus / entry.shard
    content = bytearray(shard.read_bytes())
    content[entry.offset + 5] ^= 1
    shard.write_bytes(content)
    assert call(run, "--spec", tiny_run.spec_file(tmp_path)) == 70
    assert shard.name in capsys.readouterr().err
    assert not list((run / "evals").iterdir())


def test_a_place_that_cannot_be_written_is_found_before_anything_is_computed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_run, "Scorer", None)  # would be a TypeError
    (tmp_path / "file").touch()
    assert call(run, "--spec", tiny_run.spec_file(tmp_path), "--out", tmp_path / "file" / "evals") == 1
    assert "cannot be written" in capsys.readouterr().err

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluation_run.os, "posix_fallocate", full)
    assert call(run, "--spec", tiny_run.spec_file(tmp_path)) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message and "--out" in message and "Traceback" not in message
    assert not list((run / "evals").iterdir())


def test_all_problems_of_a_spec_are_listed_at_once(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tiny_run.spec_file(tmp_path, stride_token=3, precision="fp8", stride_share=0.9)
    assert call(run, "--spec", spec) == 2
    message = capsys.readouterr().err
    assert "3 problems" in message and "Did you mean stride_tokens?" in message
    assert "precision = 'fp8'" in message and "stride_share = 0.9" in message


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "two words", "a\n", "x" * 65])
@pytest.mark.parametrize("kind", [{}, {"kind": "synthetic", "suite": "parity"}], ids=["length", "task"])
def test_a_name_that_is_a_path_or_nothing_ends_with_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: dict[str, str]
) -> None:
    raw = {"name": name, **(kind or {"context_tokens": [8, 64]})}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(raw))
    assert call(run, "--spec", tmp_path / "spec.yaml") == 2
    message = capsys.readouterr().err
    assert f"name = {name!r}" in message and "use 1 to 64 letters, digits, `.`, `_` and `-`" in message
    assert not (run / "evals").exists()
