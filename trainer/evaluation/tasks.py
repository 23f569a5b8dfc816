"""Synthetic tasks as an evaluation: which samples a checkpoint gets wholly right, by size, for every seed.

Samples are made here from the spec, read in the checkpoint's own tokenizer as documents that stream from their start
with carried state, and counted: a sample is right when the model's best guess is right at every token of its answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from longspan.data_pipeline.synthetic.documents import answer_of_tokens
from longspan.data_pipeline.synthetic.scoring import right_samples
from longspan.modeling import state as states
from longspan.modeling.model import LanguageModel
from longspan.trainer.checkpoint.load import LoadedModel, read_tokenizer
from longspan.trainer.evaluation.describe import describe
from longspan.trainer.evaluation.specs import GENERATORS, TaskSpec
from longspan.trainer.evaluation.task_documents import Tally, TaskDocument, make_documents, size_bins
from longspan.trainer.evaluation.task_result import summarise_tasks
from longspan.trainer.evaluation.windows import STREAM_TOKENS

_MOST_LOGITS = 2**27  # that exist at the same time: 512 MiB in fp32


@dataclass(frozen=True)
class PreparedTasks:
    """An evaluation on a task laid out; its documents can be scored in parts, by several processes."""

    score_type: ClassVar[type[Tally]] = Tally

    loaded: LoadedModel
    model: LanguageModel
    spec: TaskSpec
    key: str
    documents: list[TaskDocument]
    device: torch.device | str

    def score(
        self, only: Collection[int] | None = None, progress: Callable[[float], None] | None = None
    ) -> list[Tally]:
        """Counts of these documents (indices; all if None), by document and size."""
        chosen = sorted(range(len(self.documents)) if only is None else only, key=lambda d: self._length(d))
        rows = max(1, self.spec.batch_tokens // STREAM_TOKENS)
        work, done, found = sum(map(self._length, chosen)), 0, []
        with torch.inference_mode():
            for start in range(0, len(chosen), rows):
                group = chosen[start : start + rows]
                found += self._score_group(group)
                done += sum(map(self._length, group))
                if progress is not None:
                    progress(done / work)
        return sorted(found, key=lambda tally: tally.key)

    def assemble(self, tallies: Sequence[Tally]) -> dict[str, Any]:
        """result.json without `seconds`, from the counts of all documents."""
        return {
            "key": self.key,
            "kind": "synthetic",
            "protocol": GENERATORS,
            "spec": self.spec.canonical(),
            "spec_digest": self.spec.digest,
            **describe(self.loaded, self.device),
            "data": {"digest": self.spec.dataset_digest, "split": "test", "suite": self.spec.suite},
            **summarise_tasks(tallies, self.documents, self.spec),
        }

    def zeros(self) -> list[Tally]:
        """Every count that there will be, before anything is counted."""
        return [tally for document in range(len(self.documents)) for tally in self._zeros_of(document)]

    def shares(self, ranks: int) -> list[list[int]]:
        """Documents of each rank, of about equal work."""
        order = sorted(range(len(self.documents)), key=lambda d: -self._length(d))
        return [order[rank::ranks] for rank in range(ranks)]

    def _zeros_of(self, document: int) -> list[Tally]:
        every = [Tally(document, number) for number in range(len(size_bins(self.spec)))]
        return [tally for tally in every if self._inside(tally).any()]

    def _inside(self, tally: Tally) -> np.ndarray:
        low, high = size_bins(self.spec)[tally.bin]
        sizes = self.documents[tally.document].made.sizes
        return (sizes >= low) & (sizes <= high)

    def _length(self, document: int) -> int:
        return len(self.documents[document].tokens)

    def _score_group(self, group: list[int]) -> list[Tally]:
        """Stream documents together; the shorter ones are padded, which comes after all that is asked."""
        width = max(map(self._length, group))
        tokens = np.zeros((len(group), width), dtype=np.int64)
        for row, document in enumerate(group):
            tokens[row, : self._length(document)] = self.documents[document].tokens
        right, nats = self._guesses(torch.from_numpy(tokens).to(self.device))
        found = []
        for row, document in enumerate(group):
            length = self._length(document)
            found += self._count(document, right[row, :length], nats[row, :length])
        return found

    def _count(self, number: int, right: np.ndarray, nats: np.ndarray) -> list[Tally]:
        """Counts of one document: `right` bool [n], whether each token was guessed; `nats` float64 [n], its loss."""
        document = self.documents[number]
        made = document.made
        answer_of = answer_of_tokens(made, document.token_bytes)
        whole = right_samples(made, answer_of, right)
        sample_of = np.where(answer_of >= 0, made.sample_of[np.maximum(answer_of, 0)], -1)
        found = self._zeros_of(number)
        for tally in found:
            inside = self._inside(tally)
            asked = (sample_of >= 0) & inside[np.maximum(sample_of, 0)]
            tally.right, tally.total = int(np.count_nonzero(whole & inside)), int(np.count_nonzero(inside))
            tally.nats = math.fsum(nats[asked].tolist())
            tally.tokens, tally.bytes = int(np.count_nonzero(asked)), int(document.token_bytes[asked].sum())
        return found

    def _guesses(self, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Whether the best guess for each token was it, bool [B, T], and its loss, float64 [B, T]; bos is not asked."""
        rows, width = tokens.shape
        quantum, vocab = self.model.quantum, self.model.embedding.weight.shape[0]
        most = min(self.spec.batch_tokens, _MOST_LOGITS // vocab)
        segment = max(1, most // rows // quantum) * quantum
        state = self.model.init_state(rows, tokens.device)
        right = torch.ones(rows, width, dtype=torch.bool, device=tokens.device)
        nats = torch.zeros(rows, width, dtype=torch.float64, device=tokens.device)
        for start in range(0, width - 1, segment):
            stop = min(start + segment, width - 1)
            labels = tokens[:, start + 1 : stop + 1]
            reset = torch.zeros(rows, -(-(stop - start) // quantum), dtype=torch.bool, device=tokens.device)
            logits, state, _ = self.model(tokens[:, start:stop].contiguous(), state, reset=reset)
            right[:, start + 1 : stop + 1] = logits.argmax(dim=-1) == labels
            chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            nats[:, start + 1 : stop + 1] = (torch.logsumexp(logits, dim=-1) - chosen).double()
            state = states.detach(state)
        return right.cpu().numpy(), nats.cpu().numpy()


def prepare_tasks(
    loaded: LoadedModel, model: LanguageModel, spec: TaskSpec, key: str, device: torch.device | str
) -> PreparedTasks:
    """Make the samples in the tokens of the checkpoint's tokenizer.

    Raises:
        UsageError: a test set has no strings, or this machine cannot use the tokenizer.
    """
    return PreparedTasks(loaded, model, spec, key, make_documents(spec, read_tokenizer(loaded.path)), device)


class NoCorpus:
    """Stands where the reader of a corpus does: samples of tasks are made, not read."""

    def close(self) -> None:
        """Nothing is open."""
