"""Rows as documents: jsonl, Parquet, data sets of Hugging Face, WebDataset shards."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.data_pipeline.source_config import (
    HuggingFaceConfig,
    JsonLinesConfig,
    ParquetConfig,
    WebDatasetConfig,
)
from longspan.data_pipeline.sources.registry import open_source
from longspan.errors import UsageError

BOOKS = [
    {"short_book_title": "Emma", "publication_date": 1815, "text": "Emma Woodhouse\n", "meta": {"by": "Austen"}},
    {"short_book_title": "Moby", "publication_date": 1851, "text": "Call me Ishmael\n", "meta": {"by": "Melville"}},
]
# rows of files, repositories mixed
CODE = [
    {"repo": "b/two", "path": "x10.py", "content": "ten", "licenses": ["MIT", "BSD"]},
    {"repo": "a/one", "path": "y.py", "content": "y", "licenses": []},
    {"repo": "b/two", "path": "x9.py", "content": "nine", "licenses": ["MIT"]},
    {"repo": "b/two", "path": "z_pb2.py", "content": "z", "licenses": ["MIT"]},
]
STACK = {
    "text_field": "content",
    "repository_field": "repo",
    "path_field": "path",
    "licence_field": "licenses",
    "clean": ("generated",),
}
REPOSITORIES = [
    ("a/one", b"# file: y.py\ny\n", None),
    ("b/two", b"# file: x9.py\nnine\n\n# file: x10.py\nten\n", "BSD, MIT"),
]


def read(config: Any) -> tuple[list[tuple[str, bytes, str | None]], tuple[str, ...]]:
    text = open_source(config)
    return [(document.name, document.text, document.licence) for document in text.documents], text.notes


def jsonl(*paths: Path | str, **settings: Any) -> JsonLinesConfig:
    return JsonLinesConfig(kind="jsonl", name="rows", paths=tuple(map(str, paths)), **settings)


def parquet(*paths: Path | str, **settings: Any) -> ParquetConfig:
    return ParquetConfig(kind="parquet", name="rows", paths=tuple(map(str, paths)), **settings)


def hugging_face(dataset: Path | str, **settings: Any) -> HuggingFaceConfig:
    return HuggingFaceConfig(kind="hugging_face", name="rows", dataset=str(dataset), **settings)


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_table(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1)
    return file


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_json_lines_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    plain = write_lines(tmp_path / "plain", BOOKS).read_bytes()
    file = tmp_path / f"books.jsonl{suffix}"
    file.write_bytes(PACKERS[suffix](b"\xef\xbb\xbf" + plain.replace(b"\n", b"\n\n")))
    assert read(jsonl(file))[0] == [("books/1", b"Emma Woodhouse\n", None), ("books/3", b"Call me Ishmael\n", None)]
    by_title = jsonl(file, id_field="short_book_title", licence_field="meta.by")
    assert [(name, licence) for name, _, licence in read(by_title)[0]] == [("Emma", "Austen"), ("Moby", "Melville")]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_cut_and_misnamed_json_lines(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": os.urandom(900).hex()} for _ in range(9)]
    plain = write_lines(tmp_path / "plain", rows).read_bytes()
    file = tmp_path / f"books.jsonl{suffix}"
    for data in (PACKERS[suffix](plain)[:-40], plain, b""):
        file.write_bytes(data)
        with pytest.raises(UsageError, match=rf"source rows: .*books\.jsonl{suffix} cannot be read: "):
            read(jsonl(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"books\.jsonl, line 2: not JSON: "),
        (b'{"text": "\xff"}', r"books\.jsonl, line 2: not JSON: "),
        (b'["text"]', r"books\.jsonl, line 2: holds list, not an object"),
        (b'{"txt": "a"}', r"books\.jsonl, line 2: no field text\. Did you mean txt\? There are: txt\."),
        (b'{"text": 5}', r"books\.jsonl, line 2: the field text holds int, not text"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "books.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UsageError, match=f"^source rows: .*{message}"):
        read(jsonl(file))


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": null}\n{"text": "\\ud800"}\n{"text": ""}\n{"text": "a"}\n')
    found, notes = read(jsonl(file))
    assert found == [("x/4", b"a", None)]
    assert notes == (
        f"source rows: left out 1 rows whose text is null, e.g. {file}, line 1",
        f"source rows: left out 1 rows with half of a surrogate pair, e.g. {file}, line 2",
        "source rows: left out 1 documents without text, e.g. x/3",
    )


def test_a_field_inside_one_that_is_null_is_null(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(
        '{"text": "a", "meta": null}\n{"text": "b", "meta": {"licence": "MIT"}}\n{"text": "c", "meta": {}}\n'
    )
    table = tmp_path / "x.parquet"
    write_table(table, [{"text": "a", "meta": None}, {"text": "b", "meta": {"licence": "MIT"}}])
    nested = {"licence_field": "meta.licence"}
    assert read(parquet(table, **nested))[0] == [("x/1", b"a", None), ("x/2", b"b", "MIT")]
    with pytest.raises(UsageError, match=r"line 3: no field meta\.licence"):
        read(jsonl(file, **nested))
    with pytest.raises(UsageError, match=r"row 1: the field meta\.licence = None cannot name a document"):
        read(parquet(table, id_field="meta.licence"))


@pytest.mark.parametrize("identity", ['""', "null", "1.5", "true", '"\\ud800"'])
def test_ids_that_name_nothing(tmp_path: Path, identity: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a", "id": ' + identity + "}\n")
    with pytest.raises(UsageError, match=r"line 1: the field id = .* cannot name a document"):
        read(jsonl(file, id_field="id"))


def test_two_rows_of_one_id(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "x.jsonl", [{"text": "a", "id": 7}, {"text": "b", "id": 7}])
    with pytest.raises(UsageError, match="source rows: two documents are named 7"):
        read(jsonl(file, id_field="id"))


def test_rows_of_files_become_repositories(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "code.jsonl", [*CODE, {**CODE[0], "repo": None}])
    found, notes = read(jsonl(lines, **STACK))
    assert found == REPOSITORIES
    assert notes == (
        "source rows: left out 1 files by the rule `generated`, e.g. z_pb2.py",
        f"source rows: left out 1 rows without a repository, e.g. {lines}, line 5",
    )
    assert read(parquet(write_table(tmp_path / "code.parquet", CODE), **STACK))[0] == REPOSITORIES
    (tmp_path / "cut.jsonl").write_text(json.dumps(CODE[0]) + "\n{")
    with pytest.raises(UsageError, match=r"cut\.jsonl, line 2: not JSON"):
        read(jsonl(tmp_path / "cut.jsonl", **STACK))
    backwards = write_table(tmp_path / "backwards.parquet", CODE[::-1])
    assert [name for name, _, _ in read(parquet(backwards, **STACK))[0]] == ["a/one", "b/two"]


def test_fields_that_belong_together() -> None:
    with pytest.raises(ValueError, match="repository_field and path_field go together"):
        jsonl("x", repository_field="repo")
    with pytest.raises(ValueError, match="take off id_field"):
        jsonl("x", repository_field="repo", path_field="path", id_field="id")


def test_parquet_rows_in_order_and_only_the_columns_asked_for(tmp_path: Path) -> None:
    for number in (1, 2):
        write_table(tmp_path / f"part-{number}.parquet", BOOKS)
    found, _ = read(parquet(tmp_path / "part-*.parquet", licence_field="meta.by"))
    assert [(name, licence) for name, _, licence in found] == [
        ("part-1/1", "Austen"),
        ("part-1/2", "Melville"),
        ("part-2/1", "Austen"),
        ("part-2/2", "Melville"),
    ]


def test_parquet_files_that_lack_columns_or_are_none(tmp_path: Path) -> None:
    file = write_table(tmp_path / "x.parquet", BOOKS)
    with pytest.raises(UsageError, match=r"no column txt\. Did you mean text\? .*; no column id"):
        open_source(parquet(file, text_field="txt", id_field="id"))
    data = file.read_bytes()
    for damaged in (data[:-60], data[:40], b"<html>", b""):
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"x\.parquet is no whole Parquet file"):
            open_source(parquet(file))
    file.write_bytes(data[:4] + bytes(40) + data[44:])  # a page of the first column
    assert len(read(parquet(file))[0]) == 2  # which is not read
    with pytest.raises(UsageError, match=r"x\.parquet"):
        read(parquet(file, id_field="short_book_title"))
    latin = pa.array([b"caf\xe9"]).view(pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": latin}), file)
    with pytest.raises(UsageError, match=r"x\.parquet is no whole Parquet file: 'utf-8' codec can't decode"):
        read(parquet(file))


def test_pg19_style_data_set(tmp_path: Path) -> None:
    write_table(tmp_path / "data" / "train-00000-of-00001.parquet", BOOKS)
    write_table(tmp_path / "data" / "test-00000-of-00001.parquet", BOOKS[:1])
    found, _ = read(hugging_face(tmp_path, id_field="short_book_title", clean=("gutenberg",)))
    assert [(name, text) for name, text, _ in found] == [("Emma", b"Emma Woodhouse\n"), ("Moby", b"Call me Ishmael\n")]
    test = open_source(hugging_face(tmp_path, split="test"))
    assert [document.name for document in test.documents] == ["0"]
    assert test.origin == f"{tmp_path}, split test"


def test_proof_pile_style_data_set(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        rows = [{"text": f"\\begin{{proof}} {split} {i}", "meta": {"file": f"{i}.tex"}} for i in range(3)]
        with gzip.open(tmp_path / f"proofpile_{split}.jsonl.gz", "wt") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = read(hugging_face(tmp_path, split="validation", id_field="meta.file"))
    assert [name for name, _, _ in found] == ["0.tex", "1.tex", "2.tex"]
    assert found[0][1] == b"\\begin{proof} validation 0"


def test_stack_style_data_set(tmp_path: Path) -> None:
    write_table(tmp_path / "data" / "python" / "train-00000-of-00002.parquet", CODE[:2])
    write_table(tmp_path / "data" / "python" / "train-00001-of-00002.parquet", CODE[2:])
    write_table(tmp_path / "data" / "go" / "train-00000-of-00001.parquet", CODE[:1])
    assert read(hugging_face(tmp_path, data_dir="data/python", **STACK))[0] == REPOSITORIES


def test_data_sets_that_cannot_be_loaded(tmp_path: Path) -> None:
    write_table(tmp_path / "data" / "train-00000-of-00001.parquet", BOOKS)
    with pytest.raises(UsageError, match=r"no column txt\. Did you mean text\?"):
        open_source(hugging_face(tmp_path, text_field="txt"))
    with pytest.raises(UsageError, match=r"source rows: .* cannot be loaded: .*nosuch"):
        open_source(hugging_face(tmp_path, split="nosuch"))
    with pytest.raises(UsageError, match="no folder at /no/such"):
        open_source(hugging_face("/no/such"))
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(UsageError, match="cannot be loaded"):
        read(hugging_face(tmp_path))


def test_a_hub_that_does_not_answer() -> None:
    """In a process of its own: the package reads the hub's address when it is imported."""
    code = (
        "from longspan.data_pipeline.source_config import HuggingFaceConfig as C\n"
        "from longspan.data_pipeline.sources.registry import open_source\n"
        "from longspan.errors import UsageError\n"
        "try:\n    open_source(C(kind='hugging_face', name='rows', dataset='owner/name'))\n"
        "except UsageError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("source rows: owner/name cannot be loaded: "), done.stderr[-2000:]


def shard(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            archive.addfile(item, io.BytesIO(data))
    return file


class Explosive:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (3,))


def webdataset(*paths: Path, **settings: Any) -> WebDatasetConfig:
    return WebDatasetConfig(kind="webdataset", name="rows", paths=tuple(map(str, paths)), **settings)


def test_shards_in_key_order_and_no_pickle_is_touched(tmp_path: Path) -> None:
    poison = __import__("pickle").dumps(Explosive())
    one = {"b/1.txt": b"one", "b/1.json": b"{}", "a.json": b"{}", "a.pyd": poison, "c.cls": b"1", "c.seg.txt": b"no"}
    shard(tmp_path / "s-0.tar", one)
    shard(tmp_path / "s-1.tar", {"d.pickle": poison, "d.txt": b"four"})
    found, notes = read(webdataset(tmp_path / "s-*.tar"))
    assert [(name, text) for name, text, _ in found] == [("b/1", b"one"), ("d", b"four")]
    assert notes == ("source rows: left out 2 samples without a member .txt, e.g. a",)


def test_shards_whose_text_is_json(tmp_path: Path) -> None:
    file = shard(tmp_path / "s.tar", {"x.json": b'{"body": "text"}', "y.json": b"[]"})
    with pytest.raises(UsageError, match=r"s\.tar, sample x: no text in the field text\. There are: body"):
        read(webdataset(file, text_member="json"))
    with pytest.raises(UsageError, match=r"s\.tar, sample y: no text in the field body\. There are: list"):
        read(webdataset(file, text_member="json", text_field="body"))
    with pytest.raises(UsageError, match=r"no member ends in \.txt\. Set the source's `text_member`"):
        read(webdataset(file))
    nothing = {"a.json": b'{"body": null}', "b.json": b'{"body": "\\ud800"}'}
    shard(file, {"x.json": b'{"body": "text"}', **nothing})
    found, notes = read(webdataset(file, text_member="json", text_field="body"))
    assert found == [("x", b"text", None)]
    assert notes == (
        "source rows: left out 1 samples whose text is null, e.g. a",
        "source rows: left out 1 samples with half of a surrogate pair, e.g. b",
    )


def test_every_kind_of_source_is_a_recipe() -> None:
    raw = [
        {"kind": "jsonl", "name": "a", "paths": ["a.jsonl"]},
        {"kind": "parquet", "name": "b", "paths": ["a.parquet"]},
        {"kind": "hugging_face", "name": "c", "dataset": "deepmind/pg19"},
        {"kind": "webdataset", "name": "d", "paths": ["a.tar"]},
        {"kind": "archive", "name": "e", "paths": ["a.zip"]},
        {"kind": "arxiv", "name": "f", "paths": ["papers"]},
        {"kind": "long_range_arena", "name": "g", "task": "listops", "path": "lra"},
    ]
    config = CorpusConfig.model_validate({"name": "x", "sources": raw})
    assert [source.kind for source in config.sources] == [item["kind"] for item in raw]


def test_without_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UsageError, match=r"source rows: .* need the package datasets: `pip install 'longspan\[data\]'`"
    ):
        open_source(hugging_face("deepmind/pg19"))
