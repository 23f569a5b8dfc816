"""One folder of checkpoints serves one run: who takes it, who is refused, and what a crash leaves of that."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from object_server import BUCKET, ObjectServer
from tiny_states import KILLED, assert_same_state, in_child, tiny_state

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from tiny_training import tiny_config

from longspan.errors import EXIT_USAGE, UsageError
from longspan.trainer.checkpoint import file_lock
from longspan.trainer.checkpoint.file_lock import open_locked
from longspan.trainer.checkpoint.ownership import ID_FILE, Claim, Identity, claim, read_owner
from longspan.trainer.checkpoint.places import Place, RemotePath, place_of
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.loop import train
from longspan.trainer.run_directory import RunDirectory, check_usable, identity_of

_numbers = itertools.count(1)
ROUNDS = 15


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place, of both kinds."""
    if request.param == "local":
        return tmp_path / "kept"
    request.getfixturevalue("server")
    return place_of(f"s3://{BUCKET}/{next(_numbers)}/kept")


def identity(name: str = "a", run: str | None = None, seed: int = 0) -> Identity:
    return Identity(run, name, seed, "0" * 64, f"/runs/{name}")


def take(root: Place, mine: Identity, *, resume: bool = False) -> Claim:
    return claim(root, mine, resume=resume, remember=lambda run: None, note=lambda message: None)


def contend(root: Path, number: int, start: Any, end: Any) -> None:
    """One of two processes: its exit code is 0 if it won, 3 if it was told who did."""
    start.wait()
    try:
        mine = take(root, identity(f"run{number}"))
    except UsageError as error:
        end.wait()
        os._exit(3 if f"run{1 - number}, seed 0" in str(error) and error.exit_code == EXIT_USAGE else 4)
    end.wait()
    mine.check(print)
    os._exit(0)


