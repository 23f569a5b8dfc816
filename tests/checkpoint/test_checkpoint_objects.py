"""Checkpoints in an object store: an S3 server on this machine, its failures, and deaths of the process that saves."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from object_server import BUCKET, ObjectServer
from test_checkpoint_load import save_model
from tiny_states import KILLED, assert_same_state, in_child, tiny_state

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from tiny_training import build_tiny_corpus, read_log, tiny_config

from longspan.errors import CheckpointError, UsageError
from longspan.trainer import cli, recipes
from longspan.trainer.checkpoint import crash_points, object_folder
from longspan.trainer.checkpoint.load import load_model
from longspan.trainer.checkpoint.places import RemotePath, place_of
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.checkpoint.verify import newest, pin, pinned, unpin, verify
from longspan.trainer.config import RunConfig
from longspan.trainer.export import export_checkpoint
from longspan.trainer.loop import train
from longspan.trainer.run_directory import check_usable, checkpoint_root

_numbers = itertools.count(1)
LONG_POINTS = ("before-temporary", "mid-payload", "after-payload", "after-committed", "before-prune")


@pytest.fixture
def root(server: ObjectServer) -> Iterator[RemotePath]:
    """An empty place in the store."""
    # brackets are a pattern to some of fsspec's functions
    yield place_of(f"s3://{BUCKET}/[{next(_numbers)}]/checkpoints")  # type: ignore[misc]
    server.fault = lambda method, path: None
    server.faults.clear()


def store_of(root: RemotePath, keep_last: int = 2) -> CheckpointStore:
    """A store with a client of its own, as another process has it."""
    return CheckpointStore(RemotePath.of(str(root)), keep_last=keep_last, warn=lambda message: None)


def steps(root: RemotePath) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in store_of(root).committed()]


def names(root: RemotePath) -> list[str]:
    return [path.name for path in root.iterdir()]


def check_old_is_good(root: RemotePath, step: int) -> None:
    """The newest is that of `step`, it verifies, and nothing of a later one is left after a look."""
    state, folder = store_of(root).load_newest(0, 4)  # type: ignore[misc]
    assert state.step == step and folder.name == f"step-{step:08d}"
    assert_same_state(state, tiny_state(step))
    verify(folder)
    assert names(root) == [f"step-{number:08d}" for number in steps(root)]


@pytest.mark.parametrize("scheme", ["s3", "memory"])
def test_save_load_prune_pin(root: RemotePath, scheme: str) -> None:
    if scheme == "memory":
        root = place_of("memory://runs/a/checkpoints")  # type: ignore[assignment]
    assert store_of(root).load_newest(0, 4) is None
    store = store_of(root)
    for step in (1, 2):
        assert store.save(tiny_state(step)).ok
    first = store.committed()[0]
    pin(first, "curve")
    with pytest.raises(UsageError, match="is not there"):
        pin(root / "step-00000009", "late")
    for step in (3, 4):
        assert store.save(tiny_state(step)).ok
    assert steps(root) == [1, 3, 4] and pinned(first) == ["curve"]
    unpin(first, "curve")
    unpin(first, "curve")
    assert store.save(tiny_state(5)).ok
    check_old_is_good(root, 5)
    assert store.save(tiny_state(5)).ok and steps(root) == [4, 5], "saved already, verified and kept"


@pytest.mark.long
def test_a_pin_between_look_and_removal_wins(root: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(root)
    for step in (1, 2):
        assert store.save(tiny_state(step)).ok
    monkeypatch.setattr(object_folder, "pinned", lambda folder: ["just-in-time"])
    assert store.save(tiny_state(3)).ok
    assert steps(root) == [1, 2, 3]
    verify(root / "step-00000001")


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("500", "COMMITTED"),
        ("cut", "optimizer/"),
        pytest.param("500", "weights/", marks=pytest.mark.long),
        pytest.param("500", "manifest.json", marks=pytest.mark.long),
        pytest.param("cut", "COMMITTED", marks=pytest.mark.long),
    ],
)
def test_a_store_that_fails_costs_one_checkpoint(
    root: RemotePath, server: ObjectServer, fault: str, where: str
) -> None:
    store = store_of(root)
    assert store.save(tiny_state(1)).ok
    server.fault = lambda method, path: fault if method == "PUT" and where in path else None
    result = store.save(tiny_state(2))
    assert server.faults and all(entry.startswith(f"{fault} PUT") for entry in server.faults), "the fault happened"
    assert not result.ok and "step 2 not saved" in str(result.error) and "can be reached" in str(result.error)
    assert f"step-00000002/{where}" in str(result.error)
    server.fault = lambda method, path: None
    check_old_is_good(root, 1)
    assert store.save(tiny_state(2)).ok
    check_old_is_good(root, 2)


def test_one_failure_is_tried_again(root: RemotePath, server: ObjectServer) -> None:
    server.fault = lambda method, path: "cut" if method == "PUT" and "weights/" in path and not server.faults else None
    assert store_of(root).save(tiny_state(1)).ok
    assert len(server.faults) == 1
    check_old_is_good(root, 1)


@pytest.mark.long
def test_a_store_that_is_gone_leaves_what_it_has(root: RemotePath, server: ObjectServer) -> None:
    """Not even what the save has written can be removed: the next look does."""
    store = store_of(root)
    assert store.save(tiny_state(1)).ok
    broken: list[str] = []

    def fault(method: str, path: str) -> str | None:
        if method == "PUT" and "manifest.json" in path:
            broken.append(path)
        return "500" if broken else None

    server.fault = fault
    assert not store.save(tiny_state(2)).ok and broken
    server.fault = lambda method, path: None
    assert names(root) == ["step-00000001", "step-00000002"] and steps(root) == [1]
    check_old_is_good(root, 1)


@pytest.mark.long
def test_an_upload_that_the_store_cuts_short_is_seen(root: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(root)
    assert store.save(tiny_state(1)).ok
    files = store.root._files  # type: ignore[union-attr]
    put = files.pipe_file
    monkeypatch.setattr(files, "pipe_file", lambda path, content: put(path, content[:-1]))
    result = store.save(tiny_state(2))
    assert not result.ok and "the store has " in str(result.error)
    monkeypatch.undo()
    check_old_is_good(root, 1)


@pytest.mark.parametrize("point", ["after-manifest", *(pytest.param(p, marks=pytest.mark.long) for p in LONG_POINTS)])
def test_death_of_the_process(root: RemotePath, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    assert store_of(root, keep_last=1).save(tiny_state(1)).ok
    monkeypatch.setattr(crash_points, "_passes", crash_points.Counter())
    monkeypatch.setenv("LONGSPAN_CRASH", f"{point}@1")
    assert in_child(lambda: store_of(root, keep_last=1).save(tiny_state(2)) and None) == KILLED
    monkeypatch.delenv("LONGSPAN_CRASH")
    if point in ("after-payload", "after-manifest"):
        assert "step-00000002" in names(root), "objects without COMMITTED are there"
        assert len(names(root / "step-00000002" / "weights")) == 1
    check_old_is_good(root, 2 if point in ("after-committed", "before-prune") else 1)
    assert store_of(root, keep_last=1).save(tiny_state(2)).ok
    check_old_is_good(root, 2)


@pytest.mark.long
def test_damage_falls_back_and_the_same_step_is_written_anew(root: RemotePath) -> None:
    store = store_of(root)
    for step in (1, 2):
        assert store.save(tiny_state(step)).ok
    (root / "step-00000002" / "data.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"data.json, bytes 2-"):
        verify(root / "step-00000002")
    assert store.load_newest(0, 4)[0].step == 1  # type: ignore[index]
    assert store.save(tiny_state(2)).ok
    check_old_is_good(root, 2)


def test_commands_read_it(root: RemotePath, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "local", 7)
    state, _ = CheckpointStore(tmp_path / "local" / "checkpoints").load_newest(0, 4)  # type: ignore[misc]
    config = recipes.validate(
        RunConfig, recipes.apply_overrides(yaml.safe_load(state.config_yaml), [f"checkpoint.folder={root}"]), "test"
    )
    state.config_yaml = recipes.dump(config)
    assert store_of(root).save(state).ok
    for address in (str(root), f"{root}/step-00000007"):
        assert cli.main(["checkpoint", "verify", address, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["checkpoints"]
        assert [(entry["step"], entry["path"]) for entry in found] == [(7, f"{root}/step-00000007")]
    loaded = load_model(str(root))
    assert loaded.step == 7 and loaded.config.checkpoint.folder == str(root)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(state.config_yaml)
    copy = newest(run)
    assert copy == run / "checkpoints" / "step-00000007" and newest(run) == copy
    verify(copy)
    result = export_checkpoint(run, tmp_path / "export")
    assert result["step"] == 7 and (tmp_path / "export" / "config.json").is_file()
    state.step = 8
    assert store_of(root).save(state).ok
    assert newest(run).name == "step-00000008" and os.listdir(run / "checkpoints") == ["step-00000008"]
    (root / "step-00000008" / "rng.json").write_bytes(b"?")
    (run / "checkpoints" / "step-00000008" / "COMMITTED").unlink()
    with pytest.raises(CheckpointError, match=r"rng.json, bytes 1-"):
        newest(run)
    assert cli.main(["checkpoint", "verify", str(run), "--json"]) == 70
    assert not [name for name in os.listdir(run / "checkpoints") if name.startswith(".tmp")]


def test_a_place_that_holds_checkpoints_is_another_runs(root: RemotePath, tmp_path: Path, server: ObjectServer) -> None:
    assert store_of(root).save(tiny_state(1)).ok
    with pytest.raises(UsageError, match=r"holds checkpoints of an earlier run.*checkpoint.folder"):
        check_usable(tmp_path / "run", root, resume=False)
    check_usable(tmp_path / "run", root, resume=True)
    check_usable(tmp_path / "run", root.parent / "empty", resume=False)
    server.fault = lambda method, path: "500"
    with pytest.raises(UsageError, match="cannot be listed"):
        check_usable(tmp_path / "run", root, resume=False)
    assert server.faults


def test_addresses(tmp_path: Path) -> None:
    assert str(place_of(Path("s3://bucket/a/b"))) == "s3://bucket/a/b", "a Path loses a slash"
    assert place_of(tmp_path) == place_of(tmp_path.as_uri()) == tmp_path
    assert place_of("runs/a") == Path("runs/a")
    assert str(place_of("S3://Bucket/a")) == "s3://Bucket/a" and place_of(f"FILE://{tmp_path}") == tmp_path
    with pytest.raises(UsageError, match=r"warp://x/y.*s3://BUCKET.*s3:// .*gs:// .*az:// .*memory://"):
        place_of("warp://x/y")
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "model": {"dim": 16, "layers": [{"mixer": "sliding_window"}]},
            "data": {"shards": "x"},
            "training": {"steps": 1},
            "checkpoint": {"folder": "memory://elsewhere"},
        }
    )
    assert str(checkpoint_root(config, tmp_path)).startswith("memory://")


@pytest.mark.parametrize(
    ("address", "package", "extra"), [("gs://b/a", "gcsfs", "gcs"), ("AZ://b/a", "adlfs", "azure")]
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, address: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"{package}.*pip install 'longspan\[{extra}\]'"):
        place_of(address)
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert any(requirement.startswith(package) for requirement in extras[extra])


def test_a_run_goes_on_from_the_store(root: RemotePath, server: ObjectServer, tmp_path: Path) -> None:
    """From another run directory, as on another machine; one save meets a store that is down."""
    shards = build_tiny_corpus(tmp_path)
    options = {"checkpoint__folder": str(root), "checkpoint__interval_steps": 2, "validation__interval_steps": 100}
    server.fault = lambda method, path: "500" if method == "PUT" and "step-00000002/COMMITTED" in path else None
    first = train(tiny_config(shards, **options, training__steps=6), tmp_path / "a")
    assert server.faults and first["checkpoint_failures"] == 1
    assert [record["step"] for record in read_log(tmp_path / "a", "checkpoint_failure")] == [2]
    assert steps(root) == [4, 6] and first["checkpoint"] == f"{root}/step-00000006"
    assert not (tmp_path / "a" / "checkpoints").exists()
    for record in read_log(tmp_path / "a", "checkpoint"):
        assert 0 <= record["stall_seconds"] <= record["seconds"] and record["waited_seconds"] >= 0
    second = train(tiny_config(shards, **options, training__steps=8), tmp_path / "b", resume=True)
    assert second["steps"] == 8 and read_log(tmp_path / "b", "start")[0]["resumed"]
    assert steps(root) == [4, 6, 8]
    with pytest.raises(UsageError, match="checkpoints of an earlier run"):
        train(tiny_config(shards, **options), tmp_path / "c")
