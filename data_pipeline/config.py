"""Configuration of training data: which shards, how many lanes, how long a segment. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DataConfig(BaseModel):
    """What a training run reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    shards: str = Field(
        description="folder that `longspan data build` wrote, or where it lies: http(s)://, s3://, gs://, memory://"
    )
    recipe: str | None = Field(
        None, description="recipe that builds the shards; named in the advice when they are missing"
    )
    reader: Literal["ranged", "streaming"] = Field(
        "ranged",
        description="ranged: documents in random order, by byte offset; streaming: shards in random order, each read "
        "once from front to back",
    )
    cache_dir: str | None = Field(
        None, description="where shards of a URL are kept; ~/.cache/longspan if unset. Processes may share it"
    )
    cache_gib: float = Field(
        64.0, ge=0, description="most that the cache may take; 0 reads documents by byte ranges, without a cache"
    )
    allowed_pipes: list[str] = Field(
        default_factory=list,
        description="programs that shards may come from as `pipe:PROGRAM ... {} ...`; none if empty",
    )
    segment_tokens: int = Field(
        4096, ge=1, description="N: tokens of one lane in one step, a multiple of model.window_tokens"
    )
    lanes: int = Field(8, ge=1, description="rows of the global batch; each streams one document in order")
    boundary: Literal["pack", "pad"] = Field(
        "pack", description="where the next document starts: next quantum edge of the same segment, or next segment"
    )
    source_weights: dict[str, float] | None = Field(
        None, description="share of tokens per source, which sum to 1; by size if unset"
    )
    max_document_tokens: int | None = Field(None, ge=1, description="cut longer documents into documents of their own")
