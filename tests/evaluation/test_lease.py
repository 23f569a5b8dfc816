"""Leases: one holder, whatever clocks say and whoever dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longspan.trainer.evaluation import lease
from longspan.trainer.evaluation.lease import Keeper, Lease

HOLD = """
import sys, time
from pathlib import Path
from longspan.trainer.evaluation.lease import Lease
assert Lease.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leases" / "key"


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_one_holder_at_a_time(path: Path) -> None:
    held = Lease.take(path)
    assert held is not None and Lease.take(path) is None and held.renew()
    held.release()
    assert not path.exists() and Lease.take(path) is not None


def test_a_dead_process_holds_nothing_and_a_living_one_holds_it_for_ever(path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    os.utime(path, (0, 0))  # clocks say nothing
    assert Lease.take(path, valid_seconds=0.0) is None and lease.holder(path) is not None
    process.kill()
    process.wait()
    assert lease.holder(path) is None and Lease.take(path) is not None


def test_a_pid_that_was_given_to_another_process_is_no_holder(path: Path) -> None:
    assert Lease.take(path) is not None
    change(path, started="1")
    assert Lease.take(path) is not None


def test_a_holder_elsewhere_is_dead_when_its_heartbeat_stands_still(path: Path) -> None:
    assert Lease.take(path) is not None
    change(path, boot="another machine")
    assert Lease.take(path, valid_seconds=0.3) is None  # the wait begins
    change(path, beat=1)
    time.sleep(0.4)
    assert Lease.take(path, valid_seconds=0.3) is None  # it had moved: the wait begins again
    assert Lease.take(path, valid_seconds=0.3) is None
    time.sleep(0.4)
    taken = Lease.take(path, valid_seconds=0.3)
    assert taken is not None and taken.renew()


@pytest.mark.parametrize("offset", [-1e9, 1e9])
def test_a_wrong_wall_clock_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, offset: float) -> None:
    held = Lease.take(path)
    change(path, boot="another machine")
    monkeypatch.setattr(time, "time", lambda: offset)
    os.utime(path, (0, 0))
    assert held is not None and Lease.take(path) is None and Lease.take(path) is None


def test_who_lost_a_lease_is_told_and_does_not_take_it_away(path: Path) -> None:
    held = Lease.take(path)
    change(path, boot="another machine")
    assert Lease.take(path, valid_seconds=0.0) is None
    taken = Lease.take(path, valid_seconds=0.0)
    assert held is not None and taken is not None and not held.renew()
    held.release()
    assert taken.renew()


@pytest.mark.parametrize("content", ["{", "", "[]", "{}", '{"owner": "me"}', '{"beat": 1}', '{"owner": 1, "beat": 1}'])
def test_a_torn_lease_is_free(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    assert lease.holder(path) is None
    taken = Lease.take(path)
    assert taken is not None and taken.renew()


@pytest.mark.parametrize("missing", ["pid", "started", "host", "boot", "namespace"])
def test_a_lease_that_does_not_name_its_process_is_known_by_its_heartbeat(path: Path, missing: str) -> None:
    held = Lease.take(path)
    content = json.loads(path.read_text())
    del content[missing]
    path.write_text(json.dumps(content))
    assert Lease.take(path, valid_seconds=0.2) is None and lease.holder(path) is not None
    assert held is not None and held.renew()
    if missing != "host":  # without it the process is still known, and alive
        assert Lease.take(path, valid_seconds=0.2) is None
        time.sleep(0.3)
        assert Lease.take(path, valid_seconds=0.2) is not None and not held.renew()


def test_a_torn_note_of_the_first_look_begins_the_wait_again(path: Path) -> None:
    assert Lease.take(path) is not None
    change(path, boot="another machine")
    assert Lease.take(path, valid_seconds=0.0) is None
    (look,) = path.parent.glob(".key.seen-*")
    for torn in ({}, {"pulse": json.loads(look.read_text())["pulse"]}, {**json.loads(look.read_text()), "at": "x"}):
        look.write_text(json.dumps(torn))
        assert Lease.take(path, valid_seconds=0.0) is None
    assert Lease.take(path, valid_seconds=0.0) is not None


def test_a_lease_that_is_torn_in_its_holders_hands_is_lost_and_said_so(path: Path) -> None:
    held = Lease.take(path)
    path.write_text("{}")
    assert held is not None and not held.renew()
    held.release()
    assert path.exists()


def test_the_keeper_renews_and_notices_a_loss(tmp_path: Path) -> None:
    with Keeper(beat_seconds=0.02) as keeper:
        assert keeper.take("a", tmp_path / "leases" / "a") and keeper.take("b", tmp_path / "leases" / "b")
        assert not keeper.take("again", tmp_path / "leases" / "a")
        wait_for(lambda: json.loads((tmp_path / "leases" / "a").read_text())["beat"] >= 3)
        with lease._guard(tmp_path / "leases" / "b"):
            change(tmp_path / "leases" / "b", owner="somebody else")
        wait_for(lambda: keeper.is_lost("b"))
        assert not keeper.is_lost("a")
    assert not (tmp_path / "leases" / "a").exists() and (tmp_path / "leases" / "b").exists()


def wait_for(condition: Any) -> None:
    """Poll until `condition()` holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
