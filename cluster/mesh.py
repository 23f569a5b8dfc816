"""The process mesh: `world = dp x cp x tp` over Megatron-core's process groups, and what DeepSpeed asks of it.

Megatron-core owns the groups (orders them tp, then cp, then dp); nothing else in Longspan imports it for them.
The process environment is torchrun's (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`); without it
this is a world of one that needs no port.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.cluster import exit_records, network
from longspan.cluster.collectives import start_recording
from longspan.cluster.config import LONGEST_ALLOWANCE, ParallelConfig
from longspan.cluster.environment import Place, read_place
from longspan.cluster.meeting import MeetingPlace, not_joined, reach, without_native_log
from longspan.cluster.preflight import check_ranks, describe_rank
from longspan.errors import ClusterError, UsageError

T = TypeVar("T")

with warnings.catch_warnings():  # megatron-core says at import that Transformer Engine and Apex are missing
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state


class DeepSpeedMPU:
    """The nine methods that DeepSpeed asks a model-parallel unit for.

    Its data-parallel group is dp x cp, because context-parallel ranks hold the same parameters. No `get_sequence_*`
    method may exist here: DeepSpeed would then scale gradients by the sequence-parallel size once more.
    """

    @staticmethod
    def get_model_parallel_group() -> Any:
        """Ranks that hold one replica of the parameters together."""
        return parallel_state.get_tensor_model_parallel_group()

    @staticmethod
    def get_model_parallel_rank() -> int:
        """This rank's place in the model-parallel group."""
        return int(parallel_state.get_tensor_model_parallel_rank())

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """Size of the model-parallel group."""
        return int(parallel_state.get_tensor_model_parallel_world_size())

    @staticmethod
    def get_tensor_model_parallel_group() -> Any:
        """The same group: tensor parallelism is the only model parallelism."""
        return parallel_state.get_tensor_model_parallel_group()

    @staticmethod
    def get_tensor_model_parallel_rank() -> int:
        """This rank's place in the tensor-parallel group."""
        return int(parallel_state.get_tensor_model_parallel_rank())

    @staticmethod
    def get_tensor_model_parallel_world_size() -> int:
        """Size of the tensor-parallel group."""
        return int(parallel_state.get_tensor_model_parallel_world_size())

    @staticmethod
    def get_data_parallel_group() -> Any:
        """Ranks over which gradients are averaged and ZeRO shards: dp x cp."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_rank() -> int:
        """This rank's place in dp x cp."""
        return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))

    @staticmethod
    def get_data_parallel_world_size() -> int:
        """dp x cp."""
        return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


