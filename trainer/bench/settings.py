"""What each benchmark is told to do: options checked together, defaults by device. Imports no torch."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.errors import ConfigError, LongspanError, Problem
from longspan.modeling.config import ActivationCheckpointing, BlockRecurrentConfig, ModelConfig
from longspan.trainer import recipes
from longspan.trainer.bench.catalogue import BENCHMARKS
from longspan.trainer.config import untrained_state_problems

PAPER_VOCABULARY = 32128
GPU_SEGMENT_TOKENS, CHAIN_BLOCKS = 4096, 64
GPU_MODELS = ("rec_fixed_skip_12l", "slide_13l")
CPU_MODELS = ("rec_fixed_skip_quickstart", "slide_quickstart")


@dataclass(frozen=True)
class Common:
    """Options that all benchmarks have.

    Attributes:
        precision: of weights and activations.
        repeat: timed calls; None: as many as fill about a second and a half.
        peers: names of the peers to race.
        profile: file for the most expensive kernels of one call, or None.
        report: Markdown file to append the results to, or None.
    """

    precision: str
    repeat: int | None
    peers: tuple[str, ...]
    profile: Path | None
    report: Path | None


@dataclass(frozen=True)
class StepSettings(Common):
    """Of `longspan bench step`: B rows of N tokens through each model.

    Attributes:
        in_turns: contenders run in turns, all in memory at once.
    """

    models: tuple[ModelConfig, ...]
    rows: int
    segment_tokens: int
    activation_checkpointing: ActivationCheckpointing
    optimizer: str
    in_turns: bool


@dataclass(frozen=True)
class ChainSettings(Common):
    """Of `longspan bench block-recurrent`: the model's first recurrent layer.

    Attributes:
        chain_rows: batch sizes of the chain.
        chain_blocks: blocks of W tokens in it.
        mixer_shapes: (B, N) of the whole mixer.
    """

    model: ModelConfig
    chain_rows: tuple[int, ...]
    chain_blocks: int
    mixer_shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class WindowSettings(Common):
    """Of `longspan bench window-attention`: shapes (B, T), W, H and Dh."""

    shapes: tuple[tuple[int, int], ...]
    window_tokens: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class LossSettings(Common):
    """Of `longspan bench cross-entropy`: (tokens, dim, vocabulary) of each case."""

    cases: tuple[tuple[int, int, int], ...]


class Checks:
    """Collects what is wrong with a command line."""

    def __init__(self, benchmark: str) -> None:
        """Args: benchmark: its name in the catalogue."""
        self.benchmark = benchmark
        self.problems: list[Problem] = []

    def add(self, where: str, what: str) -> None:
        """One more problem."""
        self.problems.append(Problem(where, what))

    def at_least(self, option: str, value: int | None, least: int = 1) -> None:
        """`value`, if given, is not below `least`."""
        if value is not None and value < least:
            self.add(f"{option} = {value}", f"must be {least} or more.")

    def multiple(self, option: str, value: int, of: str, quantum: int) -> None:
        """`value` is a multiple of `quantum`, which is called `of`."""
        if value % quantum:
            below, above = value // quantum * quantum, -(-value // quantum) * quantum
            near = f"{below} or {above}" if below else str(above)
            self.add(f"{option} = {value}", f"not a multiple of {of} = {quantum}. Nearest: {near}.")

    def file(self, option: str, path: str | None) -> Path | None:
        """A file that can be written, or None if it is not asked for."""
        if path is not None and not Path(path).parent.is_dir():
            self.add(f"{option} {path}", f"there is no folder {Path(path).parent}. Create it.")
        elif path is not None and Path(path).is_dir():
            self.add(f"{option} {path}", "is a folder. Name a file.")
        return Path(path) if path else None

    def finish(self) -> None:
        """Raises ConfigError if there is a problem."""
        if self.problems:
            advice = f"See `longspan bench {self.benchmark} --help`."
            raise ConfigError(f"longspan bench {self.benchmark}", self.problems, advice)


def read_settings(args: argparse.Namespace, on_gpu: bool) -> Common:
    """The checked settings of one benchmark.

    Args:
        args: as `longspan bench NAME` parses them; `args.benchmark` is the name.
        on_gpu: defaults for a GPU (the paper's sizes) or for a CPU (tiny).

    Raises:
        ConfigError: lists everything that is wrong with the options.
    """
    readers: dict[str, Callable[..., Common | None]] = {
        "step": _step,
        "block-recurrent": _chain,
        "window-attention": _window,
        "cross-entropy": _losses,
    }
    checks = Checks(args.benchmark)
    common = _common(args, on_gpu, checks)
    settings = readers[args.benchmark](args, on_gpu, checks, common)
    checks.finish()
    assert settings is not None  # else there was a problem
    return settings


def _common(args: argparse.Namespace, on_gpu: bool, checks: Checks) -> dict[str, Any]:
    checks.at_least("--repeat", args.repeat)
    return {
        "precision": args.precision or ("bf16" if on_gpu else "fp32"),
        "repeat": args.repeat,
        "peers": read_peers(args.peers, checks),
        "profile": checks.file("--profile", args.profile),
        "report": checks.file("--write-report", args.write_report),
    }


def read_peers(text: str, checks: Checks) -> tuple[str, ...]:
    """The peers that `--peers` names: all, none, or names with commas between them."""
    known = tuple(BENCHMARKS[checks.benchmark].peers)
    if text in ("all", "none"):
        return known if text == "all" else ()
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in known:
            checks.add(f"--peers {name}", f"unknown peer.{nearest(name, (*known, 'all', 'none'))}")
    return names


def _step(args: argparse.Namespace, on_gpu: bool, checks: Checks, common: dict[str, Any]) -> StepSettings:
    given = [name.strip() for text in args.model for name in text.split(",") if name.strip()]
    checks.at_least("--rows", args.rows)
    checks.at_least("--segment-tokens", args.segment_tokens)
    checks.at_least("--vocab-size", args.vocab_size, 2)
    if not 0 <= args.dropout < 1:
        checks.add(f"--dropout = {args.dropout}", "must be 0 or more and less than 1.")
    changes = {"dropout": args.dropout, "vocab_size": args.vocab_size or (PAPER_VOCABULARY if on_gpu else None)}
    models = [read_model(name, changes, checks.problems) for name in given or (GPU_MODELS if on_gpu else CPU_MODELS)]
    known = [model for model in models if model is not None]
    window = max((model.window_tokens for model in known), default=1)
    tokens = args.segment_tokens or (-(-GPU_SEGMENT_TOKENS // window) if on_gpu else 4) * window
    if tokens > 0:
        for model in known:
            checks.multiple("--segment-tokens", tokens, f"window_tokens of {model.name}", model.window_tokens)
            checks.problems += untrained_state_problems(model, tokens, f"--segment-tokens = {tokens} for {model.name}")
    return StepSettings(
        **common,
        models=tuple(known),
        rows=args.rows or (8 if on_gpu else 2),
        segment_tokens=tokens,
        activation_checkpointing=args.activation_checkpointing,
        optimizer=args.optimizer,
        in_turns=args.in_turns,
    )


def _chain(args: argparse.Namespace, on_gpu: bool, checks: Checks, common: dict[str, Any]) -> ChainSettings | None:
    checks.at_least("--rows", args.rows)
    checks.at_least("--segment-tokens", args.segment_tokens)
    model = read_model(args.model or (GPU_MODELS if on_gpu else CPU_MODELS)[0], {"dropout": 0.0}, checks.problems)
    if model is None:
        return None
    if not any(isinstance(layer, BlockRecurrentConfig) for layer in model.layers):
        checks.add(f"--model {args.model}", "has no block_recurrent layer. Name a model that has one.")
    window = model.window_tokens
    if args.segment_tokens and args.segment_tokens > 0:
        checks.multiple("--segment-tokens", args.segment_tokens, f"window_tokens of {model.name}", window)
    blocks = max(1, args.segment_tokens // window) if args.segment_tokens else CHAIN_BLOCKS if on_gpu else 4
    mixer_shapes = ((1, 32768), (8, 4096)) if on_gpu else ((2, 4 * window),)
    if args.rows or args.segment_tokens:
        mixer_shapes = ((args.rows or 1, blocks * window),)
    return ChainSettings(
        **common,
        model=model,
        chain_rows=(args.rows,) if args.rows else (1, 2, 4, 8) if on_gpu else (1, 2),
        chain_blocks=blocks,
        mixer_shapes=mixer_shapes,
    )


def _window(args: argparse.Namespace, on_gpu: bool, checks: Checks, common: dict[str, Any]) -> WindowSettings:
    for option in ("rows", "segment_tokens", "window_tokens"):
        checks.at_least(f"--{option.replace('_', '-')}", getattr(args, option))
    window = args.window_tokens or (512 if on_gpu else 32)
    tokens = args.segment_tokens or (32768 if on_gpu else 128)
    if tokens > 0 and window > 0:
        checks.multiple("--segment-tokens", tokens, "--window-tokens", window)
    shapes: tuple[tuple[int, int], ...] = ((args.rows or 1, tokens),)
    if on_gpu and not (args.rows or args.segment_tokens):
        shapes = ((1, 32768), (8, 4096))
    return WindowSettings(
        **common, shapes=shapes, window_tokens=window, num_heads=8 if on_gpu else 2, head_dim=128 if on_gpu else 16
    )


def _losses(args: argparse.Namespace, on_gpu: bool, checks: Checks, common: dict[str, Any]) -> LossSettings:
    checks.at_least("--tokens", args.tokens)
    checks.at_least("--dim", args.dim)
    checks.at_least("--vocab-size", args.vocab_size, 2)
    cases: tuple[tuple[int, int, int], ...] = ((256, 64, 384),)
    if on_gpu:
        cases = ((32768, 1024, PAPER_VOCABULARY), (8192, 1024, 131072))
    if args.tokens or args.dim or args.vocab_size:
        tokens, dim, vocabulary = cases[0]
        cases = ((args.tokens or tokens, args.dim or dim, args.vocab_size or vocabulary),)
    return LossSettings(**common, cases=cases)


def read_model(name: str, changes: dict[str, Any], problems: list[Problem]) -> ModelConfig | None:
    """The model of a packaged recipe or of a recipe's path, with fields replaced.

    Args:
        name: `rec_fixed_skip_12l`, `configs/model/rec_fixed_skip_12l.yaml` or any recipe with a `model` section.
        changes: field -> new value; None leaves the recipe's.
        problems: what is wrong is added here; the result is then None.
    """
    folder = recipes.PACKAGED_CONFIGS / "model"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        if "/" not in name and not name.endswith((".yaml", ".yml")):
            problems.append(Problem(f"--model {name}", f"no such model.{nearest(name, _stems(folder))}"))
            return None
        path = Path(name)
    try:
        raw = recipes.read_recipe(path).get("model", {})
        if isinstance(raw, dict):
            raw = {**raw, **{field: value for field, value in changes.items() if value is not None}}
        return recipes.validate(ModelConfig, raw, f"recipe {name}")
    except ConfigError as error:
        problems += [Problem(f"--model {name}: {problem.where}", problem.what) for problem in error.problems]
    except (LongspanError, OSError) as error:
        problems.append(Problem(f"--model {name}", str(error)))
    return None


def _stems(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def nearest(name: str, known: tuple[str, ...]) -> str:
    """What may have been meant by an unknown name, else all that is known: a sentence after a space."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else f" Known: {', '.join(known)}."
