"""What the plan counts against real runs of tiny models: collectives and their bytes, passes over the residual stream,
launches of a chunk of the state path."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from longspan.kernels.backend import forced, interpreting
from longspan.kernels.block_recurrent import scan
from longspan.kernels.context_parallel import carry
from longspan.kernels.context_parallel.messages import count_traffic
from longspan.kernels.context_parallel.shard import SequenceShard
from longspan.kernels.norm import triton as norm_kernels
from longspan.kernels.tensor_parallel.shard import TensorShard
from longspan.modeling import basic
from longspan.modeling.config import ActivationCheckpointing
from longspan.modeling.context_parallel import set_sequence_shard, shared_state
from longspan.modeling.model import LanguageModel
from longspan.modeling.tensor_parallel import shard_model
from longspan.trainer.plan import host, residual
from longspan.trainer.plan.hardware import HostRates, load_hardware
from longspan.trainer.plan.layout import Job, Layout
from longspan.trainer.plan.links import Group
from longspan.trainer.plan.predict import tensor_seconds
from longspan.trainer.plan.setting import Setting
from longspan.trainer.plan.work import Work, Workshop

sys.path.insert(0, str(Path(__file__).parents[1] / "modeling"))
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from ranks import on_ranks
from tiny_models import WINDOW, no_reset, random_tokens, tiny_config, tiny_model

RATES = ("launch_us", "engine_us", "stage2_tensor_us", "stage3_tensor_us")
# the host's seconds are its messages
MESSAGES = load_hardware("h100").model_copy(
    update={"host": HostRates(source="none", message_us=1e6, **dict.fromkeys(RATES, 0.0))}
)
ROWS, BLOCKS, RANKS = 2, 4, 2
SIZES = {"vocab_size": 18}  # divides
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "batch_isend_irecv")
pytestmark = pytest.mark.filterwarnings("ignore")  # of heads without a kernel


@dataclass(frozen=True)
class Case:
    """A tiny model over two ranks."""

    name: str
    policy: ActivationCheckpointing = "none"
    cp: int = 1
    slices: int = 1
    state_grad: str = "full"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def tp(self) -> int:
        return RANKS // self.cp

    def model(self) -> LanguageModel:
        model = tiny_model(self.name, torch.float32, **(SIZES | self.changes)).train()
        model.set_activation_checkpointing(self.policy)
        return model

    def planned(self) -> Work:
        config = tiny_config(self.name, **(SIZES | self.changes))
        setting = Setting(config, ROWS, self.cp * BLOCKS * WINDOW, 1, "fp32", self.policy, "none", 0)
        job = Job(setting, ROWS, self.state_grad)
        return Workshop(job, MESSAGES).work(Layout(1, self.cp, self.tp, 0, self.slices, self.policy, ROWS, 1))


TENSOR = [
    *(Case(name, policy) for name in ("sliding_window", "fixed_skip") for policy in ("none", "mixer", "layer")),
    Case("fixed_skip", "layer", changes={"dropout": 0.1}),
    *(
        Case(name)
        for name in ("fixed_single", "lstm_skip", "lstm_dual", "frozen", "full_attention", "linear_attention")
    ),
    *(Case("feedback", policy) for policy in ("none", "mixer", "layer")),
    *(Case("memory", policy) for policy in ("none", "layer")),
    Case("memory_hybrid"),
]
SEQUENCE = [
    *(Case(name, cp=2) for name in ("sliding_window", "fixed_skip", "linear_attention", "frozen", "memory_hybrid")),
    Case("fixed_skip", "mixer", cp=2, slices=2),
    Case("fixed_skip", cp=2, slices=2, state_grad="truncate"),
    *(Case("feedback", cp=2, slices=slices) for slices in (1, 2)),
    Case("feedback", cp=2, state_grad="truncate"),
]


@contextmanager
def counted(changes: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Collectives and messages that this process asks for, by name; all messages of one call as one."""
    found: Counter[str] = Counter()

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found[name] += 1
            return real(*arguments, **options)

        return call

    for place, names in ((dist, COLLECTIVES), (carry, ("send", "receive"))):
        for name in names:
            changes.setattr(place, name, counting(name, getattr(place, name)))
    yield found


