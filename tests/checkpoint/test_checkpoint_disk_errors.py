"""A full or failing disk costs one checkpoint, never the run and never an older checkpoint."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_states import assert_same_state, in_child, saved, tiny_state

from longspan.trainer.checkpoint import files
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.checkpoint.verify import verify

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS, "EDQUOT": errno.EDQUOT}


def check_failed_save(root: Path, store: CheckpointStore) -> str:
    """One save that fails: nothing left of it, the old checkpoint as it was; returns the message."""
    result = store.save(tiny_state(3))
    assert not result.ok and result.path is None and result.error is not None
    assert sorted(os.listdir(root)) == ["step-00000001", "step-00000002"]
    for folder in store.committed():
        verify(folder)
    assert_same_state(store.load_newest(0, 4)[0], tiny_state(2))
    return result.error


def check_retry(store: CheckpointStore) -> None:
    assert store.save(tiny_state(3)).ok
    assert_same_state(store.load_newest(0, 4)[0], tiny_state(3))


class FailingCall:
    """Replaces an `os` function: passes `good` calls, then refuses with an error."""

    def __init__(self, real: Callable[..., Any], good: int, number: int) -> None:
        self.real, self.good, self.number = real, good, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.good -= 1
        if self.good < 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize(("call", "good"), [("write", 0), ("write", 1), ("write", 4), ("write", 6), ("fsync", 2)])
def test_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str, good: int) -> None:
    store = saved(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, FailingCall(getattr(os, call), good, ERRORS[name]))
        message = check_failed_save(tmp_path, store)
    assert os.strerror(ERRORS[name]) in message and str(tmp_path) in message
    assert re.search(r"after [\d,]+ of [\d,]+ bytes \([\d,]+ bytes free there\)", message), message
    assert "step 3 not saved" in message and "the next save tries again" in message
    check_retry(store)


@pytest.mark.parametrize(("call", "good"), [("mkdir", 0), ("mkdir", 2), ("rename", 0)])
def test_folder_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, good: int) -> None:
    store = saved(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, FailingCall(getattr(os, call), good, errno.EROFS))
        assert "Read-only file system" in check_failed_save(tmp_path, store)
    check_retry(store)


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real = saved(tmp_path, 1), os.write
    monkeypatch.setattr(files.os, "write", lambda handle, content: real(handle, content[: max(1, len(content) // 3)]))
    assert store.save(tiny_state(2)).ok
    assert_same_state(store.load_newest(0, 4)[0], tiny_state(2))


def test_a_disk_that_takes_no_bytes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved(tmp_path, 1, 2)
    monkeypatch.setattr(files.os, "write", lambda handle, content: 0)
    assert "Input/output error" in check_failed_save(tmp_path, store)


@pytest.mark.parametrize("limit_bytes", [0, 100, 1000])
def test_real_file_size_limit(tmp_path: Path, limit_bytes: int) -> None:
    store = saved(tmp_path, 1, 2)

    def work() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        message = check_failed_save(tmp_path, store)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "File too large" in message, message
        check_retry(store)

    assert in_child(work) == 0


def test_an_error_that_is_not_the_disk_is_raised(tmp_path: Path) -> None:
    store, state = saved(tmp_path, 1), tiny_state(2)
    state.counters["tokens"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        store.save(state)
    assert os.listdir(tmp_path) == ["step-00000001"]
