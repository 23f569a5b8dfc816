"""What this process has asked of the other ranks: its last collectives, how many there were in each group, their bytes.

Collectives come from DeepSpeed, Megatron-core, torch and the kernels, so torch's own functions are wrapped, once a
process. The watchdog compares the ranks' records when they stand still (`heartbeat.judge`); tests count traffic.
torch's flight recorder knows more of NCCL and nothing of gloo's messages between two ranks: docs/decisions/019.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

KEPT_CALLS = 64
# of each group, what a rank that stands still tells rank 0
TOLD_CALLS = 16
# which argument holds what this rank gives (for `irecv` and `recv`: gets); None: nothing that has a size
_GIVEN: dict[str, str | None] = {
    "all_reduce": "tensor",
    "broadcast": "tensor",
    "reduce": "tensor",
    "gather": "tensor",
    "scatter": "tensor",
    "all_gather": "tensor",
    "all_gather_into_tensor": "input_tensor",
    "all_gather_single": "input_tensor",  # torch 2.13's names
    "reduce_scatter_single": "input",
    "reduce_scatter": "input_list",
    "reduce_scatter_tensor": "input",
    "all_to_all": "input_tensor_list",
    "all_to_all_single": "input",
    "barrier": None,
    "all_gather_object": None,
    "broadcast_object_list": None,
    "isend": "tensor",
    "irecv": "tensor",
    "send": "tensor",
    "recv": "tensor",
}
_PEER = {"isend": "dst", "send": "dst", "irecv": "src", "recv": "src"}


@dataclass
class Call:
    """One collective or message that was asked for.

    Attributes:
        group: its group's name, the same on all ranks. operation: torch's function. num_bytes: what this rank gives.
        peer: the other rank of a message, by its global number; None for a collective.
        number: of the group's collectives, or of its messages with this peer in this direction, from 1.
        started: seconds of this host's monotonic clock. returned: whether the call has come back.
        work: torch's handle, if there is one that somebody still holds.
    """

    group: str
    operation: str
    num_bytes: int
    peer: int | None
    number: int
    started: float
    returned: bool = False
    work: Callable[[], Any] = lambda: None

    @property
    def is_done(self) -> bool:
        """Whether nobody waits for it any more, as far as this process knows; GPUs may lag behind."""
        if not self.returned:
            return False
        work = self.work()
        return work is None or bool(work.is_completed())

    def text(self) -> str:
        """In words."""
        to = {"dst": " to rank", "src": " from rank"}.get(_PEER.get(self.operation, ""), "")
        size = "" if _GIVEN[self.operation] is None else f" of {self.num_bytes} bytes"
        return f"{self.operation}{f'{to} {self.peer}' if self.peer is not None else ''}{size}"


@dataclass
class Recorder:
    """The calls of this process since its mesh was built.

    Attributes:
        names: of each group that this rank belongs to, what people call it and its ranks.
        calls: the last ones. counts: by (group, None), or (group, operation, peer) for messages.
        sent: bytes by (group, operation).
    """

    names: dict[str, str] = field(default_factory=dict)
    calls: deque[Call] = field(default_factory=lambda: deque(maxlen=KEPT_CALLS))
    counts: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)

    def told(self) -> dict[str, Any]:
        """What rank 0 needs to find out which rank the others wait for; JSON values only.

        Returns:
            `groups`: of each, its `name`, the `count` of its collectives and the last `calls` as [number, text];
            `received`, `sent`: {"group:from:to": count} of messages; `waits`: [group, number, text, peer] of calls
            that have not come back, the peer of messages that are to come in.
        """
        calls = list(self.calls)
        groups: dict[str, Any] = {
            group: {"name": name, "count": self.counts[group, None], "calls": []} for group, name in self.names.items()
        }
        for call in calls:
            if call.peer is None and call.group in groups:
                groups[call.group]["calls"].append([call.number, call.text()])
        for found in groups.values():
            found["calls"] = found["calls"][-TOLD_CALLS:]
        messages: dict[str, dict[str, int]] = {"dst": {}, "src": {}}
        for key, count in list(self.counts.items()):
            if key[1] is not None:
                group, way, peer = key
                messages[way][f"{group}:{peer}"] = count
        waits = [
            [call.group, call.number, call.text(), call.peer]
            for call in calls
            if not call.is_done and _PEER.get(call.operation) != "dst"
        ]
        return {"groups": groups, "sent": messages["dst"], "received": messages["src"], "waits": waits}

    def lines(self) -> list[str]:
        """The last calls in words, oldest first."""
        now = time.monotonic()

        def line(call: Call) -> str:
            place = f"{now - call.started:9.3f} s ago  #{call.number:<6}"
            end = "" if call.is_done else ", not done"
            return f"{place} {call.text()}, {self.names.get(call.group, call.group)}{end}"

        return [line(call) for call in list(self.calls)]


_recorder = Recorder()
_nesting = threading.local()


def recorder() -> Recorder:
    """This process's."""
    return _recorder


def start_recording(groups: dict[str, Any]) -> None:
    """Begin anew, with the groups of a mesh.

    Args:
        groups: what people call each group: the group. The first name of one that has several is taken.
    """
    global _recorder
    _recorder = Recorder()
    for name, group in groups.items():
        ranks = dist.get_process_group_ranks(group)
        _recorder.names.setdefault(group.group_name, f"{name} ({in_words(ranks)})")
    for name, given in _GIVEN.items():
        function = getattr(dist, name, None)
        if function is not None and not hasattr(function, "records_calls"):
            wrapped = _recording(name, given, function)
            # torch itself looks the functions up in its own module, everybody else in the package
            setattr(dist.distributed_c10d, name, wrapped)
            setattr(dist, name, wrapped)


def in_words(ranks: list[int]) -> str:
    """`ranks 0 to 7`, `ranks 0, 2, 5`, or `128 ranks from 3 to 1019`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 2:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    if len(ranks) > 8:
        return f"{len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _recording(name: str, given: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its calls recorded; those that it makes itself of others are part of them."""
    places = list(inspect.signature(function).parameters)

    def argument(arguments: tuple[Any, ...], options: dict[str, Any], parameter: str) -> Any:
        if parameter in options or parameter not in places:
            return options.get(parameter)
        place = places.index(parameter)
        return arguments[place] if place < len(arguments) else None

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if getattr(_nesting, "inside", False):
            return function(*arguments, **options)
        group: Any = argument(arguments, options, "group") or dist.group.WORLD
        peer = None
        if way := _PEER.get(name):
            peer = argument(arguments, options, way)
            in_group = argument(arguments, options, f"group_{way}")
            peer = dist.get_global_rank(group, in_group) if peer is None and in_group is not None else peer
        tensors = argument(arguments, options, given) if given else None
        entry = _enter(name, group, peer, _num_bytes(tensors))
        _nesting.inside = True
        try:
            work = function(*arguments, **options)
        finally:
            _nesting.inside = False
        if work is not None:
            entry.work = weakref.ref(work)
        entry.returned = True
        return work

    call.records_calls = True  # type: ignore[attr-defined]
    return call


def _enter(name: str, group: Any, peer: int | None, num_bytes: int) -> Call:
    found = _recorder
    key = (group.group_name, None) if peer is None else (group.group_name, _PEER[name], peer)
    found.counts[key] += 1
    entry = Call(group.group_name, name, num_bytes, peer, found.counts[key], time.monotonic())
    found.calls.append(entry)
    if name not in ("irecv", "recv"):
        found.sent[group.group_name, name] += num_bytes
    return entry


def _num_bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_num_bytes(tensor) for tensor in tensors or ())
