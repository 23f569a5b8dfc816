"""Corpus recipes: which documents, which of them are held out, where the shards go. Imports no torch."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field

from longspan.data_pipeline.source_config import Schema, SourceConfig
from longspan.data_pipeline.synthetic.config import synthetic_problems
from longspan.data_pipeline.tokenization.config import BytesTokenizerConfig, TokenizerConfig
from longspan.errors import Problem


class DedupeConfig(Schema):
    """Which documents count as near-duplicates; they are grouped before the corpus is split."""

    enabled: bool = Field(True, description="look for near-duplicates; exact ones are always found")
    shingle_words: int = Field(5, ge=1, le=64, description="words in a shingle; documents are sets of shingles")
    threshold: float = Field(0.7, gt=0, le=1, description="Jaccard similarity of two documents that joins them")
    num_perm: int = Field(128, ge=16, le=1024, description="numbers in a MinHash signature; the error is 1 / its root")
    exact: Literal["keep", "leave_out"] = Field(
        "keep", description="documents with the same text as one before: keep them in its group, or leave them out"
    )


class SplitConfig(Schema):
    """Which documents training never sees, besides the recipe's `held_out`."""

    held_out_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the groups that is held out, by a hash of the group"
    )
    duplicates: Literal["hold_out", "leave_out", "train"] = Field(
        "hold_out",
        description="a near-duplicate of a document in `held_out`: hold_out holds it out too; leave_out keeps it out "
        "of the corpus; train trains on it, which flatters every score",
    )


class CorpusConfig(Schema):
    """Everything that the shards of a corpus depend on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", description="name of the corpus")
    out: str | None = Field(None, min_length=1, description="folder to write; corpora/NAME if unset")
    shard_bytes: int = Field(
        64 * 2**20, ge=1, description="a shard is closed before a document would take its text above this"
    )
    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="where the documents come from")
    tokenizer: TokenizerConfig = Field(BytesTokenizerConfig(), description="what the text is stored as")
    dedupe: DedupeConfig = Field(DedupeConfig(), description="near-duplicates")
    split: SplitConfig = Field(SplitConfig(), description="held-out documents beyond the list")
    held_out: tuple[str, ...] = Field((), description="ids of the documents that training never sees")
    groups: dict[str, tuple[str, ...]] = Field(
        {}, description="near-duplicates by name of the group: all in training, or all held out"
    )


def corpus_problems(config: CorpusConfig) -> list[Problem]:
    """What is wrong between fields of a corpus recipe that are each right by themselves."""
    problems = [
        Problem(f"sources = {name}", "two sources of this name; document ids would collide. Rename one.")
        for name in _repeated([source.name for source in config.sources])
    ]
    problems += [Problem(f"held_out = {item}", "listed twice.") for item in _repeated(list(config.held_out))]
    grouped = [item for members in config.groups.values() for item in set(members)]
    problems += [Problem(f"groups = {item}", "in two groups; join them.") for item in _repeated(grouped)]
    held_out = set(config.held_out)
    for name, members in config.groups.items():
        inside = sorted(held_out & set(members))
        outside = sorted(set(members) - held_out)
        if inside and outside:
            what = f"{', '.join(inside)} held out, but not {', '.join(outside)}. Hold out all of a group or none."
            problems.append(Problem(f"groups.{name}", what))
    return problems + synthetic_problems(config.sources, held_out, config.dedupe.enabled)


def _repeated(items: list[str]) -> list[str]:
    return [item for item, count in Counter(items).items() if count > 1]
