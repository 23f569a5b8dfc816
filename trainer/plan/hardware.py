"""Measured rates of one kind of device, from `configs/hardware/NAME.yaml`, and the times that follow from them.

Every number in such a file is one that `longspan bench` (or a loop that times one kernel) prints. A section whose
`source` starts with "estimate" has not been measured yet, nor has what `estimate` names in others; the plan says so.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from longspan.errors import ConfigError, Problem
from longspan.trainer import recipes

Precision = Literal["fp32", "bf16"]
ESTIMATE = "estimate"


class Rates(BaseModel):
    """Frozen, strict about unknown keys; base of every section of a hardware file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Sourced(Rates):
    """A section that says where its numbers come from."""

    source: str = Field(min_length=1, description="how and when measured, or why estimated")
    estimate: str = Field("", description="what of a measured section is none the less an estimate")


class MatrixPoint(Rates):
    """TFLOP/s of y[m, n] = x[m, k] W^T and of its two gradients."""

    m: int = Field(ge=1, description="rows: tokens of a micro-batch")
    n: int = Field(ge=1, description="width of the result")
    k: int = Field(ge=1, description="width of the input")
    forward: float = Field(gt=0)
    input_gradient: float = Field(gt=0)
    weight_gradient: float = Field(gt=0)


class MatrixRates(Sourced):
    """Matrix products."""

    peak_tflops: float = Field(gt=0, description="8192 cubed in bf16: what shares are quoted of")
    fp32_tflops: float = Field(gt=0, description="a large product of fp32 tensors")
    points: tuple[MatrixPoint, ...] = Field(min_length=1, description="bf16")


class AttentionPoint(Rates):
    """Window attention forward and backward at one shape, bf16."""

    tokens: int = Field(ge=1, description="rows x length")
    window: int = Field(ge=1)
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    forward_ms: float = Field(gt=0)
    backward_ms: float = Field(gt=0)


class AttentionRates(Sourced):
    """The window attention kernel."""

    tile_tokens: int = Field(ge=1, description="queries of one tile: keys up to so many past the window are visited")
    points: tuple[AttentionPoint, ...] = Field(min_length=1)


class DenseAttentionRates(Sourced):
    """Attention of many short queries and keys without mask: reads of the state, and the parallel recomputation."""

    forward_tflops: float = Field(gt=0)
    backward_tflops: float = Field(gt=0, description="counted as 2.5 times the forward operations")


class ChainPoint(Rates):
    """One block at W = S = 512, 1024 wide, fixed gate, mode skip (9.66 GFLOP a row), with all reads kept."""

    rows: int = Field(ge=1, description="sequences that share the step")
    forward_us: float = Field(gt=0)
    backward_us: float = Field(gt=0, description="adjoint, weight gradients, gradients of the tokens' keys and values")


class ChainRates(Sourced):
    """The state path's serial steps."""

    row_gflop: float = Field(9.66, gt=0, description="forward operations of one row's step where `points` were taken")
    points: tuple[ChainPoint, ...] = Field(min_length=1)
    general_factor: float = Field(
        ge=1, description="slower by this in modes dual and single, which have no fused chain"
    )


class LossRates(Sourced):
    """Linear + cross-entropy, forward and backward together, at one shape, bf16."""

    tokens: int = Field(ge=1)
    dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    forward_backward_ms: float = Field(gt=0)


class MemoryRates(Sourced):
    """Passes over memory by kernels that do nothing else of weight."""

    terabytes_per_second: float = Field(gt=0, description="read + write of a large copy")
    kernel_us: float = Field(ge=0, description="least time of one small kernel on the device, its gap included")


class HostRates(Sourced):
    """The process that launches the kernels; it sets the pace of small models."""

    launch_us: float = Field(ge=0, description="of one kernel, its share of Python and autograd included")
    engine_us: float = Field(ge=0, description="once a step with an optimizer: agreement of the ranks, and the update")
    stage2_tensor_us: float = Field(ge=0, description="ZeRO 2: of one parameter's hooks in a micro-batch")
    stage3_tensor_us: float = Field(ge=0, description="ZeRO 3: the same")
    message_us: float = Field(ge=0, description="of a message or collective of cp or tp, with the copies around it")


