"""Documents from packages of pip, npm and Debian: archives, forms, pins, what goes wrong."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from longspan.data_pipeline.source_config import PackagesConfig
from longspan.data_pipeline.sources.formats import html_text, r_texts
from longspan.data_pipeline.sources.packages import read_packages
from longspan.data_pipeline.sources.text import SourceDocument
from longspan.errors import DataError, UsageError

SUFFIX = {"pypi": ".whl", "npm": ".tgz", "debian": ".deb"}


def archive_bytes(registry: str, files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    if registry == "pypi":
        with zipfile.ZipFile(buffer, "w") as wheel:
            for name, data in files.items():
                wheel.writestr(name, data)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:xz" if registry == "debian" else "w:gz") as tar:
        for name, data in files.items():
            item = tarfile.TarInfo(f"./{name}")
            item.size = len(data)
            tar.addfile(item, io.BytesIO(data))
    if registry == "npm":
        return buffer.getvalue()
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": buffer.getvalue()}
    parts = [f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
             for name, data in members.items()]  # fmt: skip
    return b"!<arch>\n" + b"".join(parts)


def put(cache: Path, registry: str, name: str, files: dict[str, bytes]) -> None:
    folder = cache / registry / f"{name}==1"
    folder.mkdir(parents=True)
    (folder / f"{name}{SUFFIX[registry]}").write_bytes(archive_bytes(registry, files))


def config(registry: str, names: list[str], **settings: Any) -> PackagesConfig:
    given = {"form": "repository", "include": ["*.py"], **settings}
    listed = [{"name": name, "version": "1"} for name in names]
    return PackagesConfig(kind="packages", name="code", registry=registry, packages=listed, **given)  # type: ignore[arg-type]


def read(config: PackagesConfig, cache: Path) -> tuple[list[SourceDocument], tuple[str, ...]]:
    """Documents and notes; the notes are complete once the documents are read."""
    text = read_packages(config, cache)
    return list(text.documents), text.notes


@pytest.mark.parametrize("registry", ["pypi", "npm", "debian"])
def test_a_repository_is_one_document_in_natural_order(registry: str, tmp_path: Path) -> None:
    files = {
        "a/x10.py": b"ten\r\n",
        "a/x2.py": b"two\n\n",
        "a/y.c": b"no",
        "a/tests/z.py": b"no",
        "a/long.py": b"9" * 99,
    }
    put(tmp_path, registry, "one", files)
    found, notes = read(config(registry, ["one"], exclude=["*/tests/*"], max_file_bytes=50), tmp_path)
    assert notes[-1] == "source code: left out 1 files of more than 50 bytes, e.g. a/long.py"
    assert [(d.name, d.text) for d in found] == [("one", b"# file: a/x2.py\ntwo\n\n# file: a/x10.py\nten\n")]


def test_files_that_repeat_are_left_out_across_packages(tmp_path: Path) -> None:
    put(tmp_path, "pypi", "one", {"a.py": b"shared", "b.py": b"own"})
    put(tmp_path, "pypi", "two", {"a.py": b"shared", "c.py": b"other"})
    found, notes = read(config("pypi", ["one", "two"], form="files"), tmp_path)
    assert notes[-1] == "source code: left out 1 files whose text occurred before, e.g. a.py"
    assert [d.name for d in found] == ["one/a", "one/b", "two/c"]


def test_a_pin_is_printed_and_checked(tmp_path: Path) -> None:
    put(tmp_path, "pypi", "one", {"a.py": b"text"})
    unpinned = config("pypi", ["one"])
    digest = read(unpinned, tmp_path)[1][-1].rsplit(" ", 1)[1]
    raw = unpinned.model_dump()
    raw["packages"] = [{"name": "one", "version": "1", "sha256": digest}]
    assert not read(PackagesConfig(**raw), tmp_path)[1]
    raw["packages"] = [{"name": "one", "version": "1", "sha256": "0" * 64}]
    with pytest.raises(DataError, match=r"one 1 changed upstream: .* the recipe expects 0000"):
        read(PackagesConfig(**raw), tmp_path)
    documents, notes = read(PackagesConfig(**{**raw, "changed_upstream": "note"}), tmp_path)
    assert len(documents) == 1
    assert f"changed upstream: its documents have sha256 {digest}" in notes[0]


def test_forms_and_formats(tmp_path: Path) -> None:
    put(tmp_path, "npm", "book", {"c2.json": json.dumps({"text": "Two"}).encode(), "c1.json": b'{"text": "One"}'})
    put(tmp_path, "debian", "page", {"p.html.gz": gzip.compress(b"<head>x</head><p>A &amp; B</p><p>C</p>")})
    book = config("npm", ["book"], form="book", format="json", include=["*.json"])
    page = config("debian", ["page"], form="files", format="html", include=["*.html"])
    assert read(book, tmp_path)[0][0].text == b"One\n\nTwo\n"
    assert [(d.name, d.text) for d in read(page, tmp_path)[0]] == [("p", b"A & B\nC\n")]


def test_text_of_a_page_and_of_r_data() -> None:
    assert html_text(b"<style>a</style><h1>T</h1>\n\n\n<p>one  two<br>three</p>") == "T\n\none two\nthree"
    strings = b"".join(struct.pack(">Ii", 0x00040009, len(s)) + s for s in (b"EMMA", b"", b"by"))
    record = b"X\n" + struct.pack(">Ii", 16, 3) + strings
    data = b"".join(struct.pack(">I", len(record)) + zlib.compress(record) for _ in range(2))
    assert r_texts(data) == ["EMMA\n\nby"] * 2


def test_files_that_are_not_utf8_are_noted(tmp_path: Path) -> None:
    put(tmp_path, "pypi", "one", {"a.py": b"\xff", "b.py": b"text"})
    found, notes = read(config("pypi", ["one"]), tmp_path)
    assert b"b.py" in found[0].text
    assert "left out a.py" in notes[0]


def test_nothing_matches(tmp_path: Path) -> None:
    put(tmp_path, "pypi", "one", {"a.c": b"text"})
    with pytest.raises(UsageError, match="no document of 1 bytes"):
        read(config("pypi", ["one"]), tmp_path)


def test_a_damaged_archive(tmp_path: Path) -> None:
    put(tmp_path, "debian", "one", {"a.py": b"text"})
    file = next((tmp_path / "debian" / "one==1").iterdir())
    file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(DataError, match="not a readable archive"):
        read(config("debian", ["one"]), tmp_path)


def test_a_client_that_is_missing_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))
    with pytest.raises(UsageError, match="needs the command apt-get"):
        read_packages(config("debian", ["one"]), tmp_path)
    client = commands / "npm"
    client.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    client.chmod(0o755)
    with pytest.raises(UsageError, match="cannot be fetched: no such package"):
        read_packages(config("npm", ["one"]), tmp_path)


def test_a_debian_version_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands, cache = tmp_path / "commands", tmp_path / "cache"
    commands.mkdir()
    put(tmp_path, "debian", "present", {"a.py": b"text"})
    present = tmp_path / "debian" / "present==1" / "present.deb"
    client = commands / "apt-get"  # knows no version but the present one
    client.write_text(f'#!/bin/sh\ncase "$3" in *=*) exit 100;; esac\n/bin/cp {present} one_2.deb\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(commands))
    with pytest.raises(UsageError, match="Debian keeps only the newest"):
        read(config("debian", ["one"]), cache)
    documents, notes = read(config("debian", ["one"], changed_upstream="note"), cache)
    assert [document.name for document in documents] == ["one"]
    assert notes[0] == "source code: one 1 is gone upstream; the present version was taken"


def test_cleaning_rules_see_each_file(tmp_path: Path) -> None:
    files = {"a.py": b"# Copyright 2020 A\nx = 1\n", "b_pb2.py": b"y = 1\n", "c.py": b"caf\xe9 = 1\n"}
    put(tmp_path, "pypi", "one", files)
    found, notes = read(config("pypi", ["one"], clean=["licence_header", "generated", "encoding"]), tmp_path)
    assert found[0].text == "# file: a.py\nx = 1\n\n# file: c.py\ncafé = 1\n".encode()
    assert "source code: left out 1 files by the rule `generated`, e.g. b_pb2.py" in notes
