"""torchrun as the launcher starts it: without its own account of workers that failed, as the launcher gives one."""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# says of every worker what its exit code was and which signal it was sent; the codes are not the workers' own
_LOGGER = "torch.distributed.elastic.multiprocessing.api"


def main(argv: list[str]) -> int:
    """Args: argv: torchrun's arguments. Returns its exit code: 1 if workers failed for the last time."""
    logging.getLogger(_LOGGER).setLevel(logging.CRITICAL)
    try:
        run.main(argv)
    except ChildFailedError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
