"""`make demo`: the whole path from corpus to Hugging Face model, with the commands that a user would type.

Each stage is one `longspan` command in a process of its own; its `--json` result feeds the summary at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RECIPE = "configs/quickstart.yaml"
DATA_RECIPE = "configs/data/quickstart.yaml"
EVALUATION_SPEC = "configs/evals/quickstart.yaml"
SAMPLE_PROMPT = "And it came to pass"


def main(argv: list[str] | None = None) -> int:
    """Run all stages; returns 0, or the exit code of the first command that failed."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--runs", default="runs", help="folder for the run directory and the tracking database")
    args = parser.parse_args(argv)
    run = Path(args.runs) / time.strftime("quickstart-%Y%m%d-%H%M%S")
    started = time.monotonic()
    try:
        results = run_stages(run)
    except subprocess.CalledProcessError as error:
        print(f"longspan demo: `{' '.join(error.cmd)}` ended with exit code {error.returncode}", file=sys.stderr)
        return error.returncode
    print(summary(run, results, time.monotonic() - started))
    return 0


def run_stages(run: Path) -> dict[str, dict[str, Any]]:
    """Results of the commands by stage name."""
    exported = run / "export"
    stages = {
        "data": ["data", "build", DATA_RECIPE],
        "train": ["train", RECIPE, "--run-dir", str(run)],
        "evaluate": ["evaluate", str(run), "--spec", EVALUATION_SPEC],
        "export": ["export", str(run), str(exported)],
        "generate": ["generate", str(exported), "--prompt", SAMPLE_PROMPT, "--max-new-tokens", "240"],
        "report": ["report", str(run)],
    }
    return {name: _command(arguments) for name, arguments in stages.items()}


def _command(arguments: list[str]) -> dict[str, Any]:
    """Run one `longspan` command, its progress on our standard error; returns its JSON result and its seconds."""
    shown = ["longspan", *(f'"{argument}"' if " " in argument else argument for argument in arguments)]
    print(f"\n$ {' '.join(shown)}", file=sys.stderr, flush=True)
    started = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # noqa: S603 - our own command line, no shell
        [sys.executable, "-m", "longspan.trainer.cli", *arguments, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, shown)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["wall_seconds"] = time.monotonic() - started
    return result


def summary(run: Path, results: dict[str, dict[str, Any]], seconds: float) -> str:
    """What the demo has to say, as text for the terminal."""
    data, train, evaluate = results["data"], results["train"], results["evaluate"]
    held_out = data["held_out"]
    parts = ", ".join(f"{name} {result['wall_seconds']:.0f}" for name, result in results.items())
    lines = [
        "",
        "=" * 88,
        f"From text to model in {seconds:.0f} s ({parts}); training reached its first step "
        f"after {train['first_step_seconds']:.0f} s.",
        "",
        f"Bits per byte of {held_out['documents']} held-out documents (lower is better)",
        f"  {train['validation_bits_per_byte']:6.3f}  the trained model, on the first 16,384 bytes of each",
        f"  {held_out['unigram_bits_per_byte']:6.3f}  unigram entropy of their bytes (no context at all)",
        f"  {held_out['xz_bits_per_byte']:6.3f}  xz -9, each document whole and by itself",
        "",
        evaluate["text_plot"],
        "",
        f"A sample (prompt: {SAMPLE_PROMPT!r})",
        _indented(SAMPLE_PROMPT + results["generate"]["text"]),
        "",
        "Where everything is",
        f"  report       {results['report']['report']}",
        f"  MLflow       {train['tracking_uri']}   (mlflow ui --backend-store-uri {train['tracking_uri']})",
        f"  checkpoint   {train['checkpoint']}",
        f"  HF model     {results['export']['out']}",
        "",
        "Next",
        f"  longspan generate {results['export']['out']} --prompt 'def main('",
        f"  longspan train {RECIPE} --run-dir {run} --resume --set training.steps=2000",
        "  longspan doctor",
        "=" * 88,
    ]
    return "\n".join(lines)


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
