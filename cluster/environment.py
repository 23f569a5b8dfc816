"""torchrun's environment, read and checked: which rank this process is, of how many, and where they meet.

Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from longspan.errors import ConfigError, Problem

_LARGEST_PORT = 65535
_ADVICE = "Start with torchrun or `longspan launch`, which set all of them, or unset all of them for one process."


@dataclass(frozen=True)
class Place:
    """What the environment says of this process.

    Attributes:
        rank, world_size: among all processes. local_rank, local_world_size: among those of this host.
        address, port: where the processes meet; port is None for a process that is alone and needs none.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int | None = None


def read_place() -> Place:
    """This process's place.

    Raises:
        ConfigError: variables that are no numbers, out of range or missing; lists all of them.
    """
    place, problems = _read()
    if problems:
        raise ConfigError("the environment of this process", problems, _ADVICE)
    return place


def names_a_rank() -> bool:
    """Whether the environment says which rank this process is, without a contradiction."""
    return not any(problem.where.startswith(("RANK", "LOCAL_RANK")) for problem in _read()[1])


def _read() -> tuple[Place, list[Problem]]:
    problems: list[Problem] = []

    def number(name: str, default: int, least: int, most: int | None = None, why: str = "") -> int:
        """The variable's value; the default if it is not set or wrong."""
        text = os.environ.get(name)
        if text is None:
            return default
        allowed = f"{least} or more" if most is None else f"{least} to {most}" if most > least else f"{least}"
        # not only int(): it takes "1_0", " 1" and "+1", which torchrun's other readers do not
        known = text.isascii() and text.isdecimal() and least <= int(text) <= (int(text) if most is None else most)
        if not known:
            problems.append(Problem(f"{name} = {text!r}", f"not a whole number of {allowed}{why}."))
        return int(text) if known else default

    world_size = number("WORLD_SIZE", 1, 1)
    local_world_size = number("LOCAL_WORLD_SIZE", 1, 1)
    wrong = {problem.where.partition(" ")[0] for problem in problems}
    largest = None if "WORLD_SIZE" in wrong or "WORLD_SIZE" not in os.environ else world_size - 1
    rank = number("RANK", 0, 0, largest, "" if largest is None else f", as WORLD_SIZE = {world_size}")
    local_largest = local_world_size - 1 if "LOCAL_WORLD_SIZE" in os.environ and not wrong else largest
    local_rank = number("LOCAL_RANK", 0, 0, local_largest)
    port = number("MASTER_PORT", 0, 1, _LARGEST_PORT)
    for name in ("WORLD_SIZE", "MASTER_PORT"):
        if "RANK" in os.environ and name not in os.environ:
            problems.append(Problem(name, f"not set, but RANK = {os.environ['RANK']} is."))
    if "RANK" not in os.environ and world_size > 1:
        problems.append(Problem("RANK", f"not set, but WORLD_SIZE = {world_size} is."))
    address = os.environ.get("MASTER_ADDR") or Place.address
    return Place(rank, world_size, local_rank, local_world_size, address, port or None), problems
