"""The training engine: one optimizer step over carried-state micro-batches, on DeepSpeed.

DeepSpeed owns what happens to gradients and optimizer state (ZeRO 0 to 3, bf16 masters). This file owns the rule of
the loss, the agreement of all ranks on whether a step is taken, and the logical view of weights and state.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from longspan.cluster.mesh import Mesh
from longspan.data_pipeline.batch import Batch
from longspan.data_pipeline.vocabulary import EOS
from longspan.errors import ClusterError
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.kernels.tensor_parallel.shard import TensorShard
from longspan.modeling.context_parallel import set_sequence_shard, shared_state
from longspan.modeling.model import LanguageModel
from longspan.modeling.state import leaves
from longspan.modeling.tensor_parallel import own_state, partition_of, shard_model, whole_state
from longspan.trainer.config import RunConfig
from longspan.trainer.logical_state import OptimizerState, Weights, logical_state
from longspan.trainer.optimizers import build_optimizer
from longspan.trainer.zero_step import AgreedNorm, leave_gradients

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=r".torch\.distributed\.\w+. is deprecated", category=FutureWarning)
import deepspeed  # noqa: E402  the lines above keep its start quiet

_MAX_BUCKET = 500_000_000


@dataclass(frozen=True)
class StepResult:
    """What one step did, equal on all ranks.

    Attributes:
        skipped: some rank met a loss or gradient that is not finite; nothing was changed on any rank.
        stop: some rank asked to stop.
        loss: nats per token over all valid tokens, auxiliary losses left out; NaN without any, may be when skipped.
        aux_loss: auxiliary losses per token.
        bits_per_byte: nats of all tokens but eos, over their bytes.
        grad_norm: global norm before clipping.
        num_tokens: valid tokens of all ranks.
    """

    skipped: bool
    stop: bool
    loss: float
    aux_loss: float
    bits_per_byte: float
    grad_norm: float
    num_tokens: int


class _SummedLoss(nn.Module):
    """The model with its loss: the only output that carries a gradient is the scaled sum."""

    def __init__(self, model: nn.Module, shard: SequenceShard, eos: int) -> None:
        super().__init__()
        self.model, self.shard, self.eos = model, shard, eos

    def forward(self, batch: Batch, state: Any, scale: float | Tensor) -> tuple[Tensor, Any, Tensor]:
        """Returns (scaled loss, state after the whole segment, float32 [3]: nats, nats of text, auxiliary)."""
        nll, new_state, aux = self.model(batch.tokens, state, reset=batch.reset, labels=batch.labels)
        nats = nll.sum()
        extra = sum(aux.values(), nats.new_zeros(()))
        with torch.no_grad():
            # not those with bytes: of the tokens of one character all but one may have none, and each has its cost
            sums = torch.stack([nats, (nll * (batch.labels != self.eos)).sum(), extra])
        return (nats + extra) * scale, shared_state(new_state, self.shard), sums


class Engine:
    """Steps a model through DeepSpeed; every method must be called by all ranks alike."""

    def __init__(self, model: LanguageModel, config: RunConfig, mesh: Mesh, eos: int = EOS) -> None:
        """
        Args:
            model: on any device, moved to the mesh's.
            config: optimizer, precision, ZeRO stage, lanes.
            mesh: the ranks.
            eos: id that ends documents, which is no text.
        """
        self.model = model
        self.mesh = mesh
        # who reads weights or optimizer state in another thread must be through with it then
        self.before_update: Callable[[], None] = lambda: None
        self.stage = config.parallel.zero_stage
        self.clip_norm = config.optimizer.clip_norm
        self.num_micro_batches = config.data.lanes // (mesh.dp_size * config.training.micro_batch_lanes)
        model.to(mesh.device)
        self._parallel = config.parallel
        self._tensors = TensorShard.of(mesh.tp_group)
        shard_model(model, self._tensors)
        self._shard = SequenceShard.of(mesh.cp_group, mesh.device)
        self._divide_sequences(self._shard)
        self.optimizer = build_optimizer(model, config.optimizer)
        self._divided_groups = [group.get("divided", False) for group in self.optimizer.param_groups]
        # its shared-memory collectives would be compiled at the first start; gloo serves
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if self.stage == 3:
            _gather_by_layer(model)
        self._deepspeed, *_ = deepspeed.initialize(
            model=_SummedLoss(model, self._shard, eos),
            optimizer=self.optimizer,
            mpu=mesh.deepspeed_mpu(),
            dist_init_required=False,
            config=self._deepspeed_config(config),
        )
        # one rank has nobody to average with: leave out flattening and copying all gradients
        self._deepspeed.enable_backward_allreduce = self.stage > 0 or mesh.dp_cp_size > 1
        if self._alone():
            leave_gradients(self._deepspeed.optimizer)
        self._norm = AgreedNorm(self._deepspeed.optimizer, self.stage)
        self._logical = logical_state(self.stage, model, self.optimizer, self._deepspeed.optimizer, self._tensors)

    def step(
        self, batches: Sequence[Batch], carried: Sequence[Any], lr: float, stop: bool = False
    ) -> tuple[StepResult, list[Any]]:
        """Forward and backward of every micro-batch, then one update that all ranks take or none does.

        The loss of a rank is sum(token losses) * (dp * cp) * g / N with N the valid tokens of all ranks and
        micro-batches, because DeepSpeed averages over dp x cp and divides by g.

        Args:
            batches: this rank's micro-batches, different lanes at the same time; on the mesh's device.
            carried: the state of each micro-batch's lanes.
            lr: learning rate of this update.
            stop: this rank wants to stop after the step; answered for all ranks in the result.

        Returns:
            The result, and the new states; the given ones when the step is skipped.
        """
        num_tokens = self._count_over_data(sum(batch.num_valid for batch in batches))
        # without any label auxiliary losses teach nothing either: there is no count to divide them by
        scale = self.mesh.dp_cp_size * len(batches) / num_tokens if num_tokens else 0.0
        sums = torch.zeros(3, device=self.mesh.device)
        new_states = []
        for index, (batch, state) in enumerate(zip(batches, carried, strict=True)):
            self._deepspeed.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss, new_state, parts = self._deepspeed(batch, state, scale)
            self._deepspeed.backward(loss)
            sums += parts
            new_states.append(new_state)
        num_bytes = sum(batch.num_bytes for batch in batches)
        nats, byte_nats, aux, total_bytes, square_norm, bad, stop_votes = self._agree(sums, num_bytes, stop)
        skipped = bad > 0
        grad_norm = math.sqrt(square_norm) if square_norm >= 0 else math.nan
        if skipped:
            self._drop_gradients()
        else:
            self._update(lr, grad_norm)
        result = StepResult(
            skipped=skipped,
            stop=stop_votes > 0,
            loss=nats / num_tokens if num_tokens else math.nan,
            aux_loss=aux / num_tokens if num_tokens else math.nan,
            bits_per_byte=byte_nats / total_bytes / math.log(2) if total_bytes else math.nan,
            grad_norm=grad_norm,
            num_tokens=num_tokens,
        )
        return result, list(carried) if skipped else new_states

    def weights(self) -> Weights:
        """Every parameter by full name: whole, float32, a copy on the CPU."""
        return self._logical.weights()

    def optimizer_state(self) -> OptimizerState:
        """Every parameter's optimizer state by full name: whole, float32, a copy on the CPU."""
        return self._logical.optimizer_state()

    def each_state(self, names: Collection[str]) -> Iterator[tuple[str, str | None, Tensor, bool]]:
        """Weights and optimizer state of some parameters, one by one: `ReplicatedState.each`."""
        return self._logical.each(names)

    def parameter_sizes(self) -> dict[str, int]:
        """Elements of every whole parameter by full name."""
        return self._logical.sizes()

    def load(self, weights: Weights, optimizer_state: OptimizerState | None = None) -> None:
        """Set weights and, if given, optimizer state, as `weights` and `optimizer_state` returned them at any stage.

        Raises:
            UsageError: names or shapes are not this model's; lists all of them.
        """
        self._logical.load(weights, optimizer_state)

    def whole_heads(self, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Packed carried state with the heads of all tensor-parallel ranks; every rank must call this."""
        if self._tensors.size == 1:
            return packed
        return whole_state(packed, dict(leaves(self.model.state_spec())), self._tensors)

    def own_heads(self, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's heads of what `whole_heads` returned."""
        if self._tensors.size == 1:
            return packed
        return own_state(packed, dict(leaves(self.model.state_spec())), self._tensors)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[LanguageModel]:
        """The bare model in evaluation mode on whole sequences, without gradients and with its parameters whole."""
        self.model.eval()
        self._divide_sequences(ONE_RANK)
        try:
            with torch.no_grad(), self._whole_parameters() if self.stage == 3 else contextlib.nullcontext():
                yield self.model
        finally:
            self._divide_sequences(self._shard)
            self.model.train()

    def _divide_sequences(self, shard: SequenceShard) -> None:
        set_sequence_shard(
            self.model, shard, state_slices=self._parallel.state_slices, state_grad=self._parallel.state_grad
        )

    @contextlib.contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        """At stage 3: every parameter gathered, and the hooks gone that would release it after its first use."""
        offload = self._deepspeed.optimizer.parameter_offload
        offload._remove_module_hooks()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        offload.partition_all_parameters()
        try:
            with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
                yield
        finally:
            offload.setup_zero_stage3_hooks()

    def _agree(self, sums: Tensor, num_bytes: int, stop: bool) -> list[float]:
        """One sum over the ranks and one wait for the device: loss sums, square gradient norm, votes."""
        whole, divided = (_square_norm(gradients, self.mesh.device) for gradients in self._gradients())
        same = torch.stack([*sums.double(), sums.new_tensor(num_bytes, dtype=torch.float64), whole])
        same /= self.mesh.tp_size  # every tensor-parallel rank brings them
        same[-1] += divided
        if self.stage == 0:
            same[-1] /= self.mesh.dp_cp_size  # every rank holds the averaged gradient
        bad = (~torch.isfinite(same)).any().double().reshape(1)
        votes = torch.cat([same, bad, sums.new_tensor([float(stop)], dtype=torch.float64)])
        return self.mesh.sum_over_all(votes).tolist()

    def _count_over_data(self, count: int) -> int:
        if self.mesh.dp_cp_size == 1:
            return count
        return int(self.mesh.sum_over_data(torch.tensor([count], device=self.mesh.device)).item())

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """What this rank holds of the averaged gradient; at stages 1 to 3 data-parallel ranks hold disjoint shares.

        Returns:
            Of parameters that every tensor-parallel rank has whole, and of those of which each has a part.
        """
        found: tuple[list[Tensor], list[Tensor]] = [], []
        if self.stage == 0:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    found[partition_of(parameter) is not None].append(parameter.grad)
            return found
        zero = self._deepspeed.optimizer
        held: dict[int, list[Tensor]] = zero.averaged_gradients
        if self._parallel.offload_optimizer:
            # DeepSpeed copies them to the host without waiting, and waits itself only later, in its step
            deepspeed.accelerator.get_accelerator().synchronize()
            gradients = [tensor.grad for tensor in self._logical.optimized_tensors()]
            held = {index: [gradient] for index, gradient in enumerate(gradients) if gradient is not None}
        for index, shares in held.items():
            group = zero.sub_group_to_group_id[index] if self.stage == 3 else index
            found[self._divided_groups[group]].extend(shares)
        return found

    def _update(self, lr: float, grad_norm: float) -> None:
        self.before_update()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_multiplier", 1.0)
        if self.stage == 0 and 0 < self.clip_norm < grad_norm:
            torch._foreach_mul_([*chain(*self._gradients())], self.clip_norm / (grad_norm + 1e-6))
        self._step_by(grad_norm)

    def _drop_gradients(self) -> None:
        """Forget this step's gradients, on all ranks at once."""
        if self.stage == 0:
            self._deepspeed.zero_grad()
            return
        # DeepSpeed alone knows all that must be cleared
        gradients = [*chain(*self._gradients())]
        self._step_by(math.inf)
        # stage 3 and offloading reuse these buffers, and not every parameter has a gradient every time
        torch._foreach_zero_(gradients)

    def _step_by(self, norm: float) -> None:
        """DeepSpeed's step by the norm that all ranks know; one that is not finite is to be refused."""
        self._norm.set(norm)
        self._deepspeed.step()
        if self._deepspeed.was_step_applied() != math.isfinite(norm):
            raise ClusterError(
                f"DeepSpeed {deepspeed.__version__} took or refused a step by a gradient norm other than {norm}: "
                "weights are not those of the last checkpoint any more. Install deepspeed 0.19.8 and resume."
            )

    def _alone(self) -> bool:
        """At stage 1 this rank averages with nobody, and what it computed is its share of the gradient."""
        return self.stage == 1 and self.mesh.dp_cp_size == 1 and not self._parallel.offload_optimizer

    def _offload(self) -> dict[str, Any] | None:
        if not self._parallel.offload_optimizer:
            return None
        return {"device": "cpu", "pin_memory": self.mesh.device.type == "cuda"}

    def _deepspeed_config(self, config: RunConfig) -> dict[str, Any]:
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "train_micro_batch_size_per_gpu": config.training.micro_batch_lanes,
            "gradient_accumulation_steps": self.num_micro_batches,
            # at stage 0 `_update` clips with the norm that `_agree` has computed already
            "gradient_clipping": self.clip_norm if self.stage else 0.0,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": min(num_parameters, _MAX_BUCKET),
                "contiguous_gradients": not self._alone(),
                "memory_efficient_linear": False,  # would replace torch's linear for the whole process
                "offload_optimizer": self._offload(),
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW serves, and needs no compiler
            "bf16": {"enabled": config.training.precision == "bf16"},
            "timers": {"throughput": {"enabled": False}},
            "steps_per_print": None,
        }


def _square_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares, fp64, a scalar."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).double().square().sum().to(device)


def _gather_by_layer(model: nn.Module) -> None:
    """At stage 3 a layer (an element of a module list) needs all parameters below it while it runs: mixers reach
    into their modules' parameters, which DeepSpeed gathers for the calls of those modules alone."""
    for part in model.modules():
        for layer in part if isinstance(part, nn.ModuleList) else ():
            own = {id(parameter) for parameter in layer.parameters(recurse=False)}
            for parameter in layer.parameters():
                if id(parameter) not in own:
                    deepspeed.zero.register_external_parameter(layer, parameter)
