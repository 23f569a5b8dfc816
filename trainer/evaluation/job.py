"""One evaluation as a process of its own, without tracking: what an evaluation job runs.

python -m longspan.trainer.evaluation.job CHECKPOINT SPEC_JSON OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from longspan.errors import EXIT_OK, LongspanError
from longspan.trainer.evaluation.run import default_device, evaluate
from longspan.trainer.evaluation.spec import EvaluationSpec


def main(argv: list[str]) -> int:
    """Evaluate; returns the exit code that `longspan evaluate` would end with."""
    checkpoint, spec, out = argv
    try:
        evaluate(Path(checkpoint), EvaluationSpec.model_validate_json(spec), Path(out), device=default_device())
    except LongspanError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
