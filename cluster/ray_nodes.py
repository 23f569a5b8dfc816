"""A run on the nodes of a Ray cluster: on each of them, one task that starts the node's launcher.

Ray places the launchers and keeps their GPUs; torchrun, which they start, does the rest as everywhere else. Placement
is all that is asked of Ray, so plain tasks on a placement group serve.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from longspan.cluster import network
from longspan.cluster.ray_local import knock
from longspan.errors import EXIT_FAULT, EXIT_OK, ClusterError

_TICK_SECONDS = 0.5


def connect(address: str) -> Any:
    """The `ray` module, connected to the cluster.

    Raises:
        ClusterError: ray is missing, or the cluster does not answer.
    """
    try:
        import ray
    except ImportError as error:
        raise ClusterError(f"launching on Ray needs ray, which cannot be imported ({error}). Install `ray`.") from error
    try:
        knock(address)
        ray.init(address=address, log_to_driver=True, configure_logging=False)
    except Exception as error:
        brief = " ".join(str(error).split())[:300]
        raise ClusterError(
            f"no Ray cluster at --address {address} ({type(error).__name__}: {brief}). Start it with "
            f"`ray start --head`, or name the address of one that runs."
        ) from error
    return ray


def run_on_nodes(
    ray: Any,
    command: Callable[[str], Sequence[str]],
    *,
    nodes: int,
    processes: int,
    gpus: bool,
    timeout_seconds: float,
    received: Sequence[int],
) -> list[int]:
    """Run one command on each of `nodes` nodes until all have ended.

    Args:
        ray: connected module.
        command: from HOST:PORT, where the nodes meet, to the program and arguments of every node.
        processes: on each node; it claims as many CPUs, and as many GPUs if `gpus`.
        timeout_seconds: longest wait for free nodes.
        received: signals so far; what is added while this runs is passed on to every node.

    Returns:
        Exit codes, in order of nodes.

    Raises:
        ClusterError: the cluster has not that many free nodes.
    """
    bundle = {"CPU": processes, **({"GPU": processes} if gpus else {})}
    group = ray.util.placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
    try:
        if not group.wait(timeout_seconds):
            raise ClusterError(
                f"Ray has no {nodes} nodes with {bundle} free within {timeout_seconds:.0f} s. It has "
                f"{ray.cluster_resources()}. Ask for fewer with --nodes or --nproc, or add nodes."
            )
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        actor = ray.remote(num_cpus=processes, num_gpus=processes if gpus else 0)(_Node)
        places = [
            actor.options(
                scheduling_strategy=strategy(placement_group=group, placement_group_bundle_index=index)
            ).remote()
            for index in range(nodes)
        ]
        meeting = ray.get(places[0].meeting_point.remote())
        argv, environment = list(command(meeting)), _own_environment()
        ray.get([place.start.remote(argv, environment, os.getcwd()) for place in places])
        return _wait(ray, places, received)
    finally:
        ray.util.remove_placement_group(group)


def _own_environment() -> dict[str, str]:
    kept = ("HF_", "LONGSPAN_", "MLFLOW_", "NCCL_", "OMP_", "GLOO_", "TRITON_")
    return {name: value for name, value in os.environ.items() if name.startswith(kept)}


def _wait(ray: Any, places: list[Any], received: Sequence[int]) -> list[int]:
    codes: list[int | None] = [None] * len(places)
    passed_on = 0
    while None in codes:
        for number in received[passed_on:]:
            ray.get([place.signal.remote(number) for place in places])
            passed_on += 1
        for index, place in enumerate(places):
            if codes[index] is None:
                try:
                    codes[index] = ray.get(place.poll.remote())
                except ray.exceptions.RayActorError:  # the node is gone; the others' watchdogs will say so
                    codes[index] = EXIT_FAULT
        time.sleep(_TICK_SECONDS)
    return [code if code is not None else EXIT_FAULT for code in codes]


class _Node:
    """Ray actor on one node: starts the launcher there and tells how it ends."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def meeting_point(self) -> str:
        """HOST:PORT of this node, free now."""
        import ray

        return f"{ray.util.get_node_ip_address()}:{network.free_port()}"

    def start(self, argv: list[str], environment: dict[str, str], folder: str) -> None:
        """Start the command with this actor's Python in the driver's folder, if this node has it."""
        self._process = subprocess.Popen(  # noqa: S603 - the driver's command, no shell
            [sys.executable, *argv],
            env={**os.environ, **environment},
            cwd=folder if os.path.isdir(folder) else None,
            preexec_fn=_end_with_actor,
        )

    def signal(self, number: int) -> None:
        """Pass a signal on to the launcher."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)

    def poll(self) -> int | None:
        """The exit code, None while the launcher runs."""
        return self._process.poll() if self._process else EXIT_OK


def _end_with_actor() -> None:
    """In the child: an actor whose driver is gone takes the launcher, and so the workers, with it."""
    from longspan.cluster.worker import end_with_parent

    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    end_with_parent()