def test_of_two_processes_that_start_at_once_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(ROUNDS):
        root = tmp_path / str(number)
        start, end = context.Barrier(2), context.Barrier(2)
        processes = [context.Process(target=contend, args=(root, which, start, end)) for which in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert sorted(process.exitcode for process in processes) == [0, 3], number
        winner = next(which for which, process in enumerate(processes) if process.exitcode == 0)
        assert read_owner(root).name == f"run{winner}"  # type: ignore[union-attr]
        assert os.listdir(root) == ["owner"], "nothing of the other is left"


def test_an_object_is_created_once(root: Place) -> None:
    if isinstance(root, Path):
        root = place_of(f"memory://{root}")
    record = root / "owner.json"
    assert isinstance(record, RemotePath) and record.create_bytes(b"first") and record.create_bytes(b"first")
    assert not record.create_bytes(b"second") and record.read_bytes() == b"first"


def test_of_two_that_start_at_once_on_a_store_one_wins(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        address, start = f"s3://{BUCKET}/{next(_numbers)}/kept", threading.Barrier(2)
        both, met = threading.Barrier(2), list[int]()

        def meet(method: str, path: str, both: threading.Barrier = both, met: list[int] = met) -> None:
            if method == "PUT":
                met.append(both.wait(30))  # both have seen that there is no owner

        monkeypatch.setattr(server, "fault", meet)

        def work(number: int, address: str = address, start: threading.Barrier = start) -> str:
            root = RemotePath.of(address)
            start.wait()
            try:
                take(root, identity(f"run{number}")).check(print)
            except UsageError as error:
                return str(error)
            return "won"

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(work, range(2)))
        assert sorted(met) == [0, 1] and results.count("won") == 1
        winner = results.index("won")
        assert f"(run{winner}, seed 0)" in results[1 - winner]


def test_who_may_take_a_folder(root: Place) -> None:
    first = take(root, identity())
    run = first.owner.run
    first.release(unused=False)
    for mine, resume in ((identity("b"), False), (identity("b", "b" * 16), True), (identity(), True)):
        with pytest.raises(
            UsageError, match=r"belong to another run: run .* \(a, seed 0\) with the run directory /runs/a"
        ):
            take(root, mine, resume=resume)
    take(root, replace(identity(run=run), run_dir="/moved")).release(unused=False)
    assert CheckpointStore(root).save(tiny_state(1)).ok
    for other in (identity("b"), identity(seed=1), replace(identity(), config_sha256="1" * 64)):
        with pytest.raises(
            UsageError, match=r"Choose another checkpoint.folder.*--resume.*remove .*owner.* has another "
        ):
            take(root, other, resume=True)
    again = take(root, identity(), resume=True)
    assert again.owner.run == run and again.owner.started == first.owner.started


def test_the_holder_before_writes_nothing_more(root: Place) -> None:
    old = take(root, identity())
    store = CheckpointStore(root, claim=old, warn=print)
    assert store.save(tiny_state(1)).ok
    if isinstance(root, Path):
        with pytest.raises(UsageError, match=r"another trainer is at work in .*run "):
            take(root, identity("a", old.owner.run), resume=True)
        os.close(old._lock)  # type: ignore[arg-type]  # as where a file system has no locks
        old._lock = None
    new = take(root, identity("a", old.owner.run), resume=True)
    with pytest.raises(UsageError, match=r"was taken over.*writes nothing more"):
        store.save(tiny_state(2))
    assert [folder.name for folder in store.committed()] == ["step-00000001"]
    assert CheckpointStore(root, claim=new).save(tiny_state(2)).ok


def test_a_takeover_in_the_middle_of_a_save(root: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the new holder finds and writes, the old one neither publishes nor removes."""
    old = take(root, identity())
    store = CheckpointStore(root, claim=old, keep_last=1, warn=print)
    assert store.save(tiny_state(1)).ok
    write, taken = CheckpointStore._write_payload, []

    def and_then_taken(self: CheckpointStore, *args: Any) -> Any:
        written = write(self, *args)
        monkeypatch.undo()
        old._lock = None
        monkeypatch.setattr("longspan.trainer.checkpoint.ownership.open_locked_patiently", lambda path, host: -1)
        taken.append(take(root, identity("a", old.owner.run), resume=True))
        assert CheckpointStore(root, claim=taken[0], keep_last=1).save(tiny_state(2)).ok
        return written

    monkeypatch.setattr(CheckpointStore, "_write_payload", and_then_taken)
    if isinstance(root, Path):  # the new holder took what it was writing for a left-over
        assert not store.save(tiny_state(2)).ok and taken
    with pytest.raises(UsageError, match="was taken over"):
        store.save(tiny_state(2))
    assert taken
    state, folder = CheckpointStore(root).load_newest(0, 4)  # type: ignore[misc]
    assert folder.name == "step-00000002"
    assert_same_state(state, tiny_state(2))


def start(run_dir: Path, root: Place, *, heard: list[str]) -> Claim:
    """What a run directory does when it starts, without training."""
    run_dir.mkdir(exist_ok=True)
    file = run_dir / ID_FILE
    mine = replace(identity(run=file.read_text() if file.exists() else None), run_dir=str(run_dir))
    return claim(root, mine, resume=True, remember=lambda run: void(file.write_text(run)), note=heard.append)


def void(value: object) -> None:
    """Nothing of it."""


def test_a_copied_run_directory_does_not_share_the_folder_of_the_one_it_was_copied_from(
    root: Place, tmp_path: Path
) -> None:
    heard: list[str] = []
    start(tmp_path / "a", root, heard=heard).release(unused=False)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UsageError, match=r"b is a copy of the run directory .*a, which is there still"):
        start(tmp_path / "b", root, heard=heard)
    start(tmp_path / "a", root, heard=heard).release(unused=False)
    (tmp_path / "a").rename(tmp_path / "c")  # no copy: it was moved
    start(tmp_path / "c", root, heard=heard).release(unused=False)
    assert not heard


def test_a_run_copied_with_its_checkpoints_is_a_run_of_its_own(tmp_path: Path) -> None:
    heard: list[str] = []
    a, b = tmp_path / "a", tmp_path / "b"
    first = start(a, a / "checkpoints", heard=heard)
    first.release(unused=False)
    shutil.copytree(a, b)
    for _ in range(2):
        start(b, b / "checkpoints", heard=heard).release(unused=False)
    assert len(heard) == 1 and f"is a copy of {a}, which is there still" in heard[0], "once"
    branch = read_owner(b / "checkpoints")
    assert branch is not None and branch.run != first.owner.run == (a / ID_FILE).read_text()
    assert branch.run == (b / ID_FILE).read_text() and branch.run_dir == str(b)


def test_a_branch_tracks_apart_and_one_that_could_not_start_is_a_copy_still(shards: Path, tmp_path: Path) -> None:
    config, heard = tiny_config(shards), list[str]()
    first = RunDirectory(tmp_path / "a")
    first.claim(config, resume=False, note=heard.append)
    first.write_config("")
    first.release()
    (tmp_path / "a" / "tracking.json").write_text("{}")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for starts in (False, True):
        copy = RunDirectory(tmp_path / "b")
        copy.claim(config, resume=True, note=heard.append)
        if starts:
            copy.write_config("")
        copy.release()
        same = (tmp_path / "b" / ID_FILE).read_text() == (tmp_path / "a" / ID_FILE).read_text()
        assert same is not starts and "is a copy of" in heard[-1] and len(heard) == 1 + starts
        branch = read_owner(tmp_path / "b" / "checkpoints")
        assert branch is not None and branch.run == (tmp_path / "b" / ID_FILE).read_text().strip()
    assert (tmp_path / "a" / "tracking.json").exists() and not (tmp_path / "b" / "tracking.json").exists()


@pytest.mark.parametrize("host", [None, "gone"])
def test_the_lock_of_a_host_that_has_gone_is_waited_for(
    host: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a requeued job is back before the file server lets go; a trainer of this host is refused at once."""
    lock = tmp_path / "lock"
    held = open_locked(lock)
    lock.write_text(json.dumps({"pid": 1, "host": host or socket.gethostname()}))
    assert held is not None
    monkeypatch.setattr(file_lock, "_ASK_SECONDS", 0.05)
    threading.Timer(0.5, os.close, [held]).start()
    started = time.monotonic()
    if host is None:
        with pytest.raises(UsageError, match="another trainer is at work"):
            RunDirectory(tmp_path)
        assert time.monotonic() - started < 0.4
        return
    assert RunDirectory(tmp_path).stale_holder == {"pid": "1", "host": "gone"}
    assert time.monotonic() - started >= 0.4


def test_a_host_that_holds_on_is_refused_after_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = open_locked(tmp_path / "lock")
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "other"}))
    monkeypatch.setattr(file_lock, "_ASK_SECONDS", 0.05)
    monkeypatch.setattr(file_lock, "LEASE_SECONDS", 0.3)
    with pytest.raises(UsageError, match=r"pid 1 on host other(.|\n)*remove .*/lock"):
        RunDirectory(tmp_path)
    os.close(held)  # type: ignore[arg-type]


