"""Damage is always seen, named with file and byte range, and skipped by resume."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from tiny_states import assert_same_state, saved, tiny_state

from longspan.errors import CheckpointError, UsageError
from longspan.trainer.checkpoint import files, store
from longspan.trainer.checkpoint.manifest import commit_line
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.checkpoint.verify import newest, verify

NUM_FLIPS = 240
CLASSES = (
    "COMMITTED",
    "manifest.json",
    "config.yaml",
    "data.json",
    "rng.json",
    "weights/part-00000-00000.safetensors",
    "optimizer/part-00000-00000.safetensors",
    "state/lanes-00000-00003.safetensors",
)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks much smaller than the files, so that a byte range says something."""
    for module in (files, store):
        monkeypatch.setattr(module, "CHUNK_BYTES", 128)
    return 128


def named_ranges(message: str, name: str) -> list[tuple[int, int]]:
    """Byte ranges that a message gives for a file."""
    ranges = []
    for part in re.findall(rf"{re.escape(name)}[^\n]*", message):
        ranges += [(int(first), int(last)) for first, last in re.findall(r"bytes (\d+)-(\d+)", part)]
    return ranges


def flip_bit(path: Path, offset: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def test_every_flipped_bit_is_seen_and_named(tmp_path: Path, small_chunks: int) -> None:
    seed = random.randrange(2**32)
    generator = random.Random(seed)
    warnings: list[str] = []
    runs = CheckpointStore(tmp_path, warn=warnings.append)
    for step in (1, 2):
        assert runs.save(tiny_state(step)).ok
    folder = runs.committed()[1]
    for number in range(NUM_FLIPS):
        name = CLASSES[number % len(CLASSES)]
        path = folder / name
        offset, bit = generator.randrange(path.stat().st_size), generator.randrange(8)
        what = f"seed {seed}, flip {number}: {name} byte {offset} bit {bit}"
        flip_bit(path, offset, bit)
        with pytest.raises(CheckpointError) as caught:
            verify(folder)
        ranges = named_ranges(str(caught.value), name)
        assert any(first <= offset <= last for first, last in ranges), f"{what}: {caught.value}"
        if name not in ("COMMITTED", "manifest.json"):
            assert all(last - first < small_chunks for first, last in ranges), what
        assert caught.value.exit_code == 70 and str(folder) in str(caught.value), what
        warnings.clear()
        state, path_loaded = runs.load_newest(0, 4)
        assert path_loaded == runs.committed()[0] and state.step == 1, what
        assert len(warnings) == 1 and name in warnings[0] and "Falling back" in warnings[0], what
        flip_bit(path, offset, bit)
    verify(folder)
    assert_same_state(runs.load_newest(0, 4)[0], tiny_state(2))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("how", ["truncate", "empty", "grow", "zero page", "remove"])
def test_other_damage_to_one_file(tmp_path: Path, name: str, how: str) -> None:
    runs = saved(tmp_path, 1, 2)
    path = runs.committed()[1] / name
    size = path.stat().st_size
    if how == "remove":
        path.unlink()
        if name == "COMMITTED":
            with pytest.raises(UsageError, match="holds no COMMITTED"):
                verify(path.parent)
            assert runs.load_newest(0, 4)[0].step == 1
            return
    elif how == "zero page":
        path.write_bytes(bytes(min(4096, size)) + path.read_bytes()[4096:])
    else:
        with open(path, "ab") as file:
            file.truncate({"truncate": size - 1, "empty": 0, "grow": size + 3}[how])
    with pytest.raises(CheckpointError, match=re.escape(name)) as caught:
        verify(runs.committed()[1])
    if how == "truncate" and name not in ("COMMITTED", "manifest.json"):
        assert f"bytes {size - 1}-{size - 1}: cut short, {size - 1} bytes instead of {size}" in str(caught.value)
    assert runs.load_newest(0, 4)[0].step == 1


@pytest.mark.parametrize("name", CLASSES[1:])
def test_a_file_of_another_step_is_seen(tmp_path: Path, name: str) -> None:
    runs = saved(tmp_path, 1, 2)
    older, newer = runs.committed()
    (newer / name).write_bytes((older / name).read_bytes())
    with pytest.raises(CheckpointError, match=re.escape(name)):
        verify(newer)
    assert runs.load_newest(0, 4)[0].step == 1


def test_files_swapped_inside_a_checkpoint_are_seen(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2).committed()[0]
    left, right = folder / CLASSES[5], folder / CLASSES[6]
    first, second = left.read_bytes(), right.read_bytes()
    left.write_bytes(second)
    right.write_bytes(first)
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert CLASSES[5] in str(caught.value) and CLASSES[6] in str(caught.value)


def test_stale_manifest_with_its_own_commit_is_seen(tmp_path: Path) -> None:
    runs = saved(tmp_path, 1, 2)
    older, newer = runs.committed()
    for name in ("manifest.json", "COMMITTED"):
        shutil.copy(older / name, newer / name)
    with pytest.raises(CheckpointError, match="is of step 1, in the folder step-00000002"):
        verify(newer)
    assert runs.load_newest(0, 4)[0].step == 1


def forge(folder: Path, **changes: object) -> None:
    """A manifest with other contents and a matching COMMITTED."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMMITTED").write_bytes(commit_line(content))


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1).committed()[0]
    forge(folder, format_version=2)
    with pytest.raises(CheckpointError, match="format version 2, this version of Longspan reads 1"):
        verify(folder)


def test_a_forged_path_outside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1).committed()[0]
    entry = {"size": 0, "sha256": "0" * 64, "chunk_crc32": ""}
    forge(folder, files={"../../secret": entry})
    with pytest.raises(CheckpointError, match="lies outside the checkpoint"):
        verify(folder)


@pytest.mark.parametrize("content", [b"[]", b"{", b"{}", b"[" * 100_000, b'{"format_version": 1}'])
def test_a_forged_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = saved(tmp_path, 1).committed()[0]
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMMITTED").write_bytes(commit_line(content))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(folder)


def test_none_left_names_all_of_them(tmp_path: Path) -> None:
    runs = saved(tmp_path, 1, 2)
    for folder in runs.committed():
        flip_bit(folder / "data.json", 0, 0)
    with pytest.raises(CheckpointError) as caught:
        runs.load_newest(0, 4)
    text = str(caught.value)
    assert "step-00000001" in text and "step-00000002" in text and "data.json, bytes 0-" in text
    assert caught.value.exit_code == 70


def test_an_unpublished_folder_is_no_candidate(tmp_path: Path) -> None:
    runs = saved(tmp_path, 1)
    shutil.copytree(runs.committed()[0], tmp_path / "step-00000002")
    os.unlink(tmp_path / "step-00000002" / "COMMITTED")
    assert [folder.name for folder in runs.committed()] == ["step-00000001"]
    assert runs.load_newest(0, 4)[0].step == 1


def test_saving_over_a_damaged_checkpoint_moves_it_aside(tmp_path: Path) -> None:
    warnings: list[str] = []
    runs = CheckpointStore(tmp_path, warn=warnings.append)
    folder = runs.save(tiny_state(2)).path
    flip_bit(folder / "rng.json", 5, 1)
    assert runs.save(tiny_state(2)).ok
    verify(folder)
    assert [path.name for path in tmp_path.glob("damaged-*")] and "rng.json" in warnings[0]


def test_saving_over_a_good_checkpoint_keeps_it(tmp_path: Path) -> None:
    runs = saved(tmp_path, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert runs.save(tiny_state(2)).ok
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_that_cannot_be_listed_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = saved(tmp_path, 1)

    def fail(root: Path) -> list[Path]:
        raise OSError(5, "Input/output error", str(root))

    monkeypatch.setattr(store, "committed_folders", fail)
    with pytest.raises(CheckpointError, match=r"cannot be listed.*Input/output error"):
        runs.load_newest(0, 4)


class TestNewest:
    def test_a_run_directory_means_its_newest(self, tmp_path: Path) -> None:
        saved(tmp_path / "checkpoints", 5, 11)
        assert newest(tmp_path).name == "step-00000011"

    def test_a_checkpoint_means_itself(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "checkpoints", 5, 11).committed()[0]
        assert newest(folder) == folder

    def test_missing_path(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no/such does not exist"):
            newest(tmp_path / "no/such")

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match="is a file, not a folder"):
            newest(tmp_path / "file")

    def test_neither(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="neither a checkpoint"):
            newest(tmp_path)

    def test_without_committed(self, tmp_path: Path) -> None:
        folder = saved(tmp_path, 5).committed()[0]
        (folder / "COMMITTED").unlink()
        with pytest.raises(UsageError, match="holds no COMMITTED file"):
            newest(folder)
