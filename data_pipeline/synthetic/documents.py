"""Synthetic tasks as documents of a corpus, and the way back from a document to its answers.

A document is `text` alone; its answers are made again from the source's configuration, which the manifest keeps as the
source's origin, and the document's name. Nothing but the manifest is needed to score a model on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import ValidationError

from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceDocument, SourceText
from longspan.data_pipeline.synthetic.config import SyntheticConfig
from longspan.data_pipeline.synthetic.tasks import sample
from longspan.errors import UsageError

_STRIDE = 2**32  # indices of samples that belong to one document
_ORIGIN = "synthetic "
_NAME = re.compile(r"(train|test)-(\d{6})")


@dataclass(frozen=True)
class SyntheticDocument:
    """Samples of one task, one a line, and where their answers are.

    Attributes:
        name: `train-000000` or `test-000000`, the id within its source.
        text: ends with a newline.
        answers: int64 [answers, 2], first byte and the byte after the last of each in `text`, in order, disjoint.
        sample_of: int64 [answers], the sample that each answer belongs to, from 0.
        sizes: int64 [samples], each sample's size in its task's unit.
    """

    name: str
    text: bytes
    answers: np.ndarray
    sample_of: np.ndarray
    sizes: np.ndarray


def make_document(config: SyntheticConfig, split: Literal["train", "test"], index: int) -> SyntheticDocument:
    """Document `index` of a split: samples until there are `document_bytes`. A pure function; cost O(its size).

    Raises:
        UsageError: the task's sizes leave the split without strings.
    """
    texts: list[bytes] = []
    spans, sample_of, sizes = [], [], []
    length = 0
    while length < config.document_bytes:
        drawn = sample(config.task, config.seed, index * _STRIDE + len(texts), split)
        spans.append(drawn.answers + length)
        sample_of.append(np.full(len(drawn.answers), len(texts), dtype=np.int64))
        sizes.append(drawn.size)
        texts.append(drawn.text)
        length += len(drawn.text) + 1
    text = b"\n".join([*texts, b""])
    return SyntheticDocument(
        f"{split}-{index:06d}", text, np.concatenate(spans), np.concatenate(sample_of), np.array(sizes, dtype=np.int64)
    )


def read_synthetic(config: SyntheticConfig) -> SourceText:
    """All documents of the source, those for training first."""
    return SourceText(_documents(config), _ORIGIN + config.model_dump_json(), Tally(config.name))


def _documents(config: SyntheticConfig) -> Iterator[SourceDocument]:
    for index in range(config.documents):
        yield _packed(make_document(config, "train", index))
    for index in range(config.test_documents):
        yield _packed(make_document(config, "test", index))


def _packed(document: SyntheticDocument) -> SourceDocument:
    return SourceDocument(document.name, document.text)


def document_again(origin: str, name: str) -> SyntheticDocument:
    """The document of a corpus with its answers.

    Args:
        origin: of its source, from the manifest.
        name: its id without the source, e.g. `test-000000`.

    Raises:
        UsageError: the source is not synthetic, or it has no such document.
    """
    found = _NAME.fullmatch(name)
    try:
        config = SyntheticConfig.model_validate_json(origin.removeprefix(_ORIGIN))
    except ValidationError as error:
        raise UsageError(
            f"origin {origin[:80]!r} is not that of a synthetic source of this version: "
            f"{error.errors()[0]['msg'].lower()}. Build the corpus again, or score documents of a synthetic source."
        ) from None
    held = {"train": config.documents, "test": config.test_documents}
    if not found or int(found[2]) >= held[found[1]]:
        raise UsageError(
            f"source {config.name} has no document {name}; it has {held['train']} from train-000000 on "
            f"and {held['test']} from test-000000 on."
        )
    return make_document(config, "train" if found[1] == "train" else "test", int(found[2]))


def answer_of_tokens(document: SyntheticDocument, token_bytes: np.ndarray) -> np.ndarray:
    """The number of the answer that each token belongs to, -1 for the others: int64 [tokens].

    Args:
        token_bytes: [tokens], bytes of text that each token stands for, 0 for specials; they sum to the text. A token
            that reaches over an answer's edge belongs to the answer.
    """
    stops = np.cumsum(token_bytes, dtype=np.int64)
    starts = stops - token_bytes
    # the first answer that ends after the start
    nearest = np.searchsorted(document.answers[:, 1], starts, side="right")
    known = np.minimum(nearest, len(document.answers) - 1)
    reached = (nearest < len(document.answers)) & (document.answers[known, 0] < stops)
    inside = reached & (np.asarray(token_bytes) > 0)
    return np.where(inside, nearest, -1)
