"""The corpus of a run: manifest, documents and lane plan, checked against the configuration before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.plan import LanePlan
from longspan.errors import UsageError
from longspan.trainer.config import RunConfig


@dataclass(frozen=True)
class DataSource:
    """What training and validation read."""

    manifest: Manifest
    documents: DocumentReader
    plan: LanePlan


def open_data(config: RunConfig) -> DataSource:
    """Open the shards that `config.data` names and lay the lane plan over them.

    Raises:
        UsageError: the shards are not there (names the command that builds them), or do not fit the model.
        DataError: the manifest is damaged.
    """
    data = config.data
    if not (Path(data.shards) / "manifest.json").is_file():
        build = f"longspan data build {data.recipe or 'RECIPE'} --out {data.shards}"
        raise UsageError(
            f"data.shards = {data.shards}: there is no corpus (no manifest.json). "
            f"Build it with `{build}`, or point data.shards at a folder that it wrote."
        )
    manifest = Manifest.load(data.shards)
    if manifest.vocabulary.padded_size > config.model.vocab_size:
        raise UsageError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the vocabulary of {data.shards} "
            f"({manifest.vocabulary.padded_size}). Set model.vocab_size={manifest.vocabulary.padded_size}."
        )
    plan = LanePlan(
        manifest,
        split="train",
        seed=config.seed,
        lanes=data.lanes,
        segment_tokens=data.segment_tokens,
        quantum=config.model.quantum,
        boundary=data.boundary,
        source_weights=data.source_weights,
        max_document_tokens=data.max_document_tokens,
    )
    return DataSource(manifest, DocumentReader(manifest), plan)
