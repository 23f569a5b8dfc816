"""Folders and archives as sources: forms, order, links, damage, and what every source checks."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from longspan.data_pipeline.source_config import ArchiveConfig, FolderConfig
from longspan.data_pipeline.sources.grouping import (
    SourceFile,
    file_header,
    group_of,
    join_files,
    joined_groups,
    natural,
    sorted_groups,
)
from longspan.data_pipeline.sources.registry import open_source
from longspan.data_pipeline.sources.tally import Tally
from longspan.errors import UsageError
from tests.data_pipeline.source_files import folder, tar_bytes, zip_bytes

FILES = {
    "one/b10.py": b"ten\n",
    "one/b2.py": b"two\n\n",
    "two/sub/a.py": b"sub",
    "README.py": b"above",
    "one/c.bin": b"\x00" * 99,
}


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".tar": bytes,
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
    ".tar.zst": lambda data: zstandard.compress(data[:700]) + zstandard.compress(data[700:]),  # two frames
}


def documents(config: Any) -> tuple[list[tuple[str, bytes]], tuple[str, ...]]:
    text = open_source(config)
    return [(document.name, document.text) for document in text.documents], text.notes


def archive(*paths: Path, **settings: Any) -> ArchiveConfig:
    return ArchiveConfig(
        kind="archive", name="code", paths=tuple(map(str, paths)), **{"include": ("*.py",), **settings}
    )


def local(path: Path, **settings: Any) -> FolderConfig:
    return FolderConfig(kind="folder", name="code", path=str(path), **{"pattern": "**/*.py", **settings})


REPOSITORIES = [("one", b"# file: b2.py\ntwo\n\n# file: b10.py\nten\n"), ("two", b"# file: sub/a.py\nsub\n")]


def test_a_folder_of_repositories(tmp_path: Path) -> None:
    found, notes = documents(local(folder(tmp_path, FILES), form="repository"))
    assert found == REPOSITORIES
    assert notes == ("source code: left out 1 files above the folders that are repositories, e.g. README.py",)


@pytest.mark.parametrize("suffix", [".zip", *PACKERS])
def test_repositories_in_archives_are_those_of_a_folder(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"code{suffix}"
    file.write_bytes(zip_bytes(FILES) if suffix == ".zip" else PACKERS[suffix](tar_bytes(FILES)))
    assert documents(archive(file, form="repository"))[0] == REPOSITORIES


def test_files_and_books(tmp_path: Path) -> None:
    file = tmp_path / "code.zip"
    file.write_bytes(zip_bytes(FILES))
    names = ["one/b10.py", "one/b2.py", "two/sub/a.py", "README.py"]
    assert documents(archive(file))[0] == [(name, FILES[name]) for name in names]  # in the archive's order
    in_folder = documents(local(folder(tmp_path / "f", FILES)))[0]
    assert in_folder == [(name, FILES[name]) for name in sorted(names)]
    book = documents(local(tmp_path / "f", form="book", pattern="one/*.py"))[0]
    assert book == [("one", b"two\n\nten\n")]
    whole = documents(archive(file, form="repository", repository_depth=0, include=("one/*.py",)))[0]
    assert whole == [("code", b"# file: one/b2.py\ntwo\n\n# file: one/b10.py\nten\n")]


def test_several_archives_put_their_name_first(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / f"{name}.zip").write_bytes(zip_bytes({"r/a.py": name.encode()}))
    assert documents(archive(tmp_path / "*.zip"))[0] == [("x/r/a.py", b"x"), ("y/r/a.py", b"y")]
    assert [name for name, _ in documents(archive(tmp_path, form="repository"))[0]] == ["x/r", "y/r"]
    whole = documents(archive(tmp_path, form="repository", repository_depth=0))[0]
    assert whole == [("x", b"# file: r/a.py\nx\n"), ("y", b"# file: r/a.py\ny\n")]


def test_nothing_behind_links_or_outside_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.py"
    secret.write_bytes(b"secret")
    root = folder(tmp_path / "f", {"a.py": b"a"})
    os.symlink(secret, root / "link.py")
    os.symlink(tmp_path, root / "up")
    found, notes = documents(local(root, pattern="*/*.py"[2:]))
    assert found == [("a.py", b"a")]
    assert notes == ("source code: left out 1 links, e.g. link.py",)
    assert documents(local(root, pattern="**/*.py"))[0] == [("a.py", b"a")]
    with pytest.raises(UsageError, match=r"no file in .* matches \*/\*\.py"):
        documents(local(root, pattern="*/*.py"))
    tar = tmp_path / "x.tar"
    tar.write_bytes(tar_bytes({"a.py": b"a", "../b.py": b"b", "/c.py": b"c"}, ("d.py", str(secret))))
    found, notes = documents(archive(tar))
    assert found == [("a.py", b"a")]
    assert notes == (
        "source code: left out 2 paths that leave their archive, e.g. ../b.py",
        "source code: left out 1 links, e.g. d.py",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "secret.py", "x.tar"]  # nothing was unpacked


def test_long_excluded_and_undecodable_files_are_left_out_and_counted(tmp_path: Path) -> None:
    files = {
        "a.py": b"a",
        "long.py": b"9" * 99,
        "odd.py": b"caf\xe9",
        "tests/t.py": b"t",
        "m_pb2.py": b"x",
        "e.py": b"",
    }
    (tmp_path / "x.zip").write_bytes(zip_bytes(files))
    settings: dict[str, Any] = {"max_file_bytes": 50, "exclude": ("tests/*",)}
    found, notes = documents(archive(tmp_path / "x.zip", clean=("generated",), **settings))
    assert found == [("a.py", b"a")]
    assert notes == (
        "source code: left out 1 files of more than 50 bytes, e.g. long.py",
        "source code: left out 1 files that are not UTF-8 (the rule `encoding` repairs them), e.g. odd.py",
        "source code: left out 1 files by the rule `generated`, e.g. m_pb2.py",
        "source code: left out 1 documents without text, e.g. e.py",
    )
    found, notes = documents(local(folder(tmp_path / "f", files), clean=("encoding", "generated"), **settings))
    assert found == [("a.py", b"a"), ("odd.py", "café".encode())]


@pytest.mark.parametrize("suffix", [".zip", *PACKERS])
def test_cut_archives_are_errors_that_name_them(tmp_path: Path, suffix: str) -> None:
    files = {f"{number}.py": os.urandom(700).hex().encode() for number in range(8)}
    data = zip_bytes(files) if suffix == ".zip" else PACKERS[suffix](tar_bytes(files))
    file = tmp_path / f"code{suffix}"
    for size in (len(data) - len(data) // 3, 0):
        file.write_bytes(data[:size])
        with pytest.raises(UsageError, match=f"source code: .*code{suffix} cannot be read: ") as caught:
            documents(archive(file))
        assert "Fetch it again" in str(caught.value)


def test_a_tar_cut_between_members_is_seen(tmp_path: Path) -> None:
    (tmp_path / "code.tar").write_bytes(tar_bytes({"a.py": b"a", "b.py": b"b"})[:1024])
    with pytest.raises(UsageError, match="no end mark"):
        documents(archive(tmp_path / "code.tar"))


@pytest.mark.parametrize("name", ["x.tar.gz", "x.zip", "x.tar.zst", "x.tar", "x.deb"])
def test_a_page_that_is_called_an_archive(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<html>not found</html>" * 50)
    with pytest.raises(UsageError, match=f"{name} cannot be read"):
        documents(archive(tmp_path / name))


def test_an_encrypted_zip(tmp_path: Path) -> None:
    data = bytearray(zip_bytes({"a.py": b"text"}))
    data[6] |= 1  # the flag in the local header and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(UsageError, match=r"a\.py in it is encrypted"):
        documents(archive(tmp_path / "x.zip"))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["gone.zip"], "no file at gone.zip"),
        (["fifo"], "fifo is no file"),
        (["*.tar"], r"nothing matches \*\.tar"),
        (["x.zip", "x.*"], r"x\.zip is listed twice"),
        (["pipe:cat x"], "sources run no commands"),
        (["simplecache::http://x/y.zip"], "chain no stores"),
        (["nosuch://x/y.zip"], "nosuch"),
        (["http://x/*.zip"], "a web server lists no files"),
    ],
)
def test_paths_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.zip").write_bytes(zip_bytes({"a.py": b"a"}))
    os.mkfifo("fifo")
    with pytest.raises(UsageError, match=f"^source code: .*{message}"):
        documents(ArchiveConfig(kind="archive", name="code", paths=tuple(paths)))


def test_zero_documents_say_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zip_bytes({"a.py": b"a" * 60, "b.py": b" \n"}))
    with pytest.raises(UsageError) as caught:
        documents(archive(tmp_path / "x.zip", max_file_bytes=50))
    assert str(caught.value) == (
        "source code: no document is left; left out: 1 files of more than 50 bytes, e.g. a.py; 1 documents without "
        "text, e.g. b.py. Check the source's path and pattern, or take rules off `clean`."
    )
    with pytest.raises(UsageError, match="no document is left; there was nothing in it"):
        documents(archive(tmp_path / "x.zip", include=("*.c",)))
    with pytest.raises(UsageError, match="documents of less than 99 bytes"):
        documents(archive(tmp_path / "x.zip", min_document_bytes=99))


def test_two_documents_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as twice, pytest.warns(UserWarning, match="Duplicate name"):
        twice.writestr("a.py", "first")
        twice.writestr("a.py", "second")
    with pytest.raises(UsageError, match=r"source code: two documents are named a\.py"):
        documents(archive(tmp_path / "x.zip"))


def test_groups_from_files_in_any_order() -> None:
    files = [
        SourceFile("z", "b", b"zb", "MIT"),
        SourceFile("a", "c10", b"a10"),
        SourceFile("z", "a", b"za", "BSD"),
        SourceFile("a", "c9", b"a9"),
        SourceFile("z", "b", b"again"),
    ]
    tally = Tally("code")
    found = list(sorted_groups(files, True, tally))
    assert [(document.name, document.text, document.licence) for document in found] == [
        ("a", b"# file: c9\na9\n\n# file: c10\na10\n", None),
        ("z", b"# file: a\nza\n\n# file: b\nzb\n", "BSD, MIT"),
    ]
    assert tally.notes == ("source code: left out 1 files whose path occurred before in their repository, e.g. z/b",)
    ordered = sorted(files, key=lambda file: file.group)
    assert list(joined_groups(ordered, True, Tally("code"))) == found
    assert group_of("a/b/c", 2, "x") == ("a/b", "c")
    assert group_of("a", 1, "x") is None


def test_natural_order_knows_any_number_and_only_plain_digits() -> None:
    long = "9" * 5000
    assert sorted(["x1" + "0" * 5000, "x" + long, "x10", "x9", "c٣", "c²", "c02"], key=natural) == [
        *("c02", "c²", "c٣", "x9", "x10", "x" + long),
        "x1" + "0" * 5000,
    ]


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.py", b"# file: a.py\n"),
        ("a\n# file: b.py", b"# file: a\\n# file: b.py\n"),
        ("a\r\x1b[2Jb", b"# file: a\\r\\x1b[2Jb\n"),
        ("a\u2028b\x85c", b"# file: a\\u2028b\\x85c\n"),
        ("Übung 1.txt", "# file: Übung 1.txt\n".encode()),
    ],
)
def test_no_file_name_forges_a_header(name, header):
    assert file_header(name) == header
    assert join_files([(name, b"text")], headers=True) == header + b"text\n"
