"""What must hold between the entries of a manifest, checked on whole columns: a million documents take a second."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.compute as pc

from longspan.data_pipeline.document_table import DocumentTable
from longspan.data_pipeline.entries import VocabularyEntry
from longspan.data_pipeline.manifest_file import Header

_MOST_PROBLEMS_NAMED = 10
_SPLITS = ("train", "held_out")
LENGTH_BYTES = 2  # bytes of each token, uint16


def manifest_problems(header: Header, documents: DocumentTable) -> list[str]:
    """What is wrong between the entries; the first of each kind, with the document's id; empty if nothing is."""
    problems = [f"two sources are named {name}" for name in _repeated([source.name for source in header.sources])]
    problems += [f"two shards are named {url}" for url in _repeated([shard.url for shard in header.shards])]
    wrong = {
        **_wrong_values(documents),
        **_wrong_sizes(documents, header.vocabulary),
        **_wrong_places(documents, header),
        **_wrong_names(documents, header),
    }
    for what, mask in wrong.items():
        places = np.flatnonzero(mask)
        if len(places):
            rest = f" (and {len(places) - 1} more documents)" if len(places) > 1 else ""
            problems.append(f"document {documents[int(places[0])].id} {what}{rest}")
    shown = problems[:_MOST_PROBLEMS_NAMED]
    return [*shown, f"and {len(problems) - len(shown)} more problems"] if len(problems) > len(shown) else shown


def _wrong_values(documents: DocumentTable) -> dict[str, np.ndarray]:
    least = {"num_tokens": 2, "num_bytes": 0, "offset": 0, "lengths_offset": 0, "size": 0}
    wrong = {f"has a {name} below {floor}": documents.integers(name) < floor for name, floor in least.items()}
    sha256 = pc.match_substring_regex(documents.rows.column("sha256"), "^[0-9a-f]{64}$").to_numpy()
    split_codes, splits = documents.codes("split")
    wrong["has a sha256 that is not 64 hexadecimal digits"] = ~sha256.astype(bool)
    wrong["has a split other than train and held_out"] = _is_none_of(split_codes, splits, _SPLITS)
    return wrong


def _wrong_sizes(documents: DocumentTable, vocabulary: VocabularyEntry) -> dict[str, np.ndarray]:
    size, num_tokens, num_bytes = documents.integers("size"), documents.num_tokens, documents.num_bytes
    if vocabulary.kind == "bytes":
        return {
            "has other num_bytes than its text in the shard": size != num_bytes,
            "has other num_tokens than its bytes with bos and eos": num_tokens != num_bytes + 2,
            "has a lengths_offset, which byte corpora do without": documents.integers("lengths_offset") != 0,
        }
    item = np.dtype(vocabulary.token_dtype).itemsize
    return {f"has another size than its num_tokens of {item} bytes": size != num_tokens * item}


def _wrong_places(documents: DocumentTable, header: Header) -> dict[str, np.ndarray]:
    sizes = {shard.url: shard.size for shard in header.shards}
    codes, urls = documents.codes("shard")
    end = documents.integers("offset") + documents.integers("size")
    if header.vocabulary.kind != "bytes":
        end = np.maximum(end, documents.integers("lengths_offset") + LENGTH_BYTES * documents.num_tokens)
    held = np.array([sizes.get(url, -1) for url in urls], dtype=np.int64)[codes]
    return {"lies outside its shard": end > held}


def _wrong_names(documents: DocumentTable, header: Header) -> dict[str, np.ndarray]:
    codes, sources = documents.codes("source")
    ids = documents.rows.column("id")
    astray = np.zeros(len(documents), dtype=bool)
    for code, source in enumerate(sources):
        own = np.flatnonzero(codes == code)
        astray[own] = ~pc.starts_with(ids.take(own), source + "/").to_numpy().astype(bool)
    return {
        "is of a source that the manifest does not list": _is_none_of(
            codes, sources, tuple(source.name for source in header.sources)
        ),
        "has an id that does not begin with its source and /": astray,
        "is there twice: two documents share an id": _seen_before(documents),
        "is in a group that is only partly held out": _in_torn_group(documents),
    }


def _is_none_of(codes: np.ndarray, values: list[str], allowed: tuple[str, ...]) -> np.ndarray:
    return np.array([value not in allowed for value in values], dtype=bool)[codes]


def _seen_before(documents: DocumentTable) -> np.ndarray:
    again = np.ones(len(documents), dtype=bool)
    ids = documents.rows.column("id")
    if pc.count_distinct(ids).as_py() == len(documents):
        return ~again
    again[np.unique(_codes(documents, "id"), return_index=True)[1]] = False
    return again


def _in_torn_group(documents: DocumentTable) -> np.ndarray:
    codes = _codes(documents, "group")
    members = np.bincount(codes)
    training = np.bincount(codes, weights=documents.is_train)
    torn: np.ndarray = (training > 0) & (training < members)
    return torn[codes]


def _codes(documents: DocumentTable, name: str) -> np.ndarray:
    """The column as places in its different values: int32 [n]."""
    codes: np.ndarray = pc.dictionary_encode(documents.rows.column(name)).combine_chunks().indices.to_numpy()
    return codes


def _repeated(items: list[str]) -> list[str]:
    return [item for item, count in Counter(items).items() if count > 1]
