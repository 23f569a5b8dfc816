"""Documents as columns: the same entries as a list of them, and numpy columns beside it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from packed_corpora import TEXTS, pack

from longspan.data_pipeline import document_table
from longspan.data_pipeline.document_table import DocumentTable
from longspan.data_pipeline.entries import DocumentEntry


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> DocumentTable:
    return pack(tmp_path_factory.mktemp("table") / "corpus").manifest.documents


def test_it_is_a_sequence_of_entries(table):
    entries = list(table)
    assert all(isinstance(entry, DocumentEntry) for entry in entries)
    assert [entry.id for entry in entries] == list(TEXTS)
    assert len(table) == len(entries) == 9
    assert table[3] == entries[3] and table[-1] == entries[-1] and table[np.int64(2)] == entries[2]
    assert table[2:5] == entries[2:5] and table[::-2] == entries[::-2]
    assert table.index(entries[6]) == 6 and entries[6] in table
    assert DocumentEntry.model_validate(dict(table[4])) == entries[4]
    for place in (9, -10):
        with pytest.raises(IndexError, match="of 9"):
            table[place]


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_it_is_made_from_an_iterator(table, monkeypatch, rows_at_once):
    monkeypatch.setattr(document_table, "_ROWS_AT_ONCE", rows_at_once)
    again = DocumentTable.from_entries(iter(table))
    assert again == table
    assert again != DocumentTable.from_entries(iter(table[:8]))
    assert list(again.keys) == list(table.keys)


def test_columns_hold_what_the_entries_say(table):
    entries = list(table)
    assert table.num_tokens.tolist() == [entry.num_tokens for entry in entries]
    assert table.num_bytes.tolist() == [entry.num_bytes for entry in entries]
    assert [table.sources[code] for code in table.source_index] == [entry.source for entry in entries]
    assert table.is_train.tolist() == [entry.split == "train" for entry in entries]
    keys = [int.from_bytes(hashlib.blake2b(entry.id.encode()).digest()[:8], "little") for entry in entries]
    assert table.keys.tolist() == keys
    dtypes = [getattr(table, name).dtype for name in ("num_tokens", "num_bytes", "source_index", "is_train", "keys")]
    assert dtypes == [np.int64, np.int64, np.int32, np.bool_, np.uint64]


def test_documents_are_found_and_taken(table):
    assert table.find("poems/g.txt") == list(TEXTS).index("poems/g.txt")
    assert table.find("poems/none.txt") is None
    some = table.take(np.array([5, 1]))
    assert list(some) == [table[5], table[1]]
    assert some.num_tokens.tolist() == [table[5].num_tokens, table[1].num_tokens]


def test_an_empty_table_has_empty_columns():
    table = DocumentTable.from_entries([])
    assert len(table) == 0 and list(table) == [] and table.sources == []
    assert [len(column) for column in (table.num_tokens, table.source_index, table.is_train, table.keys)] == [0] * 4


def test_a_synthetic_table_has_the_lengths_it_was_given():
    table = DocumentTable.synthetic(np.array([10, 2, 7]), np.array([1, 0, 1]), ["books", "code"])
    assert [entry.id for entry in table] == ["code/0", "books/1", "code/2"]
    assert table.num_tokens.tolist() == [10, 2, 7] and table.num_bytes.tolist() == [8, 0, 5]
    assert table.sources == ["books", "code"] and table.source_index.tolist() == [1, 0, 1]
    assert table.is_train.all() and len(set(table.keys.tolist())) == 3
    assert DocumentTable.synthetic(np.array([3])).sources == ["synthetic"]
    with pytest.raises(ValueError, match="a document of 1 tokens"):
        DocumentTable.synthetic(np.array([5, 1]))