@dataclass(frozen=True)
class Mesh:
    """Where this process stands, and the groups it talks through.

    Attributes:
        rank, world_size: of all processes. local_rank, local_world_size: of those on this host.
        device: where this rank computes.
        dp_rank, dp_size: data parallel, that is which lanes this rank runs.
        cp_rank, cp_size: context parallel, that is which share of every lane's segment.
        tp_rank, tp_size: tensor parallel, that is which part of every layer.
        dp_cp_group: ranks over which losses and gradients are summed. cp_group: ranks that share this rank's lanes.
        tp_group: ranks that share this rank's layers; ranks of one such group follow one another.
        control_group: all ranks, always over gloo, for small CPU messages.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    tp_rank: int
    tp_size: int
    dp_cp_group: Any
    cp_group: Any
    tp_group: Any
    control_group: Any

    @classmethod
    def build(cls, parallel: ParallelConfig, device: str | None = None, settings: dict[str, Any] | None = None) -> Mesh:
        """Join the process group and lay the mesh over it; once a process, until `close`.

        Args:
            parallel: sizes of the axes and the longest wait for a collective.
            device: "cpu" or "cuda"; CUDA where there is a GPU if not given.
            settings: what has to be the same on all ranks besides; nested, JSON values only.

        Raises:
            ConfigError: torchrun's variables are wrong; lists all of them.
            UsageError: the number of processes is not a multiple of tp * cp, the port is taken, the ranks differ in
                settings or kind of device, or some of them do not come.
            ClusterError: some do not come, and the launcher starts all of them again; or one ended after it came.
        """
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        place = read_place()
        world_size, local_rank = place.world_size, place.local_rank
        os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed reads it
        # a hung rank is the watchdog's to name, within each phase's own limit; a collective gives up only after that
        timeout = timedelta(seconds=parallel.timeout_seconds * LONGEST_ALLOWANCE)
        _join(place, kind, parallel, timeout, {"parallel": parallel.model_dump(), **(settings or {})})
        if kind == "cuda":
            torch.cuda.set_device(local_rank)
        _form_groups(parallel, timeout)
        mesh = cls(
            rank=dist.get_rank(),
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=place.local_world_size,
            device=torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu"),
            dp_rank=int(parallel_state.get_data_parallel_rank()),
            dp_size=world_size // (parallel.tp * parallel.cp),
            cp_rank=int(parallel_state.get_context_parallel_rank()),
            cp_size=parallel.cp,
            tp_rank=int(parallel_state.get_tensor_model_parallel_rank()),
            tp_size=parallel.tp,
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            cp_group=parallel_state.get_context_parallel_group(),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            control_group=dist.new_group(backend="gloo", timeout=timeout) if kind == "cuda" else dist.group.WORLD,
        )
        if world_size > 1:
            start_recording(
                {
                    "all ranks": dist.group.WORLD,
                    "all ranks, over gloo": mesh.control_group,
                    "data x context parallel": mesh.dp_cp_group,
                    "context parallel": mesh.cp_group,
                    "tensor parallel": mesh.tp_group,
                }
            )
        return mesh

    @property
    def dp_cp_size(self) -> int:
        """Ranks over which losses and gradients are summed."""
        return self.dp_size * self.cp_size

    @property
    def data_rank(self) -> int:
        """This rank's place among dp x cp, for work that is divided by documents and not along the sequence."""
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def speaks_for_lanes(self) -> bool:
        """Whether this rank, alone among those of its lanes, reports what all of them know."""
        return self.cp_rank == 0 and self.tp_rank == 0

    def deepspeed_mpu(self) -> type[DeepSpeedMPU]:
        """What `deepspeed.initialize(mpu=...)` takes."""
        return DeepSpeedMPU

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank; every rank must call this."""
        if self.world_size == 1:
            return flag
        vote = torch.tensor([int(flag)])
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.control_group)
        return bool(vote.item())

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum `values` in place over dp x cp; every rank must call this."""
        if self.dp_cp_size > 1:
            dist.all_reduce(values, group=self.dp_cp_group)
        return values

    def sum_over_all(self, values: Tensor) -> Tensor:
        """Sum `values` in place over all ranks; every rank must call this."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """`value` of rank 0, 1, ...: something small; every rank must call this."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def on_every_rank(self, work: Callable[[], T]) -> T:
        """Do `work`, which talks to no other rank, here while the others do theirs; if one fails, none goes on alone.

        Raises:
            LongspanError: what `work` raised here; on ranks where it did not, one with the same exit code.
        """
        value, error = None, None
        try:
            value = work()
        except Exception as caught:
            error = caught
        code = getattr(error, "exit_code", 1) if error is not None else 0
        if self.world_size > 1:
            vote = torch.tensor([code])
            dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.control_group)
            code = int(vote.item())
        if error is not None:
            raise error
        if code:
            ended = ClusterError(exit_records.FOLLOWED)
            ended.exit_code = code
            raise ended
        return cast(T, value)

    def on_rank_zero(self, work: Callable[[], None]) -> None:
        """Run `work` on rank 0 alone while the others wait.

        Raises:
            LongspanError: what `work` raised, on rank 0; on the others one with the same exit code.
        """
        self.on_every_rank(work if self.rank == 0 else lambda: None)

    def close(self) -> None:
        """Leave the process group, so that another mesh can be built in this process."""
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _check_factors(world_size: int, parallel: ParallelConfig) -> None:
    replica = parallel.tp * parallel.cp
    if world_size % replica:
        raise UsageError(
            f"{world_size} processes do not factor into parallel.tp = {parallel.tp} x parallel.cp = {parallel.cp} "
            f"x data parallel. Start a multiple of {replica} processes, or change tp or cp."
        )


def _form_groups(parallel: ParallelConfig, timeout: timedelta) -> None:
    """Megatron-core's groups. No watchdog looks on yet: a rank that ends here is seen by this alone.

    Raises:
        ClusterError: ranks that have met did not form groups.
    """
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            context_parallel_size=parallel.cp,
            order="tp-cp-ep-dp-pp",
            distributed_timeout_minutes=timeout.total_seconds() / 60,
            create_gloo_process_groups=False,
        )
    except dist.DistError as error:
        raise ClusterError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} met the others, but they did not form groups: "
            f"{str(error).splitlines()[0].rstrip('.')}. Some rank has ended since; look at its own message."
        ) from error


def _join(place: Place, kind: str, parallel: ParallelConfig, timeout: timedelta, settings: dict[str, Any]) -> None:
    """Initialise torch's default process group from torchrun's environment, or alone.

    Args:
        place: of this process. kind: "cpu" or "cuda".
        parallel: sizes, and the longest wait for the other ranks. timeout: longest collective.
        settings: what has to be the same on all ranks.
    """
    backend = "nccl" if kind == "cuda" else "gloo"
    if dist.is_initialized():
        raise ClusterError("a process group exists already in this process; close the other mesh first.")
    if place.port is None:
        _check_factors(1, parallel)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    rank, world_size, address, port = place.rank, place.world_size, place.address, place.port
    os.environ.setdefault("MASTER_ADDR", address)
    join_seconds, compared = parallel.timeout_seconds, False
    if rank != 0:
        reach(place, join_seconds)
    try:
        with without_native_log():
            meeting = MeetingPlace(place, join_seconds)
            store = meeting.store
            check_ranks(store, rank, world_size, describe_rank(settings, kind), join_seconds)
        _check_factors(world_size, parallel)  # all ranks have the same sizes, so all say so
        compared = True
        meeting.all_met()
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistError, RuntimeError) as error:
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise UsageError(
                f"port {port} on {address} is in use, so the processes cannot meet there. "
                f"Set MASTER_PORT (torchrun: --master-port) to a free port, e.g. {network.free_port()}."
            ) from error
        # another program at that address will not go away by itself; a launcher may have chosen it anew
        kind_of_error = ClusterError if compared else exit_records.never_met
        raise kind_of_error(not_joined(place, error)) from error