class OffloadRates(Sourced):
    """The optimizer's state in the host's memory: one GPU's way there, and the update of its process."""

    link_gigabytes_per_second: float = Field(gt=0, description="pinned memory to or from one GPU, all GPUs at once")
    update_gigabytes_per_second: float = Field(gt=0, description="read and written by one process's update")


class Link(Rates):
    """What one GPU sends in one direction while it receives as much."""

    gigabytes_per_second: float = Field(gt=0)
    latency_us: float = Field(ge=0, description="of a message between two ranks, its launch included")
    collective_us: float = Field(ge=0, description="of one level of a collective: log2 of the ranks of them a pass")


class LinkRates(Sourced):
    """Between GPUs of one host (NVLink), and between hosts (InfiniBand, one adapter a GPU)."""

    gpus_per_host: int = Field(ge=1)
    nvlink: Link
    infiniband: Link


class MeasuredStep(Rates):
    """A step that was timed on one or several GPUs; plots show it beside the prediction."""

    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    device: str = Field(min_length=1)
    source: str = Field(min_length=1, description="command or program")
    model: str = Field(description="name of the model's recipe")
    vocab_size: int = Field(ge=2)
    lanes: int = Field(ge=1, description="sequences of the step over all GPUs")
    segment_tokens: int = Field(ge=1)
    activation_checkpointing: Literal["none", "mixer", "layer"]
    dp: int = Field(1, ge=1)
    cp: int = Field(1, ge=1)
    tp: int = Field(1, ge=1)
    state_slices: int = Field(1, ge=1)
    optimizer: Literal["none", "adamw"] = Field("none", description="adamw: a step of the engine, update included")
    zero_stage: int = Field(0, ge=0, le=3)
    fitted: bool = Field(False, description="rates of `host` were fitted to it: its prediction validates nothing")
    seconds: float = Field(gt=0, description="forward, backward, sum of all gradients; the update if there is one")

    @property
    def gpus(self) -> int:
        """GPUs that worked."""
        return self.dp * self.cp * self.tp


