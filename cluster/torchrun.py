"""torchrun as the launcher starts it: without its own account of workers that failed, as the launcher gives one."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from longspan.cluster import exit_records

# says of every worker what its exit code was and which signal it was sent; the codes are not the workers' own
_LOGGER = "torch.distributed.elastic.multiprocessing.api"


def main(argv: list[str]) -> int:
    """Run it.

    Args: argv: torchrun's arguments.

    Returns: its exit code, 1 if workers failed for the last time or nodes do not meet.
    """
    logging.getLogger(_LOGGER).setLevel(logging.CRITICAL)
    try:
        run.main(argv)
    except ChildFailedError:
        return 1
    except RendezvousError as error:
        folder = os.environ.get(exit_records.FOLDER_VARIABLE)
        if folder and exit_records.attempts(Path(folder)):  # before the first attempt it is the launcher's to say
            brief = " ".join(str(error).split())[:200] or type(error).__name__
            print(f"longspan: the nodes do not meet for a restart: {brief}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
