"""Power loss: whatever was not synced may be lost, in any combination; a verified checkpoint is always found.

The disk is modelled from a record of one save's calls. A crash keeps, of each file, the contents at its last sync or
any later contents; and, of each folder, the entries at its last sync or any later ones.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tiny_states import saved, tiny_state

from longspan.errors import CheckpointError
from longspan.trainer.checkpoint.store import CheckpointStore

NUM_OUTCOMES = 4  # random losses for each prefix of the record


@dataclass
class Node:
    """A file (`entries` is None) or folder of the modelled disk."""

    entries: dict[str, Node] | None = None
    content: bytes = b""
    durable: Any = None  # contents or entries at the last sync


@dataclass
class Disk:
    """Applies recorded calls, and knows what each sync made durable."""

    root: Node = field(default_factory=lambda: Node(entries={}, durable={}))

    def find(self, path: str) -> Node:
        node = self.root
        for part in Path(path).parts:
            assert node.entries is not None
            node = node.entries[part]
        return node

    def apply(self, call: tuple[Any, ...]) -> None:
        kind, path = call[0], call[1]
        if kind == "write":
            self.find(path).content += call[2]
        elif kind == "sync":
            node = self.find(path)
            node.durable = node.content if node.entries is None else dict(node.entries)
        else:
            parent, name = self.find(str(Path(path).parent)), Path(path).name
            assert parent.entries is not None
            if kind == "rename":
                target = self.find(str(Path(call[2]).parent))
                assert target.entries is not None
                target.entries[Path(call[2]).name] = parent.entries.pop(name)
            elif kind == "remove":
                del parent.entries[name]
            else:
                parent.entries[name] = Node(entries={}, durable={}) if kind == "folder" else Node(durable=b"")

    def survive(self, place: Path, node: Node, generator: random.Random) -> None:
        """Write to the real folder `place` what one power loss leaves of the modelled folder `node`."""
        place.mkdir()
        assert node.entries is not None
        before, after = node.durable, node.entries
        for name in sorted({*before, *after}):
            old, new = before.get(name), after.get(name)
            chosen = generator.choice([old, new])
            if chosen is None:
                continue
            if chosen.entries is not None:
                self.survive(place / name, chosen, generator)
            else:
                synced = chosen.content == chosen.durable
                length = len(chosen.content) if synced else generator.randint(0, len(chosen.content))
                (place / name).write_bytes(chosen.content[:length])


def record_save(root: Path, monkeypatch: pytest.MonkeyPatch, step: int, keep_last: int) -> list[tuple[Any, ...]]:
    """Calls of one save below `root`, paths relative to it."""
    calls: list[tuple[Any, ...]] = []
    handles: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")}

    def inside(path: Any, dir_fd: int | None = None) -> str:
        base = root / handles[dir_fd] if dir_fd is not None else root
        return os.path.relpath(base / os.fsdecode(path), root)

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        handle = real["open"](path, flags, mode, dir_fd=dir_fd)
        handles[handle] = inside(path, dir_fd)
        if flags & os.O_CREAT:
            calls.append(("file", handles[handle]))
        return handle

    def write(handle: int, content: Any) -> int:
        count = real["write"](handle, content)
        calls.append(("write", handles[handle], bytes(content[:count])))
        return count

    def fsync(handle: int) -> None:
        real["fsync"](handle)
        calls.append(("sync", handles[handle]))

    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real["mkdir"](path, mode, dir_fd=dir_fd)
        calls.append(("folder", inside(path, dir_fd)))

    def rename(source: Any, target: Any) -> None:
        real["rename"](source, target)
        calls.append(("rename", inside(source), inside(target)))

    def remove(name: str) -> Any:
        def call(path: Any, *, dir_fd: int | None = None) -> None:
            real[name](path, dir_fd=dir_fd)
            calls.append(("remove", inside(path, dir_fd)))

        return call

    fakes = {"open": open_, "write": write, "fsync": fsync, "mkdir": mkdir, "rename": rename}
    with monkeypatch.context() as patch:
        for name, fake in {**fakes, "unlink": remove("unlink"), "rmdir": remove("rmdir")}.items():
            patch.setattr(os, name, fake)
        assert CheckpointStore(root, keep_last=keep_last).save(tiny_state(step)).ok
    return calls


def disk_with(root: Path) -> Disk:
    """A modelled disk that durably holds what `root` holds."""

    def node(path: Path) -> Node:
        if path.is_dir():
            entries = {child.name: node(child) for child in path.iterdir()}
            return Node(entries=entries, durable=dict(entries))
        content = path.read_bytes()
        return Node(content=content, durable=content)

    return Disk(node(root))


def newest_steps(
    root: Path, calls: list[tuple[Any, ...]], scratch: Path, seed: int, first: int = 0
) -> Iterator[set[int]]:
    """For each prefix of the record from `first` calls, newest verified steps after power losses; 0 where none is."""
    generator, disk = random.Random(seed), disk_with(root)
    for call in calls[:first]:
        disk.apply(call)
    for prefix in range(first, len(calls) + 1):
        steps = set()
        for number in range(NUM_OUTCOMES):
            place = scratch / f"{prefix}-{number}"
            disk.survive(place, disk.root, generator)
            try:
                loaded = CheckpointStore(place, warn=lambda message: None).load_newest(0, 4)
                steps.add(0 if loaded is None else loaded[0].step)
            except CheckpointError:
                steps.add(0)
            shutil.rmtree(place)
        yield steps
        if prefix < len(calls):
            disk.apply(calls[prefix])


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[tuple[Any, ...]]]:
    """(folder before the save, its calls): saves step 3 and prunes steps 1 and 2, so that only the new one is left."""
    root, before = tmp_path / "root", tmp_path / "before"
    saved(root, 1, 2)
    shutil.copytree(root, before)
    calls = record_save(root, monkeypatch, 3, keep_last=1)
    assert os.listdir(root) == ["step-00000003"]
    return before, calls


def test_a_verified_checkpoint_survives_every_power_loss(
    record: tuple[Path, list[tuple[Any, ...]]], tmp_path: Path
) -> None:
    before, calls = record
    (tmp_path / "scratch").mkdir()
    seed = random.randrange(2**32)
    found = list(newest_steps(before, calls, tmp_path / "scratch", seed))
    lost = [prefix for prefix, steps in enumerate(found) if not steps <= {2, 3}]
    assert not lost, f"seed {seed}: nothing verified after call {lost[0]} of {len(calls)}: {calls[lost[0] - 1][:2]}"
    assert found[0] == {2} and found[-1] == {3}, "old before the save, new after it"


@pytest.mark.parametrize("lost", ["payload", "folders", "root"])
def test_a_save_that_does_not_sync_is_caught(
    record: tuple[Path, list[tuple[Any, ...]]], tmp_path: Path, lost: str
) -> None:
    before, calls = record
    (tmp_path / "scratch").mkdir()
    wrong = {
        "payload": lambda path: path.endswith(".safetensors"),
        "folders": lambda path: path.endswith(("/weights", "/optimizer", "/state")),
        "root": lambda path: path == ".",
    }[lost]
    kept = [call for call in calls if not (call[0] == "sync" and wrong(call[1]))]
    assert len(kept) < len(calls)
    published = next(place for place, call in enumerate(kept) if call[0] == "rename")
    assert any(0 in steps for steps in newest_steps(before, kept, tmp_path / "scratch", seed=1, first=published))
