"""Configuration of the process layout. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# phases of training whose limit is a multiple of timeout_seconds: kernels are compiled, much is written
PHASE_ALLOWANCES = {"start": 4.0, "first step": 4.0, "save": 4.0, "validation": 4.0}
LONGEST_ALLOWANCE = max(PHASE_ALLOWANCES.values())


class ParallelConfig(BaseModel):
    """world = dp x cp x tp; dp follows from the number of processes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tp: int = Field(1, ge=1, description="tensor-parallel ranks")
    cp: int = Field(1, ge=1, description="context-parallel ranks")
    state_grad: Literal["full", "truncate"] = Field(
        "full", description="whether a recurrent state's gradient crosses from one context-parallel rank to the next"
    )
    state_slices: int = Field(
        1, ge=1, description="parts of a micro-batch in which recurrent state is handed on, so that ranks overlap"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="what DeepSpeed shards over dp x cp")
    offload_optimizer: bool = Field(
        False, description="fp32 weights and optimizer state in the host's memory; the update runs there"
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="a rank without progress for so long is hung; four times as long in starts and saves"
    )
