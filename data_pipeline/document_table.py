"""The documents of a corpus as columns: a million of them take some 200 MB, and their lengths are numpy arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longspan.data_pipeline.entries import DocumentEntry

_INTEGERS = ("num_tokens", "num_bytes", "offset", "lengths_offset", "size")
_REPEATED = ("source", "split", "licence", "shard")  # few different values: kept as codes
_ROWS_AT_ONCE = 16_384


def _column_type(name: str) -> pa.DataType:
    return pa.int64() if name in _INTEGERS else pa.string()


ROW_SCHEMA = pa.schema([(name, _column_type(name)) for name in DocumentEntry.model_fields])


class DocumentTable(Sequence[DocumentEntry]):
    """All documents of a manifest, in its order; an entry is made when it is asked for."""

    def __init__(self, rows: pa.Table) -> None:
        """Args: rows: columns of `ROW_SCHEMA`, without nulls; those with few different values may be dictionaries."""
        columns = []
        for name in ROW_SCHEMA.names:
            column = rows.column(name)
            if name in _REPEATED and not pa.types.is_dictionary(column.type):
                column = pc.dictionary_encode(column)
            columns.append(column)
        self._rows = pa.table(columns, names=ROW_SCHEMA.names).unify_dictionaries().combine_chunks()

    @classmethod
    def from_entries(cls, entries: Iterable[DocumentEntry]) -> DocumentTable:
        """A table of `entries`, which may come from an iterator and are not kept."""
        batches: list[pa.Table] = []
        waiting: list[dict[str, Any]] = []

        def flush() -> None:
            columns = {name: [row[name] for row in waiting] for name in ROW_SCHEMA.names}
            rows = pa.table(columns, schema=ROW_SCHEMA)
            for name in _REPEATED:
                rows = rows.set_column(rows.schema.get_field_index(name), name, pc.dictionary_encode(rows[name]))
            batches.append(rows)
            waiting.clear()

        for entry in entries:
            waiting.append(dict(entry))
            if len(waiting) == _ROWS_AT_ONCE:
                flush()
        flush()
        return cls(pa.concat_tables(batches))  # never empty: `flush` always adds one

    @classmethod
    def synthetic(
        cls,
        num_tokens: np.ndarray,
        source_index: np.ndarray | None = None,
        source_names: Sequence[str] = ("synthetic",),
    ) -> DocumentTable:
        """Training documents of these lengths that lie in no shard, for plans without a corpus.

        Args:
            num_tokens: integers [n], each at least 2.
            source_index: integers [n] into `source_names`; all 0 if None. Document i is `SOURCE/i`.

        Raises:
            ValueError: a document of fewer than 2 tokens.
        """
        tokens = np.ascontiguousarray(num_tokens, dtype=np.int64)
        count = len(tokens)
        if count and int(tokens.min()) < 2:
            raise ValueError(f"a document of {int(tokens.min())} tokens; bos and eos alone are 2.")
        codes = np.zeros(count, dtype=np.int32) if source_index is None else np.asarray(source_index, dtype=np.int32)
        source = pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(list(source_names), pa.string()))
        ids = pc.binary_join_element_wise(source.cast(pa.string()), pa.array(np.arange(count)).cast(pa.string()), "/")
        same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, dtype=np.int32)), pa.array([""]))

        def repeated(value: str) -> pa.DictionaryArray:
            return pa.DictionaryArray.from_arrays(same.indices, pa.array([value]))

        text = pa.array(tokens - 2)
        values = {
            "id": ids,
            "source": source,
            "group": ids,
            "split": repeated("train"),
            "licence": repeated("none"),
            "num_tokens": pa.array(tokens),
            "num_bytes": text,
            "shard": repeated("synthetic.tar"),
            "offset": pa.array(np.cumsum(tokens) - tokens),
            "lengths_offset": pa.array(np.zeros(count, dtype=np.int64)),
            "size": text,
            "sha256": pc.cast(repeated("0" * 64), pa.string()),
        }
        return cls(pa.table(values))

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    @overload
    def __getitem__(self, place: int) -> DocumentEntry: ...
    @overload
    def __getitem__(self, place: slice) -> list[DocumentEntry]: ...
    def __getitem__(self, place: int | slice) -> DocumentEntry | list[DocumentEntry]:
        """The entry at `place`, or a list of those in a slice."""
        if isinstance(place, slice):
            return list(self.take(np.arange(len(self))[place]))
        if not -len(self) <= place < len(self):
            raise IndexError(f"document {place} of {len(self)}")
        row = int(place) % len(self)
        return _entry({name: value_at(row) for name, value_at in self._readers})

    def __iter__(self) -> Iterator[DocumentEntry]:
        yield from map(_entry, self.fields())

    def fields(self) -> Iterator[dict[str, Any]]:
        """The fields of each entry, without the entries."""
        for batch in self._rows.to_batches(max_chunksize=_ROWS_AT_ONCE):
            columns = [_values(column) for column in batch.columns]
            for row in zip(*columns, strict=True):
                yield dict(zip(ROW_SCHEMA.names, row, strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DocumentTable):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _readers(self) -> list[tuple[str, Callable[[int], Any]]]:
        """Of each column, what gives its value in a row; several times as fast as asking pyarrow's columns."""
        return [(name, self._reader(name)) for name in ROW_SCHEMA.names]

    def _reader(self, name: str) -> Callable[[int], Any]:
        kind = self._rows.schema.field(name).type
        if pa.types.is_integer(kind):
            return self.integers(name).item
        if pa.types.is_dictionary(kind):
            codes, values = self.codes(name)
            return lambda row: values[codes[row]]
        strings = self._rows.column(name)
        return lambda row: strings[row].as_py()

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """Tokens of each document, bos and eos included: int64 [n]."""
        return self.integers("num_tokens")

    @cached_property
    def num_bytes(self) -> np.ndarray:
        """Bytes of the UTF-8 text of each document: int64 [n]."""
        return self.integers("num_bytes")

    @cached_property
    def is_train(self) -> np.ndarray:
        """Whether each document is in the split `train`: bool [n]."""
        codes, values = self.codes("split")
        return np.array([value == "train" for value in values], dtype=bool)[codes]

    @cached_property
    def source_index(self) -> np.ndarray:
        """Place of each document's source in `sources`: int32 [n]."""
        return self.codes("source")[0]

    @cached_property
    def sources(self) -> list[str]:
        """Names of the sources, in the order in which `source_index` counts them."""
        return self.codes("source")[1]

    @cached_property
    def keys(self) -> np.ndarray:
        """First 8 bytes of the BLAKE2b hash of each id, as a little-endian number: uint64 [n]."""
        digests = bytearray()
        for batch in self._rows.select(["id"]).to_batches(max_chunksize=_ROWS_AT_ONCE):
            digests += b"".join(_key(name) for name in batch.column(0).to_pylist())
        return np.frombuffer(bytes(digests), dtype="<u8").astype(np.uint64, copy=False)

    def integers(self, name: str) -> np.ndarray:
        """One of the columns of whole numbers, e.g. `offset`: int64 [n]."""
        return self._rows.column(name).to_numpy()

    def strings(self, name: str) -> list[str]:
        """One of the columns of text, e.g. `id` or `group`, as a list."""
        values: list[str] = self._rows.column(name).to_pylist()
        return values

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A column of few values (`source`, `split`, `licence`, `shard`): places int32 [n] in the values, and these."""
        chunks = self._rows.column(name).combine_chunks()
        if isinstance(chunks, pa.ChunkedArray):  # an empty table
            return np.zeros(0, dtype=np.int32), []
        return chunks.indices.to_numpy().astype(np.int32, copy=False), chunks.dictionary.to_pylist()

    @property
    def rows(self) -> pa.Table:
        """The columns as they are kept."""
        return self._rows

    def find(self, document_id: str) -> int | None:
        """Place of the document with this id, None if there is none."""
        place = pc.index(self._rows.column("id"), document_id).as_py()
        return None if place < 0 else int(place)

    def take(self, places: np.ndarray) -> DocumentTable:
        """A table of the documents at `places`, integers [m], in that order."""
        return DocumentTable(self._rows.take(pa.array(places)))


def _entry(row: dict[str, Any]) -> DocumentEntry:
    return DocumentEntry.model_construct(**row)  # its columns were checked as a whole


def _values(column: pa.Array) -> list[Any]:
    if not pa.types.is_dictionary(column.type):
        values: list[Any] = column.to_pylist()
        return values
    names = column.dictionary.to_pylist()
    return [names[code] for code in column.indices.to_pylist()]


def _key(name: str) -> bytes:
    return hashlib.blake2b(name.encode()).digest()[:8]
