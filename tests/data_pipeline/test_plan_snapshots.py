"""Snapshots on disk: a later process seeks from them, and nothing that happens to the file makes a plan wrong."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from plan_manifests import manifest_of_lengths
from test_plan_reference import rows

from longspan.data_pipeline import plan_snapshots
from longspan.data_pipeline.fork import fork_plan
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.timeline import Timeline

RNG = random.Random(0)
LENGTHS = {source: [RNG.randint(2, 90) for _ in range(40)] for source in "ab"}
FAR = 20_000


@pytest.fixture(autouse=True)
def _files_for_small_plans(monkeypatch):
    monkeypatch.setattr(plan_snapshots, "_REFILLS_WORTH_A_FILE", 500)


def make_plan(folder, **changes):
    settings = {"seed": 5, "lanes": 4, "segment_tokens": 16, "quantum": 4, "boundary": "pack", **changes}
    return LanePlan(manifest_of_lengths(LENGTHS), snapshots=folder, **settings)


@pytest.fixture(scope="module")
def expected():
    plan = make_plan(None)
    return {step: (rows(plan, step), plan.progress(step)) for step in (0, 700, 1999, FAR // 2, FAR, FAR + 3)}


def check(plan, expected):
    for step in (FAR, 700, FAR + 3, 0, 1999, FAR // 2):
        assert (rows(plan, step), plan.progress(step)) == expected[step]


def write(folder):
    make_plan(folder).pieces(FAR, 0, 4)
    (file,) = folder.iterdir()
    return file


def count_walked(monkeypatch):
    walked = []
    advance = Timeline.advance

    def counting(timeline, cursor, step):
        after, refills = advance(timeline, cursor, step)
        walked.append(len(refills.lane))
        return after, refills

    monkeypatch.setattr(Timeline, "advance", counting)
    return walked


def test_a_second_plan_starts_from_the_file(tmp_path, monkeypatch, expected):
    file = write(tmp_path)
    walked = count_walked(monkeypatch)
    check(make_plan(None), expected)
    cold = sum(walked)
    walked.clear()
    plan = make_plan(tmp_path)
    assert rows(plan, FAR) == expected[FAR][0]
    assert 0 < sum(walked) < cold / 20
    check(plan, expected)
    assert list(tmp_path.iterdir()) == [file]


def test_going_on_far_beyond_the_file_extends_it(tmp_path, monkeypatch):
    write(tmp_path)
    make_plan(tmp_path).pieces(3 * FAR, 0, 4)
    walked = count_walked(monkeypatch)
    plan = make_plan(tmp_path)
    assert rows(plan, 3 * FAR) == rows(make_plan(None), 3 * FAR)
    assert walked[0] < 2000


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 300, -1, -8, -168])
def test_a_cut_file_is_ignored_and_written_anew(tmp_path, cut, expected, caplog):
    file = write(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    with caplog.at_level(logging.WARNING, logger="longspan.data"):
        check(make_plan(tmp_path), expected)
    assert any("is damaged or of another plan; it is ignored" in message for message in caplog.messages)
    assert file.read_bytes() == whole


def test_every_flipped_bit_is_noticed(tmp_path, expected, monkeypatch):
    file = write(tmp_path)
    whole = file.read_bytes()
    warnings = []
    monkeypatch.setattr(plan_snapshots._LOGGER, "warning", lambda text, *values: warnings.append(text % values))
    rng = random.Random(1)
    for place in [0, 63, 64, 71, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(30))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        warnings.clear()
        plan = make_plan(tmp_path)
        assert any("is damaged" in warning for warning in warnings), place
        assert rows(plan, 700) == expected[700][0]


def test_the_file_of_another_plan_is_not_used(tmp_path, expected):
    foreign = write(tmp_path / "foreign")
    for change in ({"seed": 6}, {"boundary": "pad"}, {"lanes": 5}):
        other = make_plan(tmp_path / "other", **change)
        place = other._windows._snapshots._file
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(foreign.read_bytes())
        assert rows(make_plan(tmp_path / "other", **change), 700) == rows(make_plan(None, **change), 700)


def test_forks_have_files_of_their_own(tmp_path):
    change = {"lanes": 2, "segment_tokens": 32}
    fork_plan(make_plan(tmp_path), 9000, snapshots=tmp_path, **change).pieces(FAR, 0, 2)
    assert len(list(tmp_path.iterdir())) == 2
    warm = fork_plan(make_plan(tmp_path), 9000, snapshots=tmp_path, **change)
    cold = fork_plan(make_plan(None), 9000, **change)
    assert [rows(warm, step) for step in (FAR, 9000)] == [rows(cold, step) for step in (FAR, 9000)]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, expected, caplog):
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING, logger="longspan.data"):
        check(make_plan(tmp_path / "file"), expected)
    assert any("plan snapshots are not kept" in message for message in caplog.messages)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, expected):
    def fails(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fails)
    check(make_plan(tmp_path), expected)
    assert list(tmp_path.iterdir()) == []


def test_old_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_snapshots, "_MOST_FILES", 3)
    for seed in range(5):
        make_plan(tmp_path, seed=seed).pieces(2000, 0, 4)
    assert len(list(tmp_path.iterdir())) == 3
    assert make_plan(tmp_path, seed=4)._windows._snapshots._file.is_file()


def test_small_plans_write_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_snapshots, "_REFILLS_WORTH_A_FILE", 500_000)
    make_plan(tmp_path).pieces(FAR, 0, 4)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_snapshots.plan_cache_folder() == tmp_path / "longspan" / "plans"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert plan_snapshots.plan_cache_folder() == Path.home() / ".cache" / "longspan" / "plans"


SEEK = """
    import json, sys, time
    import numpy as np
    sys.path.insert(0, sys.argv[1])
    from pathlib import Path
    from plan_manifests import manifest_of_columns
    from longspan.data_pipeline import plan_snapshots
    from longspan.data_pipeline.plan import LanePlan
    plan_snapshots._REFILLS_WORTH_A_FILE = 100_000
    count = int(sys.argv[3])
    spread = np.random.default_rng(0).lognormal(0.0, 1.0, count)
    lengths = np.maximum(2, (spread / spread.mean() * 65_536).astype(np.int64))
    manifest = manifest_of_columns(lengths, np.arange(count) % 2, ["a", "b"])
    began = time.process_time()  # of the clock on the wall, other processes would take their part
    plan = LanePlan(manifest, seed=0, lanes=256, segment_tokens=4096, quantum=512, boundary="pack",
                    source_weights={"a": 0.7, "b": 0.3}, snapshots=Path(sys.argv[2]))
    table = plan.table(int(sys.argv[4]), 0, 256)
    # not ru_maxrss, which begins at what the process that started this one had
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10
    total = [int(column.sum()) for column in table]
    print(json.dumps({"seconds": time.process_time() - began, "mib": peak, "total": total}))
"""


def seek(folder, documents, step):
    command = [sys.executable, "-c", textwrap.dedent(SEEK), str(Path(__file__).parent), str(folder)]
    done = subprocess.run([*command, str(documents), str(step)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_fresh_process_seeks_far_into_a_large_plan(tmp_path):
    """A part of the size that is promised; two sources of unequal documents, the slowest case."""
    cold, warm = (seek(tmp_path, 100_000, 10_000) for _ in range(2))
    assert warm["total"] == cold["total"]
    assert warm["seconds"] < 2 and warm["mib"] < 1024


@pytest.mark.long
def test_a_fresh_process_seeks_to_a_million_steps_over_a_million_documents(tmp_path):
    cold, warm = (seek(tmp_path, 1_000_000, 1_000_000) for _ in range(2))
    assert warm["total"] == cold["total"]
    assert warm["seconds"] < 2 and warm["mib"] < 1024
