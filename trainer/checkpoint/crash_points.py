"""Named places in a save or an export where a fault test may end the process; no-ops otherwise.

`LONGSPAN_CRASH=<point>@<n>` kills this process with SIGKILL at its n-th pass (from 1) through that point. All that
the variable can do is end the process that it was set for, which the same user could do with `kill -9`.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

ENVIRONMENT_VARIABLE = "LONGSPAN_CRASH"

POINTS = (
    "before-temporary",  # nothing written yet
    "mid-payload",  # part of a payload file written
    "after-payload",  # every payload file of every rank written and synced
    "after-manifest",  # manifest.json written, COMMITTED not
    "after-committed",  # COMMITTED written, temporary folder not yet synced
    "before-rename",  # all synced under the temporary name
    "after-rename",  # under the final name, parent folder not yet synced
    "before-prune",  # published; too many checkpoints on disk
    "mid-prune",  # one old checkpoint renamed away, its files not yet removed
)

_passes: Counter[str] = Counter()


def crash_point(point: str) -> None:
    """End the process here if the environment says so.

    Args:
        point: one of `POINTS`, or of those of `trainer/export_folder.py`.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted is None:
        return
    _passes[point] += 1
    if wanted == f"{point}@{_passes[point]}":
        os.kill(os.getpid(), signal.SIGKILL)
