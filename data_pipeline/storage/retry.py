"""How often and how long to try, and the count of everything that went wrong on the way."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter.

    Attributes:
        attempts: failures in a row, without a byte of progress, after which a store is given up.
        first_delay_seconds, max_delay_seconds: the delay doubles from the first to the second; a random part of up to
            half of it is left out, so that many ranks do not come back at the same moment.
        timeout_seconds: for a connection, and for every wait for more bytes.
        min_bytes_per_second: a transfer slower than this over `timeout_seconds` counts as stalled.
    """

    attempts: int = 8
    first_delay_seconds: float = 0.25
    max_delay_seconds: float = 30.0
    timeout_seconds: float = 30.0
    min_bytes_per_second: float = 1024.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after the `failures`-th failure in a row, from 1."""
        longest = min(self.max_delay_seconds, self.first_delay_seconds * 2 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


# While a run goes on, waiting for minutes is better than ending it.
RUN_POLICY = RetryPolicy()
# While it starts, a person waits: fewer attempts, so that a wrong address is reported within half a minute or so.
START_POLICY = RetryPolicy(attempts=3, max_delay_seconds=2.0, timeout_seconds=10.0)


@dataclass
class Counters:
    """Counts of storage events by name; safe to use from several threads.

    Names: downloads, downloaded_bytes, retries, resumed (a body continued with Range), restarted (the store could not
    continue), hash_mismatches, refetched_documents, evicted, uncached_shards, ranged_reads; of a stream passes
    (readings of shards) and undelivered_documents (read by their range instead).
    """

    _counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` more of `name`."""
        with self._lock:
            self._counts[name] += amount

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def snapshot(self) -> dict[str, int]:
        """All counts so far, by name."""
        with self._lock:
            return dict(sorted(self._counts.items()))
