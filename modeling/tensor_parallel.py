"""A model over several tensor-parallel ranks: each slices the parameters of a whole model and keeps its part.

Names, and shapes as checkpoints have them, stay those of one rank; `whole` and `part` go between the two. Why these are
not Megatron-core's layers: docs/decisions/014-tensor-parallel-by-slicing.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from longspan.errors import UsageError
from longspan.kernels.tensor_parallel.collectives import gathered, summed
from longspan.kernels.tensor_parallel.shard import TensorShard
from longspan.modeling.basic import Embedding, FeedForward
from longspan.modeling.feedback import FeedbackWindow
from longspan.modeling.mixers.block_recurrent import BlockRecurrent, RecurrentState
from longspan.modeling.mixers.full_attention import FullAttention
from longspan.modeling.mixers.linear_attention import LinearAttention
from longspan.modeling.mixers.sliding_window import SlidingWindow
from longspan.modeling.model import LanguageModel
from longspan.modeling.protocol import StatefulModule
from longspan.modeling.stack import Layer
from longspan.modeling.state import SpecTree, State, tree_map


@dataclass(frozen=True)
class Partition:
    """How ranks divide a tensor: along `dim`, which holds `stride` equal pieces that are each divided."""

    dim: int
    stride: int = 1

    def part(self, tensor: Tensor, shard: TensorShard) -> Tensor:
        """This rank's part of a whole tensor; contiguous, in memory of its own."""
        pieces = tensor.unflatten(self.dim, (self.stride, shard.size, -1)).select(self.dim + 1, shard.rank)
        return pieces.flatten(self.dim, self.dim + 1).clone()

    def whole(self, tensor: Tensor, shard: TensorShard) -> Tensor:
        """The whole of a tensor of which every rank has a part; every rank must call this."""
        pieces = tensor.unflatten(self.dim, (self.stride, -1)).unsqueeze(self.dim + 1)
        return gathered(pieces, self.dim + 1, shard).flatten(self.dim, self.dim + 2)


_ROWS, _COLUMNS, _COLUMN_PAIR = Partition(0), Partition(1), Partition(1, 2)
_HEADS = {"query.weight": _ROWS, "key.weight": _ROWS, "value.weight": _ROWS, "output.weight": _COLUMNS}
_WINDOW = _HEADS | {"scale": _ROWS, "position_table": _ROWS}
_READING = {"state_query.weight": _ROWS, "state_scale": _ROWS, "output.weight": _COLUMN_PAIR}
_PARTITIONS: dict[type, dict[str, Partition]] = {
    SlidingWindow: _WINDOW,
    FeedbackWindow: _WINDOW | _READING,
    BlockRecurrent: _WINDOW | _READING,
    LinearAttention: _HEADS,
    FullAttention: _HEADS,
    FeedForward: {"hidden.weight": _ROWS, "output.weight": _COLUMNS},
    Embedding: {"weight": _ROWS},
}


def shard_model(model: LanguageModel, shard: TensorShard) -> None:
    """Keep this rank's part of a whole model; from then on all ranks must call the model together.

    Each divided parameter is marked as Megatron-core marks its own (`tensor_model_parallel`, `partition_dim`,
    `partition_stride`), which DeepSpeed's gradient norm looks at. Gradients of the others are whole on every rank after
    a backward pass. Calls take the same tokens on all ranks, with `init_state` and carried state of this rank's heads.

    Args:
        model: built alike on all ranks, whole; changed in place. shard: of this rank.

    Raises:
        UsageError: heads, hidden units or vocabulary do not divide over the ranks, or a mixer cannot be divided.
    """
    if shard.size == 1:
        return
    if sizes := model.config.indivisible(shard.size):
        text = ", ".join(f"{name} = {size}" for name, size in sizes)
        raise UsageError(f"{text}: must be multiples of the {shard.size} tensor-parallel ranks.")
    for module in model.modules():
        if isinstance(module, Layer) and type(module.mixer) not in _PARTITIONS:
            raise UsageError(f"{type(module.mixer).__name__} cannot be divided over tensor-parallel ranks.")
    for module in list(model.modules()):
        for name, partition in _PARTITIONS.get(type(module), {}).items():
            if name in dict(module.named_parameters()):
                _divide(module.get_parameter(name), partition, shard)
        if isinstance(module, (StatefulModule, Embedding, LanguageModel)):
            module.tensor_shard = shard
        if type(module) in _PARTITIONS and isinstance(heads := getattr(module, "heads", None), int):
            setattr(module, "heads", heads // shard.size)  # noqa: B010  mypy knows no int attributes of modules
        if isinstance(module, RecurrentState):
            _sum_gradients(module, shard)


def _divide(parameter: nn.Parameter, partition: Partition, shard: TensorShard) -> None:
    parameter.data = partition.part(parameter.data, shard)
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim, parameter.partition_stride = partition.dim, partition.stride  # type: ignore[attr-defined]


def _sum_gradients(module: nn.Module, shard: TensorShard) -> None:
    """Every rank's gradient of these parameters is a part, through its own heads: sum it, once in a backward pass."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: summed(gradient, shard))


def partition_of(parameter: Tensor) -> Partition | None:
    """How a parameter of a divided model is divided; None if it is whole."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return Partition(parameter.partition_dim, parameter.partition_stride)  # type: ignore[attr-defined]


def whole_state(state: State, specs: SpecTree, shard: TensorShard) -> State:
    """The carried state with all heads, from every rank's, without gradient; every rank must call this."""
    return tree_map(lambda s, spec: s if spec.head_axis is None else gathered(s, spec.head_axis, shard), state, specs)


def own_state(state: State, specs: SpecTree, shard: TensorShard) -> State:
    """The carried state with this rank's heads, from that with all heads."""

    def own(tensor: Tensor, axis: int | None) -> Tensor:
        return tensor if axis is None else tensor.chunk(shard.size, dim=axis)[shard.rank].contiguous()

    return tree_map(lambda s, spec: own(s, spec.head_axis), state, specs)
