"""Papers from their LaTeX sources in arXiv's forms: one paper = one document."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath

import zstandard

from longspan.data_pipeline.cleaning.encoding import repair_encoding
from longspan.data_pipeline.cleaning.registry import Cleaner
from longspan.data_pipeline.regular_files import read_regular
from longspan.data_pipeline.source_config import ArxivConfig
from longspan.data_pipeline.sources.archives import archive_files
from longspan.data_pipeline.sources.compressed import WrongSuffixError, decompressed, read_limited
from longspan.data_pipeline.sources.latex import paper_text
from longspan.data_pipeline.sources.places import find_places, local_file, without_suffix
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceDocument, SourceText, cleaned_text

_PAPER_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".gz", ".tex")
_SOURCE_SUFFIXES = (".tex", ".ltx", ".latex")
_NOT_SOURCE = (b"%PDF-", b"%!PS", b"PK\x03\x04")
_MOST_PAPER_BYTES = 2**26  # with figures; what is longer after decompression is no paper


def read_arxiv(config: ArxivConfig) -> SourceText:
    """All papers, in order of the paths and, in bulk archives, of their members; ids are file names without suffix.

    Text is repaired to UTF-8, comments are stripped, files are joined where the main file reads them in. PDF-only and
    withdrawn papers, and those without a main file, are left out and counted.

    Raises:
        UsageError: a path is missing or does not answer, or a bulk archive is damaged.
    """
    tally = Tally(config.name)
    find_places(config.name, config.paths)  # wrong paths are told before anything is read
    return SourceText(_documents(config, tally), "LaTeX sources of papers", tally)


def _documents(config: ArxivConfig, tally: Tally) -> Iterator[SourceDocument]:
    cleaner = Cleaner(config.clean)
    for name, data in _papers(config, tally):
        key = without_suffix(PurePosixPath(name).name, _PAPER_SUFFIXES)
        source = _paper(name, data, tally)
        if source is None:
            continue
        text = cleaned_text(cleaner, f"{key}.tex", source.encode("utf-8"), tally)
        if text is not None:
            yield SourceDocument(key, text)


def _papers(config: ArxivConfig, tally: Tally) -> Iterator[tuple[str, bytes]]:
    """Name and packed bytes of each paper."""

    def takes(name: str, size: int) -> bool:
        if name.lower().endswith(".pdf"):
            tally.leave_out("papers with a PDF only", name)
            return False
        if size > _MOST_PAPER_BYTES:
            tally.leave_out(f"papers of more than {_MOST_PAPER_BYTES:,} bytes", name)
        return size <= _MOST_PAPER_BYTES

    for place in find_places(config.name, config.paths):
        with local_file(config.name, place) as file:
            if config.bulk:
                yield from archive_files(file, takes, tally)
            elif takes(place.name, file.stat().st_size):
                yield place.name, read_regular(file)


def _paper(name: str, data: bytes, tally: Tally) -> str | None:
    """The text of a paper; None, and counted, if it has none."""
    try:
        files = _source_files(name, data)
    except (
        OSError,
        EOFError,
        WrongSuffixError,
        tarfile.TarError,
        lzma.LZMAError,
        zlib.error,
        zstandard.ZstdError,
    ):
        tally.leave_out("papers in a damaged archive", name)
        return None
    if files is None:
        tally.leave_out("papers with a PDF only", name)
        return None
    if not files:
        tally.leave_out("papers without TeX files", name)
        return None
    text, why = paper_text(files)
    if text is None:
        tally.leave_out(why, name)
    return text


def _source_files(name: str, data: bytes) -> dict[str, str] | None:
    """TeX files by path; None if the paper is a PDF, PostScript or office document alone."""
    with decompressed(io.BytesIO(data), name) as stream:
        plain = read_limited(stream, _MOST_PAPER_BYTES)
    if plain is None:
        return {}
    if plain.startswith(_NOT_SOURCE):
        return None
    if not tarfile.is_tarfile(io.BytesIO(plain)):
        return {"paper.tex": _repaired(plain)} if plain.strip() else {}
    with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
        named = [(item.name.removeprefix("./"), item) for item in archive if item.isreg()]
        sources = {}
        for path, item in named:
            body = archive.extractfile(item) if path.lower().endswith(_SOURCE_SUFFIXES) else None
            if body is not None:
                sources[path] = _repaired(body.read())
    has_other = any(path.lower().endswith((".pdf", ".ps")) for path, _ in named)
    return sources if sources or not has_other else None


def _repaired(data: bytes) -> str:
    return (repair_encoding("", data) or b"").decode("utf-8")
