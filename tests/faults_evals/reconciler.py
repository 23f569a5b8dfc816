"""`longspan evals reconcile`, with a bug planted if its name is the first argument (else `none`)."""

from __future__ import annotations

import sys

import planted

from longspan.trainer import cli
from longspan.trainer.evaluation import reconcile

if __name__ == "__main__":
    bug, *arguments = sys.argv[1:]
    if bug in planted.WORKERS:
        reconcile.reconcile.__kwdefaults__["worker"] = planted.WORKERS[bug]
    elif bug != "none":
        getattr(planted, bug)()
    sys.exit(cli.main(arguments))
