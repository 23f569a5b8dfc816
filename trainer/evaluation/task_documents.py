"""The samples of a synthetic task's test sets as documents in a model's tokens, and what is counted on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.data_pipeline.synthetic.documents import SyntheticDocument
from longspan.data_pipeline.synthetic.samples import Sample
from longspan.data_pipeline.synthetic.suites import SUITES
from longspan.data_pipeline.synthetic.tasks import distinct
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.errors import UsageError
from longspan.trainer.evaluation.specs import TaskSpec


@dataclass(frozen=True)
class TaskDocument:
    """Samples of one test set and seed, in tokens.

    Attributes:
        test, seed: what it was drawn from.
        tokens: int64 [n], bos first, eos last. token_bytes: int [n].
        made: the samples and their answers.
    """

    test: str
    seed: int
    tokens: np.ndarray
    token_bytes: np.ndarray
    made: SyntheticDocument


@dataclass
class Tally:
    """Counts over the samples of one document within one range of sizes.

    Attributes:
        document: its number. bin: number of the range of sizes.
        right, total: samples. tokens, bytes: of the answers. nats: negative log-likelihood of the answers.
    """

    NUMBERS: ClassVar[tuple[str, ...]] = ("right", "total", "nats", "tokens", "bytes")

    document: int
    bin: int
    right: int = 0
    total: int = 0
    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """What it counts."""
        return self.document, self.bin


def size_bins(spec: TaskSpec) -> tuple[tuple[int, int], ...]:
    """Ranges of sizes that are counted apart; one that holds everything if the spec names none."""
    return spec.size_bins or ((0, 2**62),)


def make_documents(spec: TaskSpec, tokenizer: Tokenizer) -> list[TaskDocument]:
    """All documents of a spec, in the tokens of one tokenizer.

    Raises:
        UsageError: a test set has no strings, or one of them or a range of sizes would count no sample.
    """
    documents = []
    for test in spec.test_names:
        for seed in spec.seeds:
            for made in _joined(_draw(spec, test, seed), spec.document_bytes):
                encoded = tokenizer.encode(made.text)
                tokens, token_bytes = encoded.ids.astype(np.int64), encoded.num_bytes.astype(np.int64)
                documents.append(TaskDocument(test, seed, tokens, token_bytes, made))
    _check_bins(spec, documents)
    return documents


def _check_bins(spec: TaskSpec, documents: list[TaskDocument]) -> None:
    """See that every range of sizes counts a sample, and that every test set has one that is counted."""
    sizes = {
        test: np.concatenate([document.made.sizes for document in documents if document.test == test])
        for test in spec.test_names
    }
    counted = {
        (low, high): [test for test, found in sizes.items() if ((found >= low) & (found <= high)).any()]
        for low, high in size_bins(spec)
    }
    problems = [f"no sample has a size from {low} to {high}" for (low, high), tests in counted.items() if not tests]
    with_some = {test for tests in counted.values() for test in tests}
    problems += [f"no sample of test set {test} is counted" for test in sizes if test not in with_some]
    if problems:
        ranges = ", ".join(f"{test}: {found.min()} to {found.max()}" for test, found in sizes.items())
        raise UsageError(
            f"size_bins of {spec.name}: {'; '.join(problems)}. Sizes of the samples are {ranges}. Change size_bins, "
            "tests or samples."
        )


def _draw(spec: TaskSpec, test: str, seed: int) -> list[Sample]:
    """As many different samples as wanted, or as there are."""
    samples: list[Sample] = []
    try:
        for sample in distinct(SUITES[spec.suite].tests[test], seed, spec.samples, "test"):
            samples.append(sample)
    except UsageError:
        if not samples:  # else there are fewer, and the result says how many
            raise
    return samples


def _joined(samples: list[Sample], document_bytes: int) -> list[SyntheticDocument]:
    """Samples one a line, in documents of so many bytes or more; two documents at least, so that they can differ."""
    limit = min(document_bytes, max(1, sum(len(sample.text) + 1 for sample in samples) // 2))
    groups: list[list[Sample]] = []
    room = 0
    for sample in samples:
        if room <= 0:
            groups.append([])
            room = limit
        groups[-1].append(sample)
        room -= len(sample.text) + 1
    return [_document(group) for group in groups]


def _document(samples: list[Sample]) -> SyntheticDocument:
    starts = np.cumsum([0] + [len(sample.text) + 1 for sample in samples[:-1]])
    return SyntheticDocument(
        name="test",
        text=b"\n".join([sample.text for sample in samples] + [b""]),
        answers=np.concatenate([sample.answers + start for sample, start in zip(samples, starts, strict=True)]),
        sample_of=np.repeat(np.arange(len(samples)), [len(sample.answers) for sample in samples]),
        sizes=np.array([sample.size for sample in samples], dtype=np.int64),
    )
