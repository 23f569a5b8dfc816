"""The corpus of a run: manifest, documents and lane plan, checked against the configuration before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.fork import continue_plan
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.plan_snapshots import plan_cache_folder
from longspan.data_pipeline.reader import LaneReader
from longspan.data_pipeline.storage.addresses import is_url
from longspan.data_pipeline.streaming import StreamedDocuments
from longspan.data_pipeline.streaming_plan import StreamPlan
from longspan.errors import UsageError
from longspan.trainer.config import RunConfig
from longspan.trainer.shards import open_shards


@dataclass(frozen=True)
class DataSource:
    """What training and validation read."""

    manifest: Manifest
    documents: DocumentReader
    plan: LanePlan

    def lane_reader(self, lane_start: int, lane_stop: int) -> LaneReader:
        """Batches of lanes `lane_start` to `lane_stop`, read as the plan wants it."""
        if isinstance(self.plan, StreamPlan):
            documents = StreamedDocuments(self.plan, self.documents, lane_start, lane_stop)
            return LaneReader(self.plan, documents, lane_start, lane_stop)
        return LaneReader(self.plan, self.documents, lane_start, lane_stop)

    def resumed(self, state: Mapping[str, Any], *, allow_fork: bool) -> DataSource:
        """What to go on reading after a checkpoint: by the saved plan and its history, or a fork of it.

        Args:
            state: of the data, as the checkpoint has it.
            allow_fork: where weights, segment, lanes or boundary are other ones now, go on with these from there.

        Raises:
            UsageError: settings differ and no fork is allowed, or differ in what no fork can change; names them all.
            DataError: the state is damaged.
        """
        plan = continue_plan(self.plan, state, allow_fork=allow_fork, snapshots=plan_cache_folder())
        return replace(self, plan=plan)


def open_data(config: RunConfig) -> DataSource:
    """Open the shards that `config.data` names and lay the lane plan over them.

    Raises:
        UsageError: the shards are not there (names the command that builds them) or not reachable, or do not fit the
            model. DataError: the manifest is damaged. SecurityError: shards from a program that is not allowed.
    """
    data = config.data
    if not is_url(data.shards) and not (Path(data.shards) / "manifest.json").is_file():
        build = f"longspan data build {data.recipe or 'RECIPE'} --out {data.shards}"
        raise UsageError(
            f"data.shards = {data.shards}: there is no corpus (no manifest.json). "
            f"Build it with `{build}`, or point data.shards at a folder that it wrote."
        )
    documents = open_shards(data.shards, data)
    vocabulary = documents.manifest.vocabulary
    if vocabulary.padded_size > config.model.vocab_size:
        raise UsageError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the vocabulary of {data.shards} "
            f"({vocabulary.padded_size}). Set model.vocab_size={vocabulary.padded_size}."
        )
    return DataSource(documents.manifest, documents, _plan(config, documents.manifest))


def _plan(config: RunConfig, manifest: Manifest) -> LanePlan:
    data = config.data
    settings: dict[str, Any] = {
        "split": "train",
        "seed": config.seed,
        "lanes": data.lanes,
        "segment_tokens": data.segment_tokens,
        "quantum": config.model.quantum,
        "boundary": data.boundary,
        "max_document_tokens": data.max_document_tokens,
        "snapshots": plan_cache_folder(),
    }
    if data.reader == "ranged":
        return LanePlan(manifest, source_weights=data.source_weights, **settings)
    if data.source_weights is not None:
        raise UsageError(
            "data.source_weights cannot be had with data.reader = streaming, which reads shards as they are. "
            "Set data.reader=ranged, or leave the weights out."
        )
    return StreamPlan(manifest, **settings)
