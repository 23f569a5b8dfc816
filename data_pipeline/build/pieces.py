"""Pieces of work with results on disk: each is done once, whoever is killed in between, and in any number of processes.

A piece is a function of its payload alone. Its result is a JSON file named by a hash of kind and payload, written last;
bulk output lies beside it. A build that is started again finds what is finished and does the rest.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longspan.data_pipeline.build.workplace import WorkerDied
from longspan.data_pipeline.regular_files import read_regular
from longspan.errors import ConfigError, LongspanError, UsageError

# Goes into every name: raise it when a piece of the same payload comes out differently.
PIECES_VERSION = 1

_PARALLEL_BYTES = 2**25  # below this, starting a process costs more than it brings
_LOOK_SECONDS = 0.2
_SLOTS = 1024  # of shared counters of bytes done; two pieces that share one may lose a count, which only the bar shows
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)

Tick = Callable[[int], None]  # told of bytes done
Work = Callable[[dict[str, Any], Path, Tick], dict[str, Any]]  # payload, path of its output, tick -> result


@dataclass(frozen=True)
class Piece:
    """One piece of work.

    Attributes:
        work: a function of a module. It may write one file or folder at the path it gets, which is `output_of` later.
        payload: JSON; everything that the result depends on.
        size: bytes that it handles, about.
        label: what to tell when it is done, from its result; None: nothing.
    """

    work: Work
    payload: dict[str, Any]
    size: int
    label: Callable[[dict[str, Any]], str] | None = None

    @property
    def key(self) -> str:
        """Name of its result: kind and hash."""
        name = self.work.__name__
        text = json.dumps([PIECES_VERSION, self.work.__module__, name, self.payload], sort_keys=True)
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def output_of(folder: Path, piece: Piece) -> Path:
    """Where the piece's bulk output lies in the folder of pieces; it may have none."""
    return folder / f"{piece.key}.output"


class Workers:
    """Does pieces, in this process or in several; the results are the same. Closed by leaving a `with` block."""

    def __init__(self, folder: Path, processes: int, bar: Callable[[str, int, int], None], say: Callable[[str], None]):
        """
        Args:
            folder: of results. processes: at most so many at once.
            bar: told of stage, bytes done and bytes in all. say: told of each piece that is done.
        """
        self._folder, self._processes, self._bar, self._say = folder, processes, bar, say
        self._pool: ProcessPoolExecutor | None = None
        self._counters: Any = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._counters[_SLOTS] = 1
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, stage: str, pieces: list[Piece]) -> list[dict[str, Any]]:
        """Results of all pieces, in their order.

        Raises:
            What a piece raises. WorkerDied: a process was killed.
        """
        results: list[dict[str, Any] | None] = [_finished(self._folder, piece) for piece in pieces]
        rest = [place for place, result in enumerate(results) if result is None]
        total = sum(piece.size for piece in pieces)
        missing = sum(pieces[place].size for place in rest)
        if self._processes > 1 and len(rest) > 1 and missing >= _PARALLEL_BYTES:
            # the largest first: the last one to finish should be a small one
            rest.sort(key=lambda place: -pieces[place].size)
            work = self._in_processes(stage, rest, pieces, total - missing, total)
        else:
            work = self._here(stage, rest, pieces, total - missing, total)
        for place, result in work:
            results[place] = result
            label = pieces[place].label
            if label is not None:
                self._say(label(result))
        return [result for result in results if result is not None]

    def _here(
        self, stage: str, rest: list[int], pieces: list[Piece], done: int, total: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        counted = 0

        def tick(num_bytes: int) -> None:
            nonlocal counted
            counted += num_bytes
            self._bar(stage, min(done + counted, total), total)

        for place in rest:
            yield place, _do(pieces[place], self._folder, tick)

    def _in_processes(
        self, stage: str, rest: list[int], pieces: list[Piece], done: int, total: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        pool, counters = self._started()
        counters[:_SLOTS] = [0] * _SLOTS
        try:
            futures: dict[Future[dict[str, Any]], int] = {}
            for number, place in enumerate(rest):
                piece = replace(pieces[place], label=None)  # what it tells stays here
                futures[pool.submit(_do_in_worker, piece, self._folder, number % _SLOTS)] = place
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
                self._bar(stage, min(done + sum(counters[:_SLOTS]), total), total)
                yield from ((futures[future], _opened(future.result())) for future in finished)
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a process of the build was killed, perhaps for want of memory. What is finished is kept: run the "
                "same command again, with --processes 1 if memory is short."
            ) from error

    def _started(self) -> tuple[ProcessPoolExecutor, Any]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
            self._counters = context.RawArray("q", _SLOTS + 1)
            start = (self._counters, os.getpid())
            self._pool = ProcessPoolExecutor(self._processes, context, initializer=_start, initargs=start)
        return self._pool, self._counters


def _finished(folder: Path, piece: Piece) -> dict[str, Any] | None:
    """The result of an earlier build, if it is there with its output."""
    try:
        kept = json.loads(read_regular(folder / f"{piece.key}.json"))
    except (OSError, ValueError):
        return None
    if kept["output"] != _listing(output_of(folder, piece)):
        return None
    result: dict[str, Any] = kept["result"]
    return result


def _do(piece: Piece, folder: Path, tick: Tick) -> dict[str, Any]:
    """Do a piece. Its output gets its name when it is complete, and its result is written after that."""
    output = output_of(folder, piece)
    unfinished = output.with_suffix(".unfinished")
    result = piece.work(piece.payload, unfinished, tick)
    if unfinished.exists():
        os.replace(unfinished, output)
    kept = {"result": result, "output": _listing(output)}
    temporary = folder / f"{piece.key}.json.unfinished"
    temporary.write_text(json.dumps(kept), encoding="utf-8")  # not synced: what a crash spoils is found and done again
    os.replace(temporary, folder / f"{piece.key}.json")
    return result


def _listing(output: Path) -> dict[str, int]:
    """Size of each file of an output, by its name."""
    if output.is_dir():
        return {file.name: file.stat().st_size for file in sorted(output.iterdir())}
    return {"": output.stat().st_size} if output.exists() else {}


_counters: Any = None  # of this worker process: shared with the one that started it


def _start(counters: Any, parent: int) -> None:
    """Make a worker die with the build, even if that is killed, so that no two ever write the same piece."""
    global _counters
    _counters = counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the build says when to stop
    with suppress(AttributeError):  # not Linux: the worker ends with its piece
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _do_in_worker(piece: Piece, folder: Path, slot: int) -> dict[str, Any]:
    def tick(num_bytes: int) -> None:
        if _counters[_SLOTS]:
            raise UsageError("stopped because another part of the build failed")
        _counters[slot] += num_bytes

    try:
        return {"result": _do(piece, folder, tick)}
    except ConfigError as error:  # its constructor takes more than the message: it would not survive the way back
        return {"error": UsageError(str(error))}
    except LongspanError as error:
        return {"error": error}


def _opened(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise answer["error"]
    result: dict[str, Any] = answer["result"]
    return result
