"""What pruning keeps: the newest, milestones, pinned ones, and always one that verifies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_states import saved, tiny_state

from longspan.errors import UsageError
from longspan.trainer.checkpoint import local_folder
from longspan.trainer.checkpoint import prune as prune_module
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.checkpoint.verify import pin, pinned, unpin, verify


def steps(store: CheckpointStore) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in store.committed()]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep_last: int) -> None:
    store = saved(tmp_path, *range(1, 7), keep_last=keep_last)
    assert steps(store) == list(range(7 - keep_last, 7))
    assert sorted(os.listdir(tmp_path)) == [folder.name for folder in store.committed()]


def test_milestones_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1, milestone_interval_steps=4)
    for step in range(1, 11):
        assert store.save(tiny_state(step)).ok
    assert steps(store) == [4, 8, 10]


def test_pinned_ones_are_kept_until_unpinned(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, keep_last=2)
    first, second = store.committed()
    pin(first, "curve-v1.ab12")
    pin(first, "other")
    pin(second, "curve-v1.ab12")
    pin(second, "curve-v1.ab12")
    assert pinned(first) == ["curve-v1.ab12", "other"] and pinned(second) == ["curve-v1.ab12"]
    store = saved(tmp_path, 3, 4, keep_last=1)
    assert steps(store) == [1, 2, 4]
    unpin(first, "other")
    unpin(second, "curve-v1.ab12")
    unpin(second, "curve-v1.ab12")
    saved(tmp_path, 5, keep_last=1)
    assert steps(store) == [1, 5]
    verify(first)


def test_pin_of_a_pruned_checkpoint_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, keep_last=1)
    gone = tmp_path / "step-00000001"
    with pytest.raises(UsageError, match="is not there"):
        pin(gone, "late")
    assert pinned(gone) == []


@pytest.mark.parametrize("owner", ["", "..", "a/b", "x" * 200, "name with spaces"])
def test_pin_owner_must_be_a_file_name(tmp_path: Path, owner: str) -> None:
    folder = saved(tmp_path, 1).committed()[0]
    with pytest.raises(UsageError, match="pin owner"):
        pin(folder, owner)


def test_a_pin_between_look_and_removal_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved(tmp_path, 1, 2)
    first = store.committed()[0]

    def look(folder: Path, looks: list[Path] = []) -> list[str]:  # noqa: B006 - counts calls
        looks.append(folder)
        return [] if len(looks) == 1 else ["just-in-time"]

    monkeypatch.setattr(prune_module, "pinned", look)
    monkeypatch.setattr(local_folder, "pinned", look)
    saved(tmp_path, 3, keep_last=2)
    assert steps(store) == [1, 2, 3]
    verify(first)


def test_one_that_verifies_is_kept_even_below_damaged_ones(tmp_path: Path) -> None:
    """Steps above the fallback are damaged left-overs; they may not crowd out the checkpoint just written."""
    store = saved(tmp_path, 1, 50, 60)
    for folder in store.committed()[1:]:
        (folder / "data.json").write_bytes(b"{}")
    quiet = CheckpointStore(tmp_path, keep_last=1, warn=lambda message: None)
    assert quiet.save(tiny_state(2)).ok
    assert quiet.load_newest(0, 4)[0].step == 2


def test_a_checkpoint_that_cannot_be_removed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1, 2)
    warnings: list[str] = []

    def refuse(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(prune_module.shutil, "rmtree", refuse)
    store = CheckpointStore(tmp_path, keep_last=1, warn=warnings.append)
    assert store.save(tiny_state(3)).ok
    assert len(warnings) == 2 and "could not be removed" in warnings[0] and "step-00000001" in warnings[0]
    monkeypatch.undo()
    assert store.save(tiny_state(4)).ok
    assert sorted(os.listdir(tmp_path)) == ["step-00000004"]
