"""Targets depend on a document's bytes and the spec alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from longspan.errors import UsageError
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.evaluation.targets import (
    check_contexts,
    chunks,
    head_tokens,
    mask_digest,
    select,
    token_ranges,
    window_start,
)

SPEC = EvaluationSpec(
    name="test", context_tokens=(64, 500), spans_per_document=3, span_bytes=100, stride_tokens=32, modes=("carried",)
)


@dataclass(frozen=True)
class Entry:
    id: str
    num_bytes: int
    source: str = "s"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.id.encode()).hexdigest()


ENTRIES = [Entry(f"doc{size}", size) for size in (100, 895, 896, 1000, 5000, 40000)]


def test_short_documents_are_left_out_and_named() -> None:
    chosen = select(ENTRIES, SPEC)
    assert chosen.needed_bytes == 512 + 3 * 128 == 896
    assert sorted(entry.num_bytes for entry in chosen.entries) == [896, 1000, 5000, 40000]
    assert [entry.num_bytes for entry in chosen.excluded] == [100, 895]


def test_spans_lie_behind_the_longest_context_inside_the_document_on_the_grid_and_apart() -> None:
    chosen = select(ENTRIES, SPEC)
    for entry, spans in zip(chosen.entries, chosen.spans, strict=True):
        assert all(start >= 500 and start % 32 == 0 and end - start == 100 for start, end in spans)
        assert spans[-1][1] <= entry.num_bytes
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_spans_do_not_depend_on_the_other_documents_or_on_their_order() -> None:
    whole = select(ENTRIES, SPEC)
    some = select(list(reversed(ENTRIES[3:])), SPEC)
    known = {entry.id: spans for entry, spans in zip(whole.entries, whole.spans, strict=True)}
    assert all(known[entry.id] == spans for entry, spans in zip(some.entries, some.spans, strict=True))
    assert len({tuple(spans) for spans in whole.spans}) == 4  # the place comes from the hash of the document's id


def test_swapped_gives_every_position_a_donor() -> None:
    swapped = SPEC.model_copy(update={"modes": ("carried", "swapped")})
    chosen = select(ENTRIES, swapped)
    assert chosen.head_bytes == 5000
    assert max(end for spans in chosen.spans for _, end in spans) <= 5000
    limited = select(ENTRIES, swapped.model_copy(update={"max_document_bytes": 900}))
    assert limited.head_bytes == 900 and max(end for spans in limited.spans for _, end in spans) <= 900


def test_sources_and_number_of_documents() -> None:
    entries = [*ENTRIES, Entry("other", 9000, "t")]
    assert {entry.source for entry in select(entries, SPEC.model_copy(update={"sources": ("s",)})).entries} == {"s"}
    few = select(entries, SPEC.model_copy(update={"max_documents": 2}))
    assert few.entries == select(entries, SPEC).entries[:2]
    with pytest.raises(UsageError, match=r"1 of 1 documents hold 896 bytes.*The longest has 9000 bytes"):
        select(entries, SPEC.model_copy(update={"sources": ("t",)}))


def test_a_source_without_documents_is_named_with_those_that_there_are() -> None:
    entries = [*ENTRIES, Entry("other", 9000, "t")]
    with pytest.raises(UsageError, match=r"sources names u, v: the held_out split .* It has those of s, t\."):
        select(entries, SPEC.model_copy(update={"sources": ("u", "s", "v")}))
    with pytest.raises(UsageError, match=r"sources names s: .* It has those of none\."):
        select([], SPEC.model_copy(update={"sources": ("s",)}))


def test_what_no_document_holds_is_said_once_for_all_documents() -> None:
    spec = SPEC.model_copy(update={"context_tokens": (4,), "span_bytes": 2})
    wide = np.array([0, *[3] * 20, 0])
    wider = np.array([0, *[5] * 20, 0])
    fine = np.array([0, *[1] * 20, 0])

    def laid(*found: tuple[str, np.ndarray]) -> list[tuple[str, np.ndarray, list[tuple[int, int]]]]:
        return [(name, sizes, token_ranges(sizes, [(5, 20)])) for name, sizes in found]

    check_contexts(laid(("fine", fine)), spec)
    with pytest.raises(UsageError, match=r"of a \(and of 1 documents more\) has 3 tokens .* set bytes_per_token to 5"):
        check_contexts(laid(("a", wide), ("fine", fine), ("b", wider)), spec)
    narrow = ("c", np.array([0, 9, 9]), token_ranges(np.array([0, 9, 9]), [(2, 8)]))
    with pytest.raises(UsageError, match=r"(?s)a span of c holds .* has 9 bytes.*set bytes_per_token to 3"):
        check_contexts([*laid(("a", wide)), narrow], spec)


def test_a_target_token_lies_fully_inside_its_span() -> None:
    token_bytes = np.array([0, 2, 3, 1, 4, 2, 0])  # starts at 0, 0, 2, 5, 6, 10, 12
    assert token_ranges(token_bytes, [(2, 10), (1, 9), (7, 9), (0, 12)]) == [(2, 5), (2, 4), (0, 0), (1, 6)]


def test_tokens_without_bytes_at_the_edges_are_scored_too() -> None:
    # bos; a character as 0 0 3 bytes, one as 2 0, two letters, one as 3 0 0; eos
    token_bytes = np.array([0, 0, 0, 3, 2, 0, 1, 1, 3, 0, 0, 0])
    assert token_ranges(token_bytes, [(0, 3), (3, 5), (5, 7), (7, 10), (0, 10)]) == [
        (1, 4),
        (4, 6),
        (5, 8),
        (8, 11),
        (1, 11),
    ]


def test_the_head_ends_where_its_bytes_do() -> None:
    token_bytes = np.array([0, 2, 3, 1, 0])
    assert [head_tokens(token_bytes, head) for head in (1, 2, 4, 5, 6, 7, None)] == [1, 2, 2, 3, 4, 4, 4]
    one_byte_each = np.array([0, 1, 1, 1, 0])
    assert [head_tokens(one_byte_each, head) for head in (1, 2, 3, 4)] == [2, 3, 4, 4]  # never eos


def test_windows_start_on_the_grid_with_enough_context() -> None:
    assert chunks((10, 31), 8) == [(10, 18), (18, 26), (26, 31)]
    assert [window_start(513, 128, quantum) for quantum in (1, 64, 128, 100)] == [385, 384, 384, 300]


def test_the_mask_digest_changes_with_any_target() -> None:
    digest = mask_digest(["a", "b"], [[(1, 5)], [(2, 6)]])
    assert digest == mask_digest(["a", "b"], [[(1, 5)], [(2, 6)]])
    assert digest != mask_digest(["a", "b"], [[(1, 5)], [(2, 7)]])


def test_the_key_covers_all_but_the_batch() -> None:
    assert SPEC.model_copy(update={"batch_tokens": 5}).digest == SPEC.digest
    assert SPEC.model_copy(update={"seed": 5}).digest != SPEC.digest
