"""Which tokens are scored: byte spans that depend on a document's id and length alone, and the windows around them.

Every mode, context length and checkpoint scores the same target set, so that differences between them are
differences in context and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.data_pipeline.manifest import DocumentEntry
from longspan.errors import UsageError
from longspan.trainer.evaluation.spec import EvaluationSpec, digest_of


@dataclass(frozen=True)
class Selection:
    """Documents that are scored, and those that were too short for it.

    Attributes:
        spans: per scored document its byte spans [start, end), in rising order.
        excluded: documents shorter than the longest context plus the spans.
        needed_bytes: length from which on a document is scored.
        head_bytes: no target lies behind this offset; None: the whole document.
    """

    entries: list[DocumentEntry]
    spans: list[list[tuple[int, int]]]
    excluded: list[DocumentEntry]
    needed_bytes: int
    head_bytes: int | None


def select(candidates: Iterable[DocumentEntry], spec: EvaluationSpec) -> Selection:
    """Choose documents and their spans.

    A document takes part when its bytes hold the longest context and all spans. With mode `swapped`, the scored
    head of the longest document ends where the second longest does, so that each position has a donor.

    Raises:
        UsageError: a source has no documents, fewer than two documents are long enough, or the head is shorter than
            the targets need.
    """
    candidates = list(candidates)
    _check_sources({entry.source for entry in candidates}, spec)
    wanted = [entry for entry in candidates if spec.sources is None or entry.source in spec.sources]
    first = -(-spec.longest_tokens * spec.bytes_per_token // spec.stride_tokens) * spec.stride_tokens
    needed = first + spec.spans_per_document * (-(-spec.span_bytes // spec.stride_tokens) * spec.stride_tokens)
    head = spec.max_document_bytes
    if head is not None and head < needed:
        raise UsageError(
            f"max_document_bytes = {head} cannot hold a context of {spec.longest_tokens} tokens and "
            f"{spec.spans_per_document} spans of {spec.span_bytes} bytes. Set it to {needed} or more."
        )
    long_enough = sorted((entry for entry in wanted if entry.num_bytes >= needed), key=lambda entry: place_of(entry.id))
    if len(long_enough) < 2:
        longest = max((entry.num_bytes for entry in wanted), default=0)
        raise UsageError(
            f"{len(long_enough)} of {len(wanted)} documents hold {needed} bytes, which a context of "
            f"{spec.longest_tokens} tokens and {spec.spans_per_document} spans of {spec.span_bytes} bytes need; "
            f"intervals need two documents at least. The longest has {longest} bytes: lower context_tokens, "
            f"spans_per_document or span_bytes, or build more held-out documents."
        )
    entries = long_enough[: spec.max_documents]
    if "swapped" in spec.modes:
        second_longest = sorted(entry.num_bytes for entry in entries)[-2]
        head = second_longest if head is None else min(head, second_longest)
    spans = [document_spans(entry, spec, first, head) for entry in entries]
    return Selection(entries, spans, [entry for entry in wanted if entry.num_bytes < needed], needed, head)


def _check_sources(known: set[str], spec: EvaluationSpec) -> None:
    unknown = [source for source in spec.sources or () if source not in known]
    if unknown:
        raise UsageError(
            f"sources names {', '.join(unknown)}: the {spec.split} split has no documents of that source. It has those "
            f"of {', '.join(sorted(known)) or 'none'}."
        )


def place_of(name: str) -> bytes:
    """The sha256 of a name: an order and places that say nothing about the text."""
    return hashlib.sha256(name.encode()).digest()


def document_spans(entry: DocumentEntry, spec: EvaluationSpec, first: int, head: int | None) -> list[tuple[int, int]]:
    """Byte spans of one document: its head from byte `first` on in equal strata, one span in each.

    The place inside a stratum comes from the hash of the document's id, which is the same whatever tokenizer the corpus
    was built with. Spans start on multiples of `stride_tokens` bytes: in a byte vocabulary their windows then lie on
    the model's quantum grid without extra tokens.
    """
    grid = spec.stride_tokens
    slots = ((entry.num_bytes if head is None else min(entry.num_bytes, head)) - first) // grid
    span_slots = -(-spec.span_bytes // grid)
    edges = [slots * k // spec.spans_per_document for k in range(spec.spans_per_document + 1)]
    spans = []
    for k in range(spec.spans_per_document):
        room = edges[k + 1] - edges[k] - span_slots + 1
        place = int.from_bytes(place_of(f"{entry.id}/span/{k}")[:8]) % room
        start = first + (edges[k] + place) * grid
        spans.append((start, start + spec.span_bytes))
    return spans


def token_ranges(token_bytes: np.ndarray, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Tokens [a, b) that lie fully inside each byte span; (0, 0) where there is none.

    Some tokenizers write a character as several tokens and count its bytes at one of them. Tokens without bytes at
    the edges of a range are scored too, so that no character is scored in part: a few nats more, never fewer.

    Args:
        token_bytes: int[n], bytes of each token of the document; 0 for bos, the first, and for eos, at most the last.
        spans: byte ranges [start, end).
    """
    ends = np.cumsum(token_bytes, dtype=np.int64)
    starts = ends - token_bytes
    ranges = []
    for start, end in spans:
        inside = np.flatnonzero((starts >= start) & (ends <= end) & (token_bytes > 0))
        if not len(inside):
            ranges.append((0, 0))
            continue
        first, stop = int(inside[0]), int(inside[-1]) + 1
        while first > 1 and token_bytes[first - 1] == 0:
            first -= 1
        while stop < len(token_bytes) - 1 and token_bytes[stop] == 0:
            stop += 1
        ranges.append((first, stop))
    return ranges