class Hardware(Rates):
    """One kind of device."""

    name: str = Field(description="as the driver calls it")
    memory_gib: float = Field(gt=0, description="what the driver offers")
    context_gib: float = Field(ge=0, description="taken by the CUDA context and libraries' workspaces")
    allocator_slack: float = Field(ge=0, description="reserved over allocated memory, minus one")
    matrix: MatrixRates
    memory: MemoryRates
    window_attention: AttentionRates
    dense_attention: DenseAttentionRates
    state_chain: ChainRates
    cross_entropy: LossRates
    host: HostRates
    offload: OffloadRates
    links: LinkRates
    measured: tuple[MeasuredStep, ...] = ()

    def estimated(self) -> list[str]:
        """Numbers of one device that have not been measured: sections with the reason given, and parts of sections."""
        lines = []
        for name in type(self).model_fields:
            section = getattr(self, name)
            if name in ("links", "offload"):  # named where several GPUs or offloading are planned
                continue
            if isinstance(section, Sourced) and section.source.startswith(ESTIMATE):
                lines.append(f"{name}: {section.source}")
            elif isinstance(section, Sourced) and section.estimate:
                lines.append(f"{name}: {section.estimate}")
        return lines

    def matrix_seconds(self, form: str, m: float, n: int, k: int, precision: Precision) -> float:
        """Time of one product of m x n x k.

        Args:
            form: "forward", "input_gradient" (x[m, k] from y[m, n]) or "weight_gradient" (W[n, k] summed over m).
            m, n, k: as in `MatrixPoint`.
            precision: of the operands.
        """
        flops = 2.0 * m * n * k
        if precision == "fp32":
            return flops / (self.matrix.fp32_tflops * 1e12) + self.memory.kernel_us * 1e-6
        return flops / (self._matrix_tflops(form, m, n, k) * 1e12)

    def _matrix_tflops(self, form: str, m: float, n: int, k: int) -> float:
        """The rate of the nearest measured (n, k), interpolated over m; proportional to m below the smallest m."""

        curve = self._curves.get((form, n, k))
        if curve is None:
            curve = self._curves[form, n, k] = self._curve(form, n, k)
        smallest, rate = curve[0]
        if math.log(m) <= smallest:
            # a shape of less work than the measured one fills the device as little as fewer rows would
            return rate * min(1.0, max(m / math.exp(smallest), 1e-3))
        return interpolate(curve, min(math.log(m), curve[-1][0]))

    @cached_property
    def _curves(self) -> dict[tuple[str, int, int], list[tuple[float, float]]]:
        """(form, n, k) -> the curve that was found for it; a search over layouts asks thousands of times."""
        return {}

    def _curve(self, form: str, n: int, k: int) -> list[tuple[float, float]]:
        """(log m, TFLOP/s) of the measured shape that is nearest to n x k."""

        def distance(point: MatrixPoint) -> float:
            return math.hypot(math.log(point.n / n), math.log(point.k / k))

        nearest = min(self.matrix.points, key=distance)
        return sorted(
            (math.log(point.m), getattr(point, form))
            for point in self.matrix.points
            if (point.n, point.k) == (nearest.n, nearest.k)
        )

    def traffic_seconds(self, num_bytes: float, kernels: float) -> float:
        """Time to move `num_bytes` (reads and writes added) in `kernels` launches."""
        moved = num_bytes / (self.memory.terabytes_per_second * 1e12)
        return max(moved, kernels * self.memory.kernel_us * 1e-6)

    def window_seconds(self, tokens: float, window: int, heads: int, head_dim: int) -> tuple[float, float]:
        """Forward and backward time of window attention, scaled from the nearest measured shape by visited keys."""

        def distance(point: AttentionPoint) -> float:
            return math.hypot(math.log(point.window / window), 2 * math.log(point.head_dim / head_dim))

        def work(tokens: float, window: int, heads: int, head_dim: int) -> float:
            return tokens * heads * head_dim * (window + self.window_attention.tile_tokens)

        point = min(self.window_attention.points, key=distance)
        ratio = work(tokens, window, heads, head_dim) / work(point.tokens, point.window, point.heads, point.head_dim)
        floor = self.memory.kernel_us * 1e-6
        return max(ratio * point.forward_ms * 1e-3, floor), max(ratio * point.backward_ms * 1e-3, floor)

    def chain_seconds(self, rows: float, row_gflop: float) -> tuple[float, float]:
        """Forward and backward time of one serial step of `rows` sequences of `row_gflop` each.

        Interpolated over the step's operations, counted in rows of the measured cell.
        """
        load = rows * row_gflop / self.state_chain.row_gflop
        curves = (
            sorted((float(point.rows), getattr(point, name)) for point in self.state_chain.points)
            for name in ("forward_us", "backward_us")
        )
        forward, backward = (interpolate(curve, load) * 1e-6 for curve in curves)
        return forward, backward

    def loss_seconds(self, tokens: float, dim: int, vocab_size: int) -> float:
        """Forward and backward time of linear + cross-entropy, by operations from the measured shape."""
        measured = self.cross_entropy
        ratio = tokens * dim * vocab_size / (measured.tokens * measured.dim * measured.vocab_size)
        return ratio * measured.forward_backward_ms * 1e-3


def interpolate(curve: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear through `curve` (sorted by x), extended by its last slope above and by half its first below.

    Half the first slope, because what is left of a small step is latency that does not shrink with the work.
    """
    if len(curve) == 1:
        return curve[0][1]
    if x < curve[0][0]:
        (x0, y0), (x1, y1) = curve[:2]
        return max(y0 + 0.5 * (y1 - y0) / (x1 - x0) * (x - x0), 0.5 * y0)
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x <= x1:
            return y0 + (y1 - y0) / (x1 - x0) * (x - x0)
    (x0, y0), (x1, y1) = curve[-2:]
    return y1 + max(0.0, (y1 - y0) / (x1 - x0)) * (x - x1)


def known_hardware() -> list[str]:
    """Names of the packaged hardware files."""
    return sorted(path.stem for path in (recipes.PACKAGED_CONFIGS / "hardware").glob("*.yaml"))


def hardware_problems(name: str) -> list[Problem]:
    """What is wrong with the name of a kind of device."""
    known = known_hardware()
    if name in known:
        return []
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    advice = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
    return [Problem(f"hardware = {name!r}", f"no rates of such a device. {advice}")]


def load_hardware(name: str) -> Hardware:
    """The rates of a kind of device.

    Raises:
        ConfigError: no such device, or its file is wrong.
    """
    problems = hardware_problems(name)
    if problems:
        raise ConfigError("plan", problems, "Pass --hardware NAME.")
    return recipes.load(Hardware, f"configs/hardware/{name}.yaml")