def test_a_file_system_without_locks_has_runs_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    RunDirectory(tmp_path / "run").release()
    take(tmp_path / "kept", identity(run="1")).release(unused=False)
    take(tmp_path / "kept", identity(run="1")).release(unused=False)


def test_what_could_not_start_gives_the_folder_back(root: Place) -> None:
    mine = take(root, identity())
    mine.release(unused=True)
    assert read_owner(root) is None and not root.exists()
    first = take(root, identity())
    first.release(unused=False)
    take(root, identity("a", first.owner.run)).release(unused=True)
    assert read_owner(root) == first.owner


def test_a_folder_without_an_owner_is_adopted(root: Place) -> None:
    assert CheckpointStore(root).save(tiny_state(1)).ok
    mine = take(root, identity("b"), resume=True)
    assert read_owner(root) == mine.owner
    assert CheckpointStore(root).load_newest(0, 4)[0].step == 1  # type: ignore[index]


def test_a_damaged_record_is_nobodys_guess(root: Place) -> None:
    take(root, identity()).release(unused=False)
    (root / "owner" / "owner.json").write_bytes(b'{"run": "a')
    with pytest.raises(UsageError, match=r"is damaged.*remove .*owner"):
        take(root, identity("b"), resume=True)


@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "rename"])
@pytest.mark.parametrize("number", [1, 2])
def test_death_while_taking_a_folder(tmp_path: Path, call: str, number: int) -> None:
    """At any call the folder has no owner afterwards, or the one that RUN knows."""
    root, known = tmp_path / "kept", tmp_path / "run_id"

    def die() -> None:
        real, passes = getattr(os, call), itertools.count(1)

        def planted(*args: Any, **kwargs: Any) -> Any:
            if next(passes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, call, planted)
        claim(root, identity(), resume=False, remember=known.write_text, note=print)

    died = in_child(die) == KILLED
    assert died or (call, number) in (("write", 2), ("rename", 2)), "the fault happened"
    owner = read_owner(root)
    run = known.read_text()
    if owner is None:
        take(root, identity("b")).release(unused=True)
    else:
        assert owner.run == run
        with pytest.raises(UsageError, match="another run"):
            take(root, identity("b"))
    mine = take(root, identity("a", run))
    assert CheckpointStore(root, claim=mine).save(tiny_state(1)).ok
    assert sorted(os.listdir(root)) == ["owner", "step-00000001"], "left-overs are gone"