def head_tokens(token_bytes: np.ndarray, head_bytes: int | None) -> int:
    """How many tokens from bos on lie within the first `head_bytes` bytes; all but eos if None."""
    ends = np.cumsum(token_bytes, dtype=np.int64)
    if head_bytes is None:
        return len(ends) - 1
    return min(int(np.searchsorted(ends, head_bytes, side="right")), len(ends) - 1)


def check_contexts(documents: Iterable[tuple[str, np.ndarray, list[tuple[int, int]]]], spec: EvaluationSpec) -> None:
    """See that the spans of all documents hold tokens, with the longest context before the first of them.

    Args:
        documents: of each its name, the bytes of its tokens int[n] and what `token_ranges` returned.

    Raises:
        UsageError: a span holds no whole token, or there are too few before the first; gives for each setting the
            value that suits all of these documents.
    """
    longest = spec.longest_tokens
    empty: list[tuple[str, int]] = []  # names, bytes of the longest token
    near: list[tuple[str, int, int]] = []  # names, tokens before the first target, bytes a token there
    for name, token_bytes, ranges in documents:
        if (0, 0) in ranges:
            empty.append((name, int(token_bytes.max())))
        elif ranges[0][0] < longest:
            near.append((name, ranges[0][0], -(-int(token_bytes[: longest + 1].sum()) // longest)))
    problems = []
    if empty:
        problems.append(
            f"span_bytes = {spec.span_bytes}: a span of {_first_of(empty)} holds no whole token; the longest token "
            f"there has {max(entry[1] for entry in empty)} bytes. Raise span_bytes."
        )
    if near:
        rate = max(entry[2] for entry in near)
        problems.append(
            f"bytes_per_token = {spec.bytes_per_token}: the first target of {_first_of(near)} has {near[0][1]} tokens "
            f"before it, {longest} are wanted. The tokens there have up to {rate} bytes on average: set "
            f"bytes_per_token to {max(rate, spec.bytes_per_token + 1)}."
        )
    if problems:
        raise UsageError("\n".join(problems))


def _first_of(found: Sequence[tuple[Any, ...]]) -> str:
    """The first document's name, and how many more there are."""
    return f"{found[0][0]}{f' (and of {len(found) - 1} documents more)' if len(found) > 1 else ''}"


def chunks(span: tuple[int, int], stride: int) -> list[tuple[int, int]]:
    """The target tokens [a, b) of a span in pieces of at most `stride` tokens."""
    return [(start, min(start + stride, span[1])) for start in range(span[0], span[1], stride)]


def window_start(first_target: int, context_tokens: int, quantum: int) -> int:
    """First input of the window that gives token `first_target` at least `context_tokens` tokens of context.

    Rounded down to the model's quantum grid, so the true context may be up to `quantum - 1` tokens longer.
    """
    return (first_target - context_tokens) // quantum * quantum


def mask_digest(names: Iterable[str], ranges: Iterable[list[tuple[int, int]]]) -> str:
    """Hash of the scored tokens of all documents: equal hashes mean identical targets."""
    return digest_of([[name, [list(part) for part in parts]] for name, parts in zip(names, ranges, strict=True)])
