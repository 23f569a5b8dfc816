"""What `longspan bench context-parallel` is told to do. Imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from longspan.modeling.config import LinearAttentionConfig, ModelConfig
from longspan.trainer.bench.settings import (
    CPU_MODELS,
    GPU_MODELS,
    PAPER_VOCABULARY,
    Checks,
    Common,
    nearest,
    read_model,
)

PARTS = ("step", "ring", "linear")
REPEAT, ROWS = 5, 4
GPU_SEGMENT_TOKENS, GPU_RING_TOKENS, GPU_LINEAR_TOKENS = 131072, 65536, (32768, 131072)
CPU_RING_TOKENS, CPU_LINEAR_TOKENS = 64, (64, 128)
LINEAR_MODEL = "hybrid_12l"
_CPU_LINEAR_SIZES = {"dim": 32, "num_heads": 2, "head_dim": 16, "ffn_dim": 64}


@dataclass(frozen=True)
class ContextParallelSettings(Common):
    """One sequence over several ranks, each a process with a GPU of its own.

    Attributes:
        repeat: timed calls of each case.
        nproc: ranks.
        parts: which of `PARTS`.
        model, rows, segment_tokens: of the step; N is the whole sequence, of which each rank holds a share.
        state_slices: numbers of slices in which the step's rows hand their states on.
        ring_tokens: a rank, of ring attention. ring_heads, ring_head_dim: its heads and their width.
        linear_model: whose first linear-attention layer to take. linear_tokens: a rank, of each case.
    """

    repeat: int
    nproc: int
    parts: tuple[str, ...]
    model: ModelConfig
    rows: int
    segment_tokens: int
    state_slices: tuple[int, ...]
    ring_tokens: int
    ring_heads: int
    ring_head_dim: int
    linear_model: ModelConfig
    linear_tokens: tuple[int, ...]

    @property
    def linear_layer(self) -> LinearAttentionConfig:
        """The layer of `linear_model`."""
        return next(layer for layer in self.linear_model.layers if isinstance(layer, LinearAttentionConfig))


def read_context_parallel_settings(args: argparse.Namespace, on_gpu: bool) -> ContextParallelSettings:
    """The checked settings.

    Args:
        args: as `longspan bench context-parallel` parses them.
        on_gpu: defaults for a GPU (the paper's model) or for a CPU (tiny).

    Raises:
        ConfigError: lists everything that is wrong with the options.
    """
    checks = Checks(args.benchmark)
    checks.at_least("--repeat", args.repeat)
    checks.at_least("--nproc", args.nproc, 2)
    for option in ("rows", "segment_tokens", "ring_tokens"):
        checks.at_least(f"--{option.replace('_', '-')}", getattr(args, option))
    rows = args.rows if args.rows and args.rows > 0 else ROWS
    parts, state_slices = _parts(args.parts, checks), _state_slices(args.state_slices, rows, checks)
    report = checks.file("--write-report", args.write_report)
    changes = {"dropout": 0.0, "vocab_size": PAPER_VOCABULARY if on_gpu else None}
    model = read_model(args.model or (GPU_MODELS if on_gpu else CPU_MODELS)[0], changes, checks.problems)
    linear_changes = {"dropout": 0.0, **({} if on_gpu else _CPU_LINEAR_SIZES)}
    linear_model = read_model(LINEAR_MODEL, linear_changes, checks.problems)
    tokens = _segment_tokens(args, model, on_gpu, checks)
    checks.finish()
    assert model is not None and linear_model is not None  # else there was a problem
    return ContextParallelSettings(
        precision=args.precision or ("bf16" if on_gpu else "fp32"),
        repeat=args.repeat or REPEAT,
        peers=(),
        profile=None,
        report=report,
        nproc=args.nproc,
        parts=parts,
        model=model,
        rows=rows,
        segment_tokens=tokens,
        state_slices=state_slices,
        ring_tokens=args.ring_tokens or (GPU_RING_TOKENS if on_gpu else CPU_RING_TOKENS),
        ring_heads=8 if on_gpu else 2,
        ring_head_dim=128 if on_gpu else 16,
        linear_model=linear_model,
        linear_tokens=GPU_LINEAR_TOKENS if on_gpu else CPU_LINEAR_TOKENS,
    )


def _segment_tokens(args: argparse.Namespace, model: ModelConfig | None, on_gpu: bool, checks: Checks) -> int:
    """N: as asked for, else the size for the device, rounded up to equal shares of two whole blocks or more."""
    if model is None or args.nproc < 2 or (args.segment_tokens or 1) < 1:
        return 0  # there is a problem already
    quantum = args.nproc * model.quantum
    wanted = GPU_SEGMENT_TOKENS if on_gpu else 2 * quantum
    tokens = args.segment_tokens or max(2, -(-wanted // quantum)) * quantum
    checks.multiple("--segment-tokens", tokens, f"--nproc x the quantum of {model.name}", quantum)
    return int(tokens)


def _parts(text: str, checks: Checks) -> tuple[str, ...]:
    """The parts that `--parts` names, each once and in the order of `PARTS`."""
    names = _names(text)
    for name in names:
        if name not in PARTS:
            checks.add(f"--parts {name}", f"unknown part.{nearest(name, PARTS)}")
    if not names:
        checks.add("--parts", f"names nothing. Known: {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in names)


def _state_slices(text: str, rows: int, checks: Checks) -> tuple[int, ...]:
    """The numbers that `--state-slices` names, each once."""
    names = _names(text)
    for name in names:
        if not name.isdecimal() or not 1 <= int(name) <= rows:
            checks.add(f"--state-slices {name}", f"must be a whole number from 1 to --rows = {rows}.")
    if not names:
        checks.add("--state-slices", "names nothing. Give one or more numbers, for example 1,2.")
    return tuple(dict.fromkeys(int(name) for name in names if name.isdecimal()))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
