"""What is saved comes back in every bit; other numbers of ranks read it; nothing in it is a pickle."""

from __future__ import annotations

import hashlib
import json
import pickletools
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_states import assert_same_state, assert_same_tensors, saved, tiny_state

from longspan.errors import CheckpointError
from longspan.trainer.checkpoint import contents
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.checkpoint.verify import fingerprint, verify


def test_round_trip_is_exact(tmp_path: Path) -> None:
    store, state = CheckpointStore(tmp_path), tiny_state(7)
    result = store.save(state)
    assert result.ok and result.path == tmp_path / "step-00000007" and result.error is None
    loaded, path = store.load_newest(0, 4)
    assert path == result.path
    assert_same_state(loaded, state)


def test_layout_and_manifest(tmp_path: Path) -> None:
    folder = saved(tmp_path, 12).committed()[0]
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [
        "COMMITTED",
        "config.yaml",
        "data.json",
        "manifest.json",
        "optimizer/part-00000-00000.safetensors",
        "rng.json",
        "state/lanes-00000-00003.safetensors",
        "weights/part-00000-00000.safetensors",
    ]
    manifest = verify(folder)
    assert manifest["step"] == 12 and manifest["counters"] == {"tokens": 1200, "skips": 1}
    assert sorted(manifest["files"]) == [name for name in files if name not in ("COMMITTED", "manifest.json")]
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert fingerprint(folder) == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    subprocess.run(["sha256sum", "--check", "--quiet", "COMMITTED"], cwd=folder, check=True)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    manifest = verify(store.committed()[0])
    assert manifest["tied"] == {"head.weight": "embed.weight"}
    loaded, _ = store.load_newest(0, 4)
    assert loaded.weights["head.weight"].data_ptr() == loaded.weights["embed.weight"].data_ptr()


def test_views_and_strides_are_saved_as_they_look(tmp_path: Path) -> None:
    store, state = CheckpointStore(tmp_path), tiny_state(1)
    flat = torch.arange(24.0)
    state.weights = {"left": flat[:12].view(3, 4), "right": flat[12:].view(3, 4), "turned": flat.view(4, 6).t()}
    state.lanes = {"a": flat.view(4, 6)[:, :2], "b": flat.view(4, 6)[:, :2], "empty": torch.zeros(4, 0)}
    assert store.save(state).ok
    assert_same_state(store.load_newest(0, 4)[0], state)


def test_equal_contents_have_equal_fingerprints(tmp_path: Path) -> None:
    state = tiny_state(3)
    folders = []
    for name in ("one", "two"):
        result = CheckpointStore(tmp_path / name).save(state)
        folders.append(result.path)
    assert fingerprint(folders[0]) == fingerprint(folders[1])
    state.counters["tokens"] += 1
    assert fingerprint(CheckpointStore(tmp_path / "three").save(state).path) != fingerprint(folders[0])


def test_large_parameters_go_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "FILE_BYTES", 600)
    store, state = CheckpointStore(tmp_path), tiny_state(5)
    folder = store.save(state).path
    assert len(list((folder / "weights").iterdir())) == 2
    assert_same_state(store.load_newest(0, 4)[0], state)


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "checkpoints").load_newest(0, 4) is None


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 3), (3, 4), (0, 4)])
def test_any_range_of_lanes_can_be_read(tmp_path: Path, start: int, stop: int) -> None:
    loaded, _ = saved(tmp_path, 9).load_newest(start, stop)
    whole = tiny_state(9).lanes
    assert_same_tensors(loaded.lanes, {name: tensor[start:stop] for name, tensor in whole.items()})


def test_of_more_lanes_than_saved_those_that_are_there_are_read(tmp_path: Path) -> None:
    loaded, _ = saved(tmp_path, 9).load_newest(2, 6)
    assert (loaded.lane_start, loaded.lane_stop) == (2, 4)
    assert_same_tensors(loaded.lanes, {name: tensor[2:] for name, tensor in tiny_state(9).lanes.items()})
    assert saved(tmp_path, 9).load_newest(4, 6)[0].lanes is None


def test_what_each_lane_goes_on_with_is_kept_beside_its_state(tmp_path: Path) -> None:
    state = tiny_state(9)
    state.places = [("s/a", 64), None, ("s/b", 0), ("s/é", 7)]
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.save(state).ok
    assert store.load_newest(0, 4)[0].places == state.places
    assert store.load_newest(2, 9)[0].places == state.places[2:]


def test_a_tokenizer_is_kept_and_verified_like_the_rest(tmp_path: Path) -> None:
    state = tiny_state(9)
    state.tokenizer = {"description.json": b"{}", "tokenizer.model": b"\0\1\2" * 99}
    store = CheckpointStore(tmp_path / "checkpoints", warn=lambda message: None)
    path = store.save(state).path
    assert store.load_newest(0, 4)[0].tokenizer == state.tokenizer
    (path / "tokenizer" / "tokenizer.model").write_bytes(b"\0\1\3" * 99)
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer\.model"):
        store.load_newest(0, 4)


def test_wrong_number_of_lanes_is_refused_when_saving(tmp_path: Path) -> None:
    state = tiny_state(1)
    state.lane_stop = 5
    with pytest.raises(ValueError, match="has 5 lanes"):
        CheckpointStore(tmp_path).save(state)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


def test_divide_gives_each_tensor_to_one_rank_that_holds_it() -> None:
    everything = {"a": 100, "b": 60, "c": 50, "d": 1}
    shares = contents.divide([everything, everything])
    assert sorted(name for share in shares for name in share) == ["a", "b", "c", "d"]
    assert shares == [["a", "d"], ["b", "c"]]
    assert contents.divide([everything, {}]) == [["a", "b", "c", "d"], []]
    assert contents.divide([{"a": 1}, {"b": 9}]) == [["a"], ["b"]]


def is_pickle(content: bytes) -> bool:
    """Whether a pickle machine would accept the bytes as a program."""
    try:
        for _ in pickletools.genops(content):
            pass
    except Exception:
        return False
    return True


def test_no_file_is_a_pickle_or_an_archive(tmp_path: Path) -> None:
    folder = saved(tmp_path, 4).committed()[0]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not is_pickle(content) and not content.startswith((b"PK", b"\x80")), path
            if path.suffix == ".json":
                json.loads(content)
            if path.suffix == ".safetensors":
                header = int.from_bytes(content[:8], "little")
                described = json.loads(content[8 : 8 + header])
                end = max(entry["data_offsets"][1] for name, entry in described.items() if name != "__metadata__")
                assert 8 + header + end == len(content), f"{path} holds bytes that no tensor owns"


def test_the_pickle_scan_sees_a_pickle(tmp_path: Path) -> None:
    import pickle

    assert is_pickle(pickle.dumps({"a": 1}))
