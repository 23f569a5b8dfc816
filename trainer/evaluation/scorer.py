"""Negative log-likelihood of fixed targets under different contexts, for any model with explicit state.

Documents stream from token 0 in lock-step, in segments of `batch_tokens`. On the way every token's loss is summed by
its place in the document. Where a window starts, the streamed state is copied; each mode then changes its copy in
its own way and scores the same targets from there:

    truncated    initial state
    carried      the streamed state as it is
    reset        recurrent states, memories and window caches back at their initial value
    state_reset  recurrent states and memories back at their initial value, window caches kept
    swapped      recurrent states and memories of another document at the same position, window caches kept

One mode has a stream of its own:

    local        recurrent states and memories return to their initial value after each training segment, window caches
                 stay: the recurrence works, but nothing is carried for long

State is cleared `L` tokens before every piece of `stride` targets, not once a span: a span-wide reset would let the
context grow from L to L + span. Modes whose states are bit for bit the same run once, which makes the gain of
a model without trained memory exactly zero.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longspan.modeling import state as states
from longspan.trainer.evaluation.token_sums import Range, TokenSums
from longspan.trainer.evaluation.windows import (
    POSITION,
    STREAM_TOKENS,
    WHOLE,
    Key,
    Plan,
    Score,
    ScoredDocument,
    Window,
    all_windows,
    bucket_edges,
    donors_of,
    empty_score,
)

State = dict[str, Any]
NO_LABEL = -100
_WINDOWS_BEHIND = 64  # sums of so many batches stay on the device before it is waited for

NEEDS_STREAM = ("carried", "reset", "state_reset", "swapped")


class Model(Protocol):
    """What is asked of a model; `longspan.modeling.model.LanguageModel` is one."""

    quantum: int

    def __call__(
        self, tokens: Tensor, state: State, *, reset: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """Nats [B, T] of labels [B, T] (0 where -100), the new state, auxiliary losses."""

    def advance(self, tokens: Tensor, state: State, *, reset: Tensor) -> State:
        """The new state alone."""

    def init_state(self, batch: int, device: torch.device | str) -> State:
        """State at a document start."""

    def reset_rows(self, state: State, rows: Tensor, kinds: tuple[str, ...] = ...) -> State:
        """Tensors of these kinds at their initial value in rows bool [B]."""

    def swap_rows(self, state: State, permutation: Tensor, kinds: tuple[str, ...] = ...) -> State:
        """Tensors of these kinds of row i from row permutation[i], int64 [B]; a row may be taken twice."""


@dataclass
class _Pending:
    """Windows of equal shape that wait for a full batch, with their copies of the streamed state."""

    windows: list[Window] = field(default_factory=list)
    carried: list[State] = field(default_factory=list)
    swapped: list[State] = field(default_factory=list)


@dataclass
class _Stream:
    """Documents that stream together.

    Attributes:
        starts: the windows that need a copy of the state, by where they start.
        ends: inputs that each document has to be given: its own, or as far as others borrow its state.
        own: documents whose tokens are scored on the way.
        clear_every: recurrent states and memories return to their initial value after so many tokens; 0: never.
    """

    starts: dict[int, list[Window]]
    ends: dict[int, int]
    own: list[int]
    clear_every: int = 0
    halts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.halts = sorted(self.starts)

    def stop_after(self, position: int, most: int) -> int:
        """Where the stream halts next, at most `most` tokens further."""
        stop = position + most
        later = bisect.bisect_right(self.halts, position)
        if later < len(self.halts):
            stop = min(stop, self.halts[later])
        return min(stop, (position // self.clear_every + 1) * self.clear_every) if self.clear_every else stop


class Scorer:
    """Scores documents with one model; sums are float64 sums of single losses, so batching does not change them."""

    def __init__(
        self,
        model: Model,
        documents: Sequence[ScoredDocument],
        plan: Plan,
        device: torch.device | str = "cpu",
        progress: Callable[[float], None] | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        """Lay out the windows.

        Args:
            model: in evaluation mode, on `device`.
            documents: with their targets.
            plan: modes and context lengths.
            device: where the model is.
            progress: called with the fraction of the tokens that are done.
            only: indices of the documents to score; all of them if None. The others still lend their states.

        Raises:
            UsageError: a target has fewer tokens before it than a context length asks for.
        """
        self._model = model
        self._documents = documents
        self._plan = plan
        self._device = torch.device(device)
        self._progress = progress or (lambda fraction: None)
        self._nats: dict[Key, list[tuple[float, float]]] = defaultdict(list)
        self._scores: dict[Key, Score] = {}
        self._behind: list[tuple[list[Window], str, Tensor]] = []
        self._done_tokens = 0
        self._donors = donors_of(documents) if "swapped" in plan.modes else {}
        self._mine = range(len(documents)) if only is None else only
        self._windows = [w for w in all_windows(documents, plan, model.quantum) if w.document in self._mine]
        groups = self._stream_groups()
        self._streams = [self._carried_stream(group) for group in groups]
        if "local" in plan.modes:
            self._streams += [self._local_stream(group) for group in groups]
        self._all_tokens = sum(sum(stream.ends.values()) for stream in self._streams)
        self._all_tokens += sum(w.num_inputs * len(plan.modes_at(w.length)) for w in self._windows)

    def run(self) -> list[Score]:
        """Score everything, in the order document, span, mode, length."""
        with torch.inference_mode():
            self._run_fresh()
            for stream in self._streams:
                self._run_stream(stream)
            self._resolve()
        for key, score in self._scores.items():
            score.nats = math.fsum(nats for nats, _ in self._nats[key])
            score.repeat_nats = math.fsum(repeats for _, repeats in self._nats[key])
        return [self._scores[key] for key in sorted(self._scores)]

    def _needs_stream(self, window: Window) -> bool:
        return any(mode in NEEDS_STREAM for mode in self._plan.modes_at(window.length))

    def _run_fresh(self) -> None:
        """Windows that only need an initial state."""
        batches: dict[tuple[int, int, int], _Pending] = defaultdict(_Pending)
        for window in self._windows:
            if not self._needs_stream(window):
                self._add(batches, window)
        self._flush_all(batches)

    def _stream_groups(self) -> list[list[int]]:
        """Documents that stream together: neighbours in length, so that few rows run on alone."""
        order = sorted(self._mine, key=lambda d: (len(self._documents[d].tokens), d))
        rows = max(1, self._plan.batch_tokens // STREAM_TOKENS)
        return [order[i : i + rows] for i in range(0, len(order), rows)]

    def _carried_stream(self, group: list[int]) -> _Stream:
        """Every token of these documents, and their donors as far as states are borrowed from them."""
        ends = {document: len(self._documents[document].tokens) - 1 for document in group}
        starts: dict[int, list[Window]] = defaultdict(list)
        inside = set(group)
        for window in self._windows:
            if window.document in inside and self._needs_stream(window):
                starts[window.start].append(window)
                if "swapped" in self._plan.modes_at(window.length):
                    donor = self._donors[window.document]
                    ends[donor] = max(ends.get(donor, 0), window.start)
        return _Stream(starts, ends, group)

    def _local_stream(self, group: list[int]) -> _Stream:
        ends = {document: max(stop for _, stop in self._documents[document].spans) - 1 for document in group}
        return _Stream({}, ends, group, clear_every=self._plan.segment_tokens)

    def _ranges(self, stream: _Stream) -> dict[int, list[Range]]:
        """What is summed on the way, with a score for each."""
        found: dict[int, list[Range]] = {}
        for d in stream.own:
            spans = self._documents[d].spans if stream.clear_every else bucket_edges(len(self._documents[d].tokens))
            mode = "local" if stream.clear_every else POSITION
            found[d] = [(a, b, (d, index, mode, 0)) for index, (a, b) in enumerate(spans)]
            for a, b, key in found[d]:
                self._scores[key] = empty_score(self._documents, key, 0, a, b)
        return found

    def _run_stream(self, stream: _Stream) -> None:
        """Stream documents from token 0 to their ends, copying states where windows start."""
        sums = TokenSums(self._documents, self._ranges(stream))
        rows = sorted(stream.ends)
        state = self._model.init_state(len(rows), self._device)
        batches: dict[tuple[int, int, int], _Pending] = defaultdict(_Pending)
        position, last = 0, max(stream.ends.values(), default=0)
        self._copy_states(stream.starts.get(0, []), rows, state, batches)
        while position < last:
            alive = [i for i, document in enumerate(rows) if stream.ends[document] > position]
            if len(alive) < len(rows):
                rows = [rows[i] for i in alive]
                state = states.index_select(state, torch.tensor(alive, device=self._device))
            if stream.clear_every and position and position % stream.clear_every == 0:
                every = torch.ones(len(rows), dtype=torch.bool, device=self._device)
                state = self._model.reset_rows(state, every, kinds=("recurrent",))
            most = max(stream.ends[document] for document in rows) - position
            stop = stream.stop_after(position, min(self._segment(len(rows)), most))
            nll, state = self._forward([(d, position, stop) for d in rows], state, stop - position)
            sums.add(nll, rows, position + 1)
            self._advance(sum(min(stop, stream.ends[d]) - position for d in rows))
            position = stop
            self._copy_states(stream.starts.get(position, []), rows, state, batches)
        self._flush_all(batches)
        for key, nats in sums.finish().items():
            self._nats[key].append(nats)

    def _segment(self, rows: int) -> int:
        """Tokens of one call on so many rows; a multiple of the quantum."""
        return max(1, self._plan.batch_tokens // rows // self._model.quantum) * self._model.quantum

    def _copy_states(
        self, windows: list[Window], rows: list[int], state: State, batches: dict[tuple[int, int, int], _Pending]
    ) -> None:
        if not windows:
            return
        place = {document: i for i, document in enumerate(rows)}
        swapped = state
        if any("swapped" in self._plan.modes_at(window.length) for window in windows):
            donors = [place.get(self._donors[document], i) for document, i in place.items()]
            swapped = self._model.swap_rows(state, torch.tensor(donors, device=self._device), kinds=("recurrent",))
        for window in windows:
            row = torch.tensor([place[window.document]], device=self._device)
            swap = "swapped" in self._plan.modes_at(window.length)
            self._add(
                batches, window, states.index_select(state, row), states.index_select(swapped, row) if swap else None
            )

    def _add(
        self,
        batches: dict[tuple[int, int, int], _Pending],
        window: Window,
        carried: State | None = None,
        swapped: State | None = None,
    ) -> None:
        """Queue a window with others of its shape; run them when they fill a batch."""
        shape = (window.length, window.num_inputs, window.stop - window.first)
        pending = batches[shape]
        pending.windows.append(window)
        if carried is not None:
            pending.carried.append(carried)
        if swapped is not None:
            pending.swapped.append(swapped)
        if (len(pending.windows) + 1) * window.num_inputs > self._plan.batch_tokens:
            self._flush(batches.pop(shape))

    def _flush_all(self, batches: dict[tuple[int, int, int], _Pending]) -> None:
        for shape in sorted(batches):
            self._flush(batches[shape])
        batches.clear()

    def _flush(self, pending: _Pending) -> None:
        """Score a batch of windows in each of their modes; equal states are run once."""
        windows = pending.windows
        run: list[tuple[dict[str, Tensor], Tensor]] = []
        for mode, state in self._mode_states(pending):
            packed = states.pack(state)
            nats = next((known for other, known in run if _equal(packed, other)), None)
            if nats is None:
                nats = self._nats_of(windows, state)
                run.append((packed, nats))
            self._behind.append((windows, mode, nats))
            self._advance(len(windows) * windows[0].num_inputs)
        if len(self._behind) > _WINDOWS_BEHIND:
            self._resolve()

    def _resolve(self) -> None:
        """Bring the sums of all finished windows to the host."""
        for windows, mode, nats in self._behind:
            for window, (every, repeats) in zip(windows, nats.tolist(), strict=True):
                self._record(window, mode, (every, repeats))
        self._behind.clear()

    def _advance(self, tokens: int) -> None:
        self._done_tokens += tokens
        self._progress(self._done_tokens / self._all_tokens)

    def _mode_states(self, pending: _Pending) -> Iterator[tuple[str, State]]:
        rows = torch.ones(len(pending.windows), dtype=torch.bool, device=self._device)
        carried = _cat(pending.carried) if pending.carried else {}
        make: dict[str, Callable[[], State]] = {
            "truncated": lambda: self._model.init_state(len(rows), self._device),
            "carried": lambda: carried,
            "reset": lambda: self._model.reset_rows(carried, rows, kinds=("recurrent", "cache")),
            "state_reset": lambda: self._model.reset_rows(carried, rows, kinds=("recurrent",)),
            "swapped": lambda: _cat(pending.swapped),
        }
        for mode in self._plan.modes_at(pending.windows[0].length):
            yield mode, make[mode]()

    def _nats_of(self, windows: list[Window], state: State) -> Tensor:
        """Sum of nats of each window's targets, and of the repeats among them: float64 [B, 2], on the device."""
        num_targets = windows[0].stop - windows[0].first
        done, length = 0, windows[0].num_inputs
        segment = self._segment(len(windows))
        while length - done > max(segment, num_targets + self._model.quantum):
            stop = min(done + segment, (length - num_targets) // self._model.quantum * self._model.quantum)
            pieces = [(w.document, w.start + done, w.start + stop) for w in windows]
            state = self._model.advance(self._inputs(pieces), state, reset=self._no_reset(pieces))
            done = stop
        nll = self._forward([(w.document, w.start + done, w.stop - 1) for w in windows], state, num_targets)[0]
        masks = np.stack([self._documents[w.document].repeats_in(w.first, w.stop) for w in windows])
        nats = nll[:, -num_targets:].double().contiguous()
        return torch.stack([nats.sum(dim=1), (nats * self._to_device(masks)).sum(dim=1)], dim=1)

    def _forward(self, pieces: list[tuple[int, int, int]], state: State, num_targets: int) -> tuple[Tensor, State]:
        """Run inputs [start, stop) of documents, all of one length, asking for the last `num_targets` labels."""
        tokens = self._inputs([(d, start, stop + 1) for d, start, stop in pieces])
        labels = tokens[:, 1:]
        if num_targets < labels.shape[1]:
            labels = labels.clone()
            labels[:, :-num_targets] = NO_LABEL
        nll, new_state, _ = self._model(
            tokens[:, :-1].contiguous(), state, reset=self._no_reset(pieces), labels=labels.contiguous()
        )
        return nll, new_state

    def _inputs(self, pieces: list[tuple[int, int, int]]) -> Tensor:
        """Tokens [start, stop) of documents, all of one length: int64 [B, T] on the device."""
        return self._to_device(np.stack([self._documents[d].inputs(start, stop) for d, start, stop in pieces]))

    def _to_device(self, array: np.ndarray) -> Tensor:
        """A copy on the device, which the host does not wait for."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def _no_reset(self, pieces: list[tuple[int, int, int]]) -> Tensor:
        """Documents start in the initial state, so nothing is left to reset: bool [B, ceil(T/quantum)]."""
        blocks = -(-(pieces[0][2] - pieces[0][1]) // self._model.quantum)
        return torch.zeros((len(pieces), blocks), dtype=torch.bool, device=self._device)

    def _record(self, window: Window, mode: str, nats: tuple[float, float]) -> None:
        whole = mode in WHOLE
        key = (window.document, window.span, mode, 0 if whole else window.length)
        piece = empty_score(self._documents, key, 0 if whole else window.start, window.first, window.stop)
        self._nats[key].append(nats)
        score = self._scores.setdefault(key, piece)
        if score is not piece:
            score.tokens += piece.tokens
            score.bytes += piece.bytes
            score.repeat_tokens += piece.repeat_tokens
            score.repeat_bytes += piece.repeat_bytes
            score.context_min = min(score.context_min, piece.context_min)
            score.context_max = max(score.context_max, piece.context_max)


def _cat(parts: list[State]) -> State:
    packed = [states.pack(part) for part in parts]
    return states.unpack({name: torch.cat([part[name] for part in packed]) for name in packed[0]})


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
