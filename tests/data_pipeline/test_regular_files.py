"""A named pipe or a device where a file should be is refused at once, wherever a path is read."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from packed_corpora import pack, small_bpe

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.regular_files import open_regular, read_regular
from longspan.data_pipeline.source_config import FolderConfig, JsonLinesConfig
from longspan.data_pipeline.sources.registry import open_source
from longspan.data_pipeline.tokenization import load_tokenizer, make_tokenizer
from longspan.data_pipeline.tokenization.config import HuggingFaceTokenizerConfig, SentencePieceTokenizerConfig
from longspan.data_pipeline.verify import verify_corpus
from longspan.errors import DataError, LongspanError, UsageError
from longspan.trainer.cli import main


@pytest.fixture(autouse=True)
def _no_waiting():
    """What waits for a pipe ends with an error instead of never."""

    def stop(number, frame):
        raise AssertionError("a pipe was waited for")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["pipe", "link to a pipe", "device", "folder"])
def spoil(request, tmp_path):
    """Puts something else in the place of a file."""

    def put(file: Path) -> Path:
        file.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(file)
        elif request.param == "link to a pipe":
            os.mkfifo(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
        elif request.param == "device":
            file.symlink_to("/dev/zero")
        else:
            file.mkdir()
        return file

    return put


def test_only_files_are_opened(tmp_path, spoil):
    with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
        open_regular(spoil(tmp_path / "file"))
    (tmp_path / "real").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_regular(tmp_path / "link") == b"content"
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none")


def test_a_manifest_that_is_no_file(tmp_path, spoil, capsys):
    corpus = pack(tmp_path / "corpus")
    spoil(corpus.folder / "manifest.json")
    with pytest.raises(DataError, match=r"manifest.json is not readable: .*(not a regular file|Is a directory)"):
        Manifest.load(corpus.folder)
    for command in (["verify"], ["inspect"], ["split", "--out", str(tmp_path / "new"), "--sources", "poems"]):
        assert main(["data", command[0], str(corpus.folder), *command[1:]]) == 70
    assert capsys.readouterr().err.count("is not readable") == 3


def test_a_shard_that_is_no_file(tmp_path, spoil):
    corpus = pack(tmp_path / "corpus")
    entry = corpus.manifest.split("train")[0]
    spoil(corpus.folder / entry.shard)
    with pytest.raises(LongspanError, match=entry.shard):
        DocumentReader(corpus.manifest).tokens(entry)
    with pytest.raises(DataError, match=entry.shard):
        verify_corpus(corpus.folder)


@pytest.mark.parametrize("name", ["description.json", "tokenizer.json"])
def test_a_tokenizer_that_is_no_file(tmp_path, spoil, name):
    corpus = pack(tmp_path / "corpus", tokenizer=small_bpe())
    spoil(corpus.folder / "tokenizer" / name)
    with pytest.raises(UsageError, match=name):
        load_tokenizer(corpus.folder / "tokenizer")


def test_a_tokenizer_of_others_that_is_no_file(tmp_path, spoil):
    spoil(tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match=r"no Hugging Face tokenizer at"):
        make_tokenizer(HuggingFaceTokenizerConfig(kind="hugging_face", path=str(tmp_path)), [])
    config = SentencePieceTokenizerConfig(kind="sentencepiece", path=str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="SentencePiece"):
        make_tokenizer(config, [])


def test_sources_that_are_no_files(tmp_path, spoil):
    root = tmp_path / "texts"
    root.mkdir()
    (root / "a.txt").write_text("a text")
    spoil(root / "b.txt")
    config = FolderConfig(name="texts", kind="folder", path=str(root), pattern="*.txt", licence="none")
    assert [document.name for document in open_source(config).documents] == ["a.txt"]
    rows = JsonLinesConfig(name="rows", kind="jsonl", paths=[str(root / "b.txt")], licence="none")
    with pytest.raises(UsageError, match="source rows: "):
        list(open_source(rows).documents)


def test_a_list_of_held_out_documents_that_is_no_file(tmp_path, spoil, capsys):
    corpus = pack(tmp_path / "corpus")
    ids = spoil(tmp_path / "ids")
    out = str(tmp_path / "new")
    assert main(["data", "split", str(corpus.folder), "--out", out, "--hold-out", str(ids)]) == 2
    assert "no readable file of ids" in capsys.readouterr().err
    assert not Path(out).exists()


def test_a_build_does_not_wait_for_what_is_in_its_place(tmp_path, spoil, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text that is long enough")
    source = f"{{name: texts, kind: folder, path: {tmp_path / 'texts'}, licence: none}}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: small\nsources: [{source}]\n")
    out = tmp_path / "out"
    assert main(["data", "build", str(recipe), "--out", str(out)]) == 0, capsys.readouterr().err
    spoil(out / "manifest.json")
    assert main(["data", "build", str(recipe), "--out", str(out)]) == 2
    assert "is not just a corpus that Longspan wrote" in capsys.readouterr().err
    shutil.rmtree(out)