def real_step(rank: int, cases: list[Case]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Of each case: collectives and messages of a forward and backward pass on this rank, and bytes, by operation."""
    results = []
    for case in cases:
        model = case.model()
        shard_model(model, TensorShard.of(dist.group.WORLD) if case.tp > 1 else TensorShard())
        shard = SequenceShard.of(dist.group.WORLD) if case.cp > 1 else SequenceShard()
        set_sequence_shard(model, shard, state_slices=case.slices, state_grad=case.state_grad)  # type: ignore[arg-type]
        tokens = random_tokens(ROWS, BLOCKS * WINDOW)
        reset = no_reset(model, ROWS, BLOCKS * WINDOW)
        with pytest.MonkeyPatch.context() as changes, counted(changes) as calls, count_traffic() as sent:
            nll, state, aux = model(tokens, model.init_state(ROWS), reset=reset, labels=tokens)
            (nll.sum() + sum(aux.values(), torch.zeros(()))).backward()
            if case.cp > 1:
                shared_state(state, shard)
        results.append((dict(calls), dict(sent)))
    return results


@pytest.fixture(scope="module")
def real() -> dict[int, list[tuple[dict[str, int], dict[str, int]]]]:
    """By number in `TENSOR + SEQUENCE`: of both ranks."""
    cases = TENSOR + SEQUENCE
    ranks = on_ranks(real_step, RANKS, cases)
    return {index: [rank[index] for rank in ranks] for index in range(len(cases))}


def label(case: Case) -> str:
    return f"{case.name}-{case.policy}-tp{case.tp}-{case.slices}-{case.state_grad}{len(case.changes) or ''}"


@pytest.mark.parametrize("index", range(len(TENSOR + SEQUENCE)), ids=[label(case) for case in TENSOR + SEQUENCE])
def test_as_many_collectives_and_messages_as_planned(index: int, real: dict[int, Any]) -> None:
    planned = (TENSOR + SEQUENCE)[index].planned().host
    assert [sum(calls.values()) for calls, _ in real[index]] == [pytest.approx(planned)] * RANKS


@pytest.mark.parametrize("index", range(len(TENSOR)), ids=[label(case) for case in TENSOR])
def test_every_collective_costs_its_latency(index: int, real: dict[int, Any]) -> None:
    """Over links that take no time for bytes: an all-reduce goes round twice, a gather and a scatter once."""
    link = MESSAGES.links.nvlink.model_copy(update={"gigabytes_per_second": 1e30, "collective_us": 1e6})
    links = MESSAGES.links.model_copy(update={"nvlink": link})
    calls, _ = real[index][0]
    rounds = 2 * calls["all_reduce"] + calls.get("all_gather", 0) + calls.get("reduce_scatter", 0)
    assert tensor_seconds(TENSOR[index].planned(), Group.of(RANKS, 1, 8), links) == pytest.approx(rounds)


@pytest.mark.parametrize("index", range(len(TENSOR)), ids=[label(case) for case in TENSOR])
def test_tensor_parallel_bytes_are_those_planned(index: int, real: dict[int, Any]) -> None:
    """Of a gathered vector a rank sends its own part to R - 1 others."""
    work = TENSOR[index].planned()
    sums = sum(work.ends_sums) + sum(
        (4 + one.sums_again) * one.messages.sums + one.messages.path_gradients for one in work.layers
    )
    gathers = sum((2 + one.gathers_again) * one.messages.gather for one in work.layers) * (RANKS - 1) / RANKS
    for _, sent in real[index]:
        assert sent.get("tensor_sum", 0) == sums
        assert sent.get("tensor_gather", 0) == gathers


class Passes(TorchDispatchMode):
    """Tensors of so many elements that torch's elementwise operations and the norms' kernels read and write."""

    OPERATIONS = ("add", "add_", "mul", "mul_", "clone", "copy_")

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count, self.inside = elements, 0, False

    def of(self, *tensors: Any) -> int:
        return sum(isinstance(one, Tensor) and one.numel() == self.elements for one in tensors)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if not self.inside and function._schema.name.split("::")[1] in self.OPERATIONS and self.of(result):
            self.count += self.of(*arguments) + self.of(result)
        return result

    def kernel(self, real: Callable[..., Any], written: Callable[..., int]) -> Callable[..., Any]:
        """The kernel's function, what it reads counted by its arguments; what it computes inside is not."""

        def call(*arguments: Any) -> Any:
            self.inside = True
            result = real(*arguments)
            self.inside = False
            self.count += self.of(*arguments) + written(*arguments)
            return result

        return call


def real_passes(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Passes over [tokens, dim] of a stack with the final norm behind it: forward, backward."""
    tokens = 3 * WINDOW
    counter = Passes(tokens * model.config.dim)
    x = torch.randn(1, tokens, model.config.dim)
    with_sum = counter.kernel(norm_kernels.norm_forward, lambda x, delta, *_: 1 + (delta is not None))
    monkeypatch.setattr(norm_kernels, "norm_forward", with_sum)
    monkeypatch.setattr(norm_kernels, "norm_backward", counter.kernel(norm_kernels.norm_backward, lambda *_: 1))
    reset = no_reset(model, 1, tokens)
    with forced("triton"), counter:
        y, _, _ = model.backbone(x.requires_grad_(), model.backbone.init_state(1), reset=reset)
        y = model.final_norm(y)
        forward = counter.count
        y.backward(torch.randn(y.shape))
    return forward, counter.count - forward


@pytest.mark.skipif(not interpreting(), reason="counts operations of the CPU")
@pytest.mark.parametrize("policy", ["none", "mixer", "layer"])
@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        ("sliding_window", 0.0),
        ("fixed_skip", 0.0),
        ("full_attention", 0.0),
        pytest.param("linear_attention", 0.0, marks=pytest.mark.long),
        ("sliding_window", 0.1),
    ],
)
def test_as_many_passes_over_the_residual_stream_as_planned(
    name: str, dropout: float, policy: ActivationCheckpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A width that no other tensor has as many numbers as."""
    monkeypatch.setattr(norm_kernels, "BACKWARD_WARPS", 8)
    monkeypatch.setattr(basic, "DROPOUT_TILE_TOKENS", WINDOW)  # a mask as small beside the stream as it is in training
    sizes: dict[str, Any] = {"dim": 20, "num_heads": 1, "ffn_dim": 28, "dropout": dropout}
    model = tiny_model(name, torch.float32, **sizes).train()
    model.set_activation_checkpointing(policy)
    setting = Setting(tiny_config(name, **sizes), 1, 3 * WINDOW, 1, "fp32", policy, "none", 0)
    layers = [residual.layer_passes(setting, layer) for layer in setting.model.expanded_layers()]
    ends = residual.ends_passes(setting)
    forward = sum(layer.forward for layer in layers) + ends.forward
    backward = sum(layer.backward + layer.again for layer in layers) + ends.backward
    assert real_passes(model, monkeypatch) == (forward, backward)


class Launches(TorchDispatchMode):
    """Operations of torch that launch a kernel on a GPU, and launches of Triton's."""

    VIEWS = ("view", "_unsafe_view", "as_strided", "detach", "t", "transpose", "permute", "unsqueeze", "squeeze")
    VIEWS += ("select", "slice", "split", "split_with_sizes", "expand", "alias", "unbind")
    FREE = (*VIEWS, "empty", "empty_like", "empty_strided", "new_empty", "promote_types")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.inside = False
        real = interpreter.GridExecutor.__call__

        def launch(executor: Any, *arguments: Any, **options: Any) -> None:
            self.found[executor.fn.__name__] += 1
            self.inside = True
            real(executor, *arguments, **options)
            self.inside = False

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        if not self.inside and name not in self.FREE:
            self.found[name] += 1
        return function(*arguments, **(options or {}))


def chunked(values: int) -> Counter[str]:
    """Launches of the backward pass of a recurrent layer over three blocks, `values` of a state at a time."""
    sizes: dict[str, Any] = {"dim": 32, "num_heads": 1, "head_dim": 16, "window_tokens": 16}
    layers = [{"mixer": "block_recurrent", "num_states": 16}]
    model = tiny_model("fixed_skip", torch.float32, layers=layers, **sizes).train()
    mixer = model.backbone.layers[0].mixer
    x = torch.randn(1, 48, 32).requires_grad_()
    with pytest.MonkeyPatch.context() as changes, forced("triton"):
        changes.setattr(scan, "CHUNK_VALUES", values)
        y, _, _ = mixer(x, mixer.init_state(1), reset=no_reset(model, 1, 48))
        with Launches(changes) as launches:
            y.sum().backward()
    return launches.found


@pytest.mark.skipif(not interpreting(), reason="counts launches of the interpreter")
def test_a_further_chunk_of_the_state_path_launches_as_many_kernels_as_planned() -> None:
    """Three chunks against two: the last block is written for nobody, so that its chunk has less to do.

    Launches inside a block are the same however blocks are cut.
    """
    block = 16 * 32
    two, three = chunked(2 * block), chunked(block)
    assert three.total() - two.total() == host.CHUNK_LAUNCHES, three - two
