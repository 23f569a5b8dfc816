"""Starts the ranks of the benchmark and hears them out: a rank that dies or hangs ends the others, and is named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from longspan.trainer.bench.context_parallel.messages import Alive, Began, Done, Failed

SILENT_SECONDS = 300.0  # more than any one call takes, compilation included; ranks speak after each
_LAST_WORD_SECONDS = 2.0  # from the first sign that a rank is gone until it shows which was the first
_END_SECONDS = 30.0


@dataclass
class Story:
    """What the ranks told.

    Attributes:
        told: of each rank, in order: measurements and verdicts.
        begun: of each rank, the case that it began last.
        failure: the case in which a rank ended early, and which rank and why; None if all came to their end.
    """

    told: list[list[Any]]
    begun: list[str]
    failure: tuple[str, str] | None = None


def run_ranks(live: Callable[..., None], ranks: int, *arguments: Any, silent_seconds: float = SILENT_SECONDS) -> Story:
    """Run `live(rank, connection to the parent, *arguments)` in so many new processes until all are done.

    Args:
        live: of a module; a process imports it anew.
        ranks: how many.
        arguments: the same for all.
        silent_seconds: after so long without a word from any of them they have failed.
    """
    _fill_standard_streams()
    context = multiprocessing.get_context("spawn")  # a fork of a process that uses CUDA cannot use it
    readers, processes = [], []
    try:
        for rank in range(ranks):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_enter, args=(live, rank, writer, arguments), daemon=True)
            process.start()
            writer.close()  # the rank's is then the only one, and the pipe ends with it
            readers.append(reader)
            processes.append(process)
        return _listen(readers, processes, silent_seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _fill_standard_streams() -> None:
    """Let those that are closed go nowhere: else a pipe gets such a number, and a rank loses it to its streams."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _listen(readers: list[Connection], processes: Sequence[BaseProcess], silent_seconds: float) -> Story:
    story = Story([[] for _ in readers], ["start of the ranks"] * len(readers))
    speaking = list(readers)
    while speaking:
        ready = wait(speaking, timeout=silent_seconds)
        if not ready:
            story.failure = (story.begun[0], f"no rank has said anything for {silent_seconds:.0f} s")
            return story
        for rank, reader in enumerate(readers):
            if reader not in ready:
                continue
            message = _receive(reader)
            if isinstance(message, Failed | None):
                _drain(story, readers)
                story.failure = _blame(rank, message, story, processes)
                return story
            if isinstance(message, Done):
                speaking.remove(reader)
            else:
                _note(story, rank, message)
    for process in processes:
        process.join(timeout=_END_SECONDS)
    return story


def _drain(story: Story, readers: list[Connection]) -> None:
    """Take what the others have told by now."""
    for rank, reader in enumerate(readers):
        while reader.poll() and not isinstance(message := _receive(reader), Failed | Done | None):
            _note(story, rank, message)


def _receive(reader: Connection) -> Any:
    """The next message, or None at the end of a rank that has not said that it is done."""
    try:
        return reader.recv()
    except (EOFError, OSError):
        return None


def _note(story: Story, rank: int, message: Any) -> None:
    if isinstance(message, Began):
        story.begun[rank] = message.case
        if rank == 0:
            print(f"bench: longspan, {message.case}", file=sys.stderr, flush=True)
    elif not isinstance(message, Alive):
        story.told[rank].append(message)


def _blame(rank: int, message: Failed | None, story: Story, processes: Sequence[BaseProcess]) -> tuple[str, str]:
    """The case, and which rank ended first.

    One that a signal ended says nothing, and others may complain of messages that do not come before its end shows.
    """
    if message is None:
        processes[rank].join(timeout=_END_SECONDS)
        return story.begun[rank], _end(rank, processes[rank].exitcode)
    deadline = time.monotonic() + _LAST_WORD_SECONDS
    for other, process in enumerate(processes):
        process.join(timeout=max(0.0, deadline - time.monotonic()))
        if process.exitcode is not None and process.exitcode < 0:
            return story.begun[other], _end(other, process.exitcode)
    return story.begun[rank], f"rank {rank}: {message.reason}"


def _end(rank: int, code: int | None) -> str:
    if code is not None and code < 0:
        return f"rank {rank} was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"rank {rank} ended with exit code {code} before it was done"


def _enter(live: Callable[..., None], rank: int, parent: Connection, arguments: tuple[Any, ...]) -> None:
    """A rank's process from start to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business, who ends the ranks
    os.dup2(2, 1)  # standard output is the parent's, for the result
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        live(rank, parent, *arguments)
        parent.send(Done())
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        lines = str(error).strip().splitlines()
        parent.send(Failed(f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]))
        os._exit(1)  # torch would wait for the other ranks


def _end_with_parent() -> None:
    """A rank whose parent was killed would hold its GPU for as long as it waits for another rank."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
