"""Weights and optimizer state by full parameter name, whatever ZeRO made of them.

DeepSpeed keeps them in three ways: stage 0 leaves parameters and optimizer alone; stages 1 and 2 give the optimizer
one flat float32 tensor a group and rank; stage 3 shards the parameters themselves. Each class here reads and writes
one way, so that what is read at one stage and number of ranks can be written at any other. Where tensor-parallel ranks
each have a part of a parameter, the parts are put together in front of all that, and taken behind it. No import of
deepspeed: all of it goes through the methods and attributes that its optimizers put on the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import UsageError
from longspan.kernels.tensor_parallel.shard import WHOLE, TensorShard
from longspan.modeling.tensor_parallel import partition_of

Weights = dict[str, Tensor]
OptimizerState = dict[str, dict[str, Tensor]]


class ReplicatedState:
    """ZeRO 0: every rank holds all parameters, and the optimizer keeps its state under them."""

    gives_its_memory = True  # `full_weight` and `full_state` return it, not a copy

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, zero: Any, shard: TensorShard = WHOLE
    ) -> None:
        """
        Args:
            model: its parameters.
            optimizer: torch's. zero: DeepSpeed's around it (the same one at stage 0).
            shard: this rank's place among those that divide the parameters.
        """
        self.parameters = dict(model.named_parameters())
        self.optimizer = optimizer
        self.zero = zero
        self.shard = shard

    def weights(self) -> Weights:
        """A float32 copy on the CPU of every parameter. Every rank must call this."""
        return {name: self._snapshot(p, self.full_weight(p)) for name, p in self.parameters.items()}

    def optimizer_state(self) -> OptimizerState:
        """A copy on the CPU of every parameter's optimizer state; scalars such as `step` are 0-d tensors.

        Parameters that were never updated have none. Every rank must call this.
        """
        self.prepare()
        states = {name: self.full_state(parameter) for name, parameter in self.parameters.items()}
        return {
            name: {key: self._snapshot(self.parameters[name], value) for key, value in state.items()}
            for name, state in states.items()
            if state
        }

    @torch.no_grad()
    def load(self, weights: Weights, optimizer_state: OptimizerState | None) -> None:
        """Write full tensors by name; `optimizer_state` None leaves the optimizer as it is.

        Raises:
            UsageError: names or shapes differ from the model's; all of them are listed.
        """
        self._check(weights, optimizer_state)
        for name, parameter in self.parameters.items():
            self.set_weight(parameter, self._own(parameter, weights[name].to(parameter.device)))
        if not optimizer_state:
            return
        self.create_state()
        self.prepare()
        for name, parameter in self.parameters.items():
            for key, value in optimizer_state.get(name, {}).items():
                self.set_state(parameter, key, self._own(parameter, value))

    def sizes(self) -> dict[str, int]:
        """Elements of every whole parameter by name."""
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.parameters.items()}
        divided = {name for name, p in self.parameters.items() if partition_of(p) is not None}
        return {name: math.prod(shape) * (self.shard.size if name in divided else 1) for name, shape in shapes.items()}

    def each(self, names: Collection[str]) -> Iterator[tuple[str, str | None, Tensor, bool]]:
        """The whole weight and optimizer state of some parameters, one by one. Every rank must go through all of it.

        Args:
            names: parameters that this rank wants; ranks may want different ones.

        Yields:
            Name; entry of the optimizer state, None for the weight; the whole tensor where it lies; whether that is
            the memory which the next update changes (otherwise it is a copy that nobody else has).
        """
        for name, parameter in self.parameters.items():
            value, is_live = self._whole(parameter, self.full_weight(parameter))
            if name in names:
                yield name, None, value, is_live
        self.prepare()
        for name, parameter in self.parameters.items():
            for key, entry in self.full_state(parameter).items():
                value, is_live = self._whole(parameter, entry)
                if name in names:
                    yield name, key, value, is_live

    def full_weight(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter, float32 where a float32 master is kept."""
        return parameter.detach()

    def full_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The whole optimizer state of a parameter; empty if there is none."""
        return dict(self.optimizer.state.get(parameter, {}))

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Write a whole parameter wherever it is kept."""
        parameter.data.copy_(value)

    def set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Write one whole entry of a parameter's optimizer state."""
        self.optimizer.state[parameter][key].copy_(value)

    def optimized_tensors(self) -> Iterable[Tensor]:
        """The tensors that the optimizer updates on this rank."""
        return self.parameters.values()

    def prepare(self) -> None:
        """What must happen before state is read or written; nothing here."""

    def step_optimizer(self) -> None:
        """One update of `optimized_tensors` from their `.grad`."""
        self.optimizer.step()

    def create_state(self) -> None:
        """Let the optimizer make its state: one update with zero gradients and a learning rate of 0."""
        if self.optimizer.state and all(self.optimizer.state.get(tensor) for tensor in self.optimized_tensors()):
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        # DeepSpeed keeps the gradients of offloaded tensors in buffers of its own
        before = [tensor.grad for tensor in self.optimized_tensors()]
        for tensor in self.optimized_tensors():
            tensor.grad = torch.zeros_like(tensor)
        self.step_optimizer()
        for tensor, gradient in zip(self.optimized_tensors(), before, strict=True):
            tensor.grad = gradient
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _whole(self, parameter: nn.Parameter, value: Tensor) -> tuple[Tensor, bool]:
        """A weight or an entry of its optimizer state put together, and whether it is the memory of the optimizer."""
        partition = partition_of(parameter)
        if partition is not None and value.ndim:
            return partition.whole(value.to(parameter.device), self.shard), False
        return value, self.gives_its_memory or not value.ndim

    def _snapshot(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """A copy on the CPU in float32 of a weight or an entry of its optimizer state, whole."""
        return self._whole(parameter, value)[0].detach().to(device="cpu", dtype=torch.float32, copy=True)

    def _own(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of a whole weight or entry of its optimizer state."""
        partition = partition_of(parameter)
        return value if partition is None or not value.ndim else partition.part(value, self.shard)

    def _check(self, weights: Weights, optimizer_state: OptimizerState | None) -> None:
        problems = [f"{name}: not given" for name in self.parameters if name not in weights]
        problems += [f"{name}: not in this model" for name in weights if name not in self.parameters]
        for name, parameter in self.parameters.items():
            wanted = list(getattr(parameter, "ds_shape", parameter.shape))
            if (partition := partition_of(parameter)) is not None:
                wanted[partition.dim] *= self.shard.size
            if name in weights and list(weights[name].shape) != wanted:
                problems.append(f"{name}: shape {list(weights[name].shape)}, this model has {wanted}")
        problems += [f"{name}: optimizer state only" for name in optimizer_state or {} if name not in self.parameters]
        if problems:
            raise UsageError(
                f"{len(problems)} parameters do not fit this model:\n  "
                + "\n  ".join(problems)
                + "\nUse the model configuration that the weights were trained with."
            )


class FlatState(ReplicatedState):
    """ZeRO 1 and 2: the optimizer updates this rank's share of one flat float32 tensor a group."""

    gives_its_memory = False

    def full_weight(self, parameter: nn.Parameter) -> Tensor:
        """Put together over the ranks from the float32 masters."""
        return parameter.get_full_hp_param()  # type: ignore[attr-defined]

    def full_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Put together over the ranks; `step` is the group's."""
        group_state = self.optimizer.state.get(self._flat_of(parameter), {})
        return {
            key: parameter.get_full_hp_param(key) if value.ndim else value  # type: ignore[attr-defined]
            for key, value in group_state.items()
        }

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Into the float32 master and, for the first forward, into the parameter itself."""
        parameter.set_full_hp_param(value)  # type: ignore[attr-defined]
        parameter.data.copy_(value)

    def set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Into this rank's share of the group's flat state."""
        entry = self.optimizer.state[self._flat_of(parameter)][key]
        if entry.ndim == 0:
            entry.copy_(value)
        else:
            parameter.set_full_hp_param(value.to(entry.device), key)  # type: ignore[attr-defined]

    def optimized_tensors(self) -> Iterable[Tensor]:
        """One flat share a group."""
        return list(self.zero.single_partition_of_fp32_groups)

    def prepare(self) -> None:
        """Link parameters to the state of all groups: DeepSpeed does so after the first group's first update, when
        the later groups have none yet."""
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()

    def _flat_of(self, parameter: nn.Parameter) -> Tensor:
        if not hasattr(self, "_group_of"):
            self._group_of = {id(p): i for i, group in enumerate(self.zero.bit16_groups) for p in group}
        return self.zero.single_partition_of_fp32_groups[self._group_of[id(parameter)]]


class PartitionedState(ReplicatedState):
    """ZeRO 3: parameters, masters and state are all sharded; rank r holds the r-th slice of the zero-padded whole."""

    gives_its_memory = False

    def full_weight(self, parameter: nn.Parameter) -> Tensor:
        """Gathered over the ranks from the float32 masters."""
        return self.zero.get_full_hp_param(parameter)

    def full_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Gathered over the ranks; `step` is the group's."""
        group_state = self.optimizer.state.get(self._flat_of(parameter), {})
        return {
            key: self.zero.get_full_hp_param(parameter, key) if value.ndim else value
            for key, value in group_state.items()
        }

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Into the master's slice, the parameter's slice and, where it is kept gathered, the whole parameter."""
        share = self._share(parameter, value)
        self.zero.set_local_hp_param(share, parameter)
        parameter.ds_tensor.data.copy_(share)  # type: ignore[attr-defined]
        if parameter.data.shape == value.shape:
            parameter.data.copy_(value)

    def set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Into this rank's slice of the group's state."""
        entry = self.optimizer.state[self._flat_of(parameter)][key]
        if entry.ndim == 0:
            entry.copy_(value)
        else:
            self.zero.set_local_hp_param(self._share(parameter, value.to(entry.device)), parameter, key)

    def optimized_tensors(self) -> Iterable[Tensor]:
        """One flat share a sub-group."""
        return list(self.zero.fp32_partitioned_groups_flat)

    def step_optimizer(self) -> None:
        """Sub-group by sub-group: between updates DeepSpeed leaves the optimizer without parameters."""
        for index in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._optimizer_step(index)

    def _share(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's slice of `value`, flattened and padded with zeros to a multiple of the ranks."""
        size = parameter.ds_tensor.numel()
        flat = value.reshape(-1)
        start = min(size * self.zero._get_param_partition_rank(parameter), flat.numel())
        part = flat[start : start + size]
        return torch.cat([part, part.new_zeros(size - part.numel())])

    def _flat_of(self, parameter: nn.Parameter) -> Tensor:
        group, _, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[group]


def logical_state(
    stage: int, model: nn.Module, optimizer: torch.optim.Optimizer, zero: Any, shard: TensorShard = WHOLE
) -> ReplicatedState:
    """The reader and writer for a ZeRO stage."""
    kinds = {0: ReplicatedState, 1: FlatState, 2: FlatState, 3: PartitionedState}
    return kinds[stage](model, optimizer, zero, shard)