def test_a_folder_that_is_removed_is_made_again(root: Place) -> None:
    mine, heard = take(root, identity()), list[str]()
    store = CheckpointStore(root, claim=mine, warn=heard.append)
    assert store.save(tiny_state(1)).ok
    shutil.rmtree(root) if isinstance(root, Path) else root.remove_tree()
    assert store.save(tiny_state(2)).ok
    assert "has lost its owner record" in heard[0] and read_owner(root) == mine.owner
    assert store.load_newest(0, 4)[0].step == 2  # type: ignore[index]


def test_a_second_run_is_refused_before_training(shards: Path, tmp_path: Path) -> None:
    """Also one that says --resume, as every restart does; the first one's directory may be moved meanwhile."""
    kept = tmp_path / "kept"
    options = {"checkpoint__folder": str(kept), "validation__interval_steps": 100, "checkpoint__interval_steps": 2}
    take(kept, identity()).release(unused=False)  # a run that has started and saved nothing
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"another run: run .* \(a, seed 0\).*Choose another checkpoint.folder"):
            train(tiny_config(shards, **options), tmp_path / "b", resume=resume)
        assert not (tmp_path / "b").exists() and os.listdir(kept) == ["owner"]
    shutil.rmtree(kept)
    train(tiny_config(shards, **options, training__steps=2), tmp_path / "a")
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"another run.*This run has another seed"):
        train(tiny_config(shards, **options, seed=1), tmp_path / "b", resume=True)
    with pytest.raises(UsageError, match=r"beyond training.steps"):
        train(tiny_config(shards, **options, training__steps=1), tmp_path / "b", resume=True)
    assert before == {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}, "nothing was touched"
    (tmp_path / "a").rename(tmp_path / "moved")
    summary = train(tiny_config(shards, **options, training__steps=4), tmp_path / "moved", resume=True)
    assert summary["steps"] == 4 and read_owner(kept).run_dir == str(tmp_path / "moved")  # type: ignore[union-attr]


def test_the_layout_of_the_ranks_is_no_part_of_the_run(shards: Path, tmp_path: Path) -> None:
    left = identity_of(tiny_config(shards), tmp_path)
    assert left == identity_of(tiny_config(shards, parallel__zero_stage=2, training__micro_batch_lanes=2), tmp_path)
    assert left != identity_of(tiny_config(shards, model__ffn_dim=64), tmp_path)


def test_memory_serves_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_usable(tmp_path, place_of("memory://kept"), resume=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"memory of one process, and there are 2.*s3://BUCKET") as caught:
        check_usable(tmp_path, place_of("memory://kept"), resume=False)
    assert caught.value.exit_code == EXIT_USAGE
    check_usable(tmp_path, tmp_path / "kept", resume=False)


def test_the_record_can_be_read_by_a_person(tmp_path: Path) -> None:
    mine = take(tmp_path / "kept", identity())
    record = json.loads((tmp_path / "kept" / "owner" / "owner.json").read_text())
    assert record["run"] == mine.owner.run and record["pid"] == os.getpid() and record["run_dir"] == "/runs/a"
    assert record["started"].endswith("+00:00") and record["host"]
