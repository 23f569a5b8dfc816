"""Held-out loss while training: every document read with carried state, many at a time, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longspan.cluster.mesh import Mesh
from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import DocumentEntry
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.data_pipeline.vocabulary import NO_LABEL
from longspan.errors import DataError
from longspan.modeling import state as states
from longspan.trainer.config import RunConfig
from longspan.trainer.engine import Engine
from longspan.trainer.generation import NativeDecoder, as_text, generate

_SAMPLE_TEMPERATURE = 0.8

Segment = tuple[DocumentEntry, int]  # document, first token


@dataclass(frozen=True)
class ValidationResult:
    """What one validation found, the same on all ranks but for the sample.

    Attributes:
        loss: nats per token, exact over all scored tokens. bits_per_byte: nats of all of them but eos, over their
            bytes. Both NaN if there is nothing to score.
        num_bytes: scored bytes. num_bad_documents: documents that could not be read and were left out.
        sample: text that the model continued the prompt with, on rank 0; None if not asked for.
    """

    loss: float
    bits_per_byte: float
    num_bytes: int
    num_bad_documents: int
    sample: str | None

    def record(self) -> dict[str, Any]:
        """Fields of the log record."""
        fields = {
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "bytes": self.num_bytes,
            "bad_documents": self.num_bad_documents,
        }
        return fields if self.sample is None else {**fields, "sample": self.sample}


class Validation:
    """The first `max_document_tokens` of each held-out document, each token scored once."""

    def __init__(
        self,
        config: RunConfig,
        entries: list[DocumentEntry],
        documents: DocumentReader,
        tokenizer: Tokenizer | None,
        mesh: Mesh,
    ) -> None:
        """
        Args:
            config: segment length, quantum, limit per document, sample; a rank runs as many documents at once as
                lanes in a micro-batch.
            entries: held-out documents; documents: reads them.
            tokenizer: of the corpus, for the sample; None without one.
            mesh: ranks that share the work.
        """
        self._settings = config.validation
        self._seed = config.seed
        self._documents = documents
        self._tokenizer = tokenizer
        self._vocabulary = documents.manifest.vocabulary
        self._mesh = mesh
        self._length = config.data.segment_tokens
        self._quantum = config.model.quantum
        # one more token than is fed: the last label
        self._limit = config.validation.max_document_tokens + 1
        rows = assign_rows(
            [(entry, -(-(self._tokens_of(entry) - 1) // self._length)) for entry in entries],
            mesh.dp_cp_size * config.training.micro_batch_lanes,
        )
        segments = [[(entry, i * self._length) for entry, count in row for i in range(count)] for row in rows]
        # the longest rows first on each rank, so that rows which end leave a prefix
        self._rows: list[list[Segment]] = segments[mesh.data_rank :: mesh.dp_cp_size] or [[]]
        self.num_forwards = len(segments[0]) if segments else 0
        self._bad: set[str] = set()

    def run(self, engine: Engine, interrupted: Callable[[], bool]) -> ValidationResult | None:
        """Score everything; None if `interrupted` says so on any rank. All ranks do equally many forwards."""
        device = self._mesh.device
        nats = torch.zeros(2, dtype=torch.float64, device=device)
        counts = torch.zeros(2, dtype=torch.float64, device=device)
        with engine.evaluating() as model:
            state = model.init_state(len(self._rows), device)
            rows = len(self._rows)
            for index in range(self.num_forwards):
                if self._mesh.any_rank(interrupted()):
                    return None
                active = max(1, sum(len(row) > index for row in self._rows))
                if active < rows:
                    rows, state = active, states.index_select(state, torch.arange(active))
                tokens, labels, reset, target_bytes = (part.to(device) for part in self._batch(index, active))
                nll, state, _ = model(tokens, state, reset=reset, labels=labels)
                nats += torch.stack([nll.sum(), (nll * (labels != self._vocabulary.eos)).sum()])
                counts += torch.stack([(labels != NO_LABEL).sum(), target_bytes.sum()])
        bad = counts.new_tensor([len(self._bad)])
        sums = self._mesh.sum_over_data(torch.cat([nats, counts, bad])).tolist()
        loss, byte_nats, num_tokens, num_bytes, num_bad = sums
        return ValidationResult(
            loss=loss / num_tokens if num_tokens else math.nan,
            bits_per_byte=byte_nats / num_bytes / math.log(2) if num_bytes else math.nan,
            num_bytes=int(num_bytes),
            num_bad_documents=int(num_bad),
            sample=self._sample(engine),
        )

    def _sample(self, engine: Engine) -> str | None:
        settings, tokenizer = self._settings, self._tokenizer
        # of the ranks that have a model together, and with sharded parameters of all, each must take part
        if tokenizer is None or (self._mesh.rank >= self._mesh.tp_size and engine.stage < 3):
            return None
        with engine.evaluating() as model:
            prompt = settings.sample_prompt.encode()
            ids = generate(
                NativeDecoder(model, self._mesh.device),
                tokenizer,
                prompt,
                max_new_tokens=settings.sample_tokens,
                temperature=_SAMPLE_TEMPERATURE,
                top_p=1.0,
                seed=self._seed,  # a generator of its own: sampling never changes a training run
            )
            return "".join(as_text(ids, tokenizer, tokenizer.encode(prompt).ids[:-1].tolist()))

    def _tokens_of(self, entry: DocumentEntry) -> int:
        return min(entry.num_tokens, self._limit)

    def _batch(self, index: int, rows: int) -> tuple[torch.Tensor, ...]:
        """Tokens, labels [rows, T], reset [rows, T/Q] and target bytes [rows, T] of the index-th segments."""
        tokens = np.full((rows, self._length), self._vocabulary.pad, dtype=np.int64)
        labels = np.full((rows, self._length), NO_LABEL, dtype=np.int64)
        target_bytes = np.zeros((rows, self._length), dtype=np.int32)
        reset = np.zeros((rows, self._length // self._quantum), dtype=bool)
        for row, segments in enumerate(self._rows[:rows]):
            if index < len(segments):
                entry, start = segments[index]
                reset[row, 0] = start == 0
                ids, num_bytes = self._read(entry, start)
                tokens[row, : len(ids) - 1] = ids[:-1]
                labels[row, : len(ids) - 1] = ids[1:]
                target_bytes[row, : len(ids) - 1] = num_bytes[1:]
        return tuple(torch.from_numpy(array) for array in (tokens, labels, reset, target_bytes))

    def _read(self, entry: DocumentEntry, start: int) -> tuple[np.ndarray, np.ndarray]:
        """The segment's tokens and the one after them, and their bytes; one pad for a document that cannot be read."""
        if entry.id not in self._bad:
            try:
                stop = min(start + self._length + 1, self._tokens_of(entry))
                ids = self._documents.token_range(entry, start, stop)
                return ids, self._documents.target_bytes_range(entry, start, stop)
            except DataError:
                self._bad.add(entry.id)
        return np.array([self._vocabulary.pad]), np.zeros(1, dtype=np.int32)


def assign_rows(items: list[tuple[DocumentEntry, int]], max_rows: int) -> list[list[tuple[DocumentEntry, int]]]:
    """Spread documents with their numbers of segments over rows, the longest first to the shortest row.

    Returns:
        Rows, longest first; fewer than `max_rows` if there are fewer documents. All ranks compute the same.
    """
    rows: list[list[tuple[DocumentEntry, int]]] = [[] for _ in range(min(max_rows, len(items)))]
    loads = [0] * len(rows)
    for entry, count in sorted(items, key=lambda item: (-item[1], item[0].id)):
        row = loads.index(min(loads))
        rows[row].append((entry, count))
        loads[row] += count
    return [row for _, row in sorted(zip(loads, rows, strict=True), key=lambda pair: -pair[0])]
