"""What `longspan bench data` is told to do. Imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.trainer.bench.settings import Checks, read_peers

TOKENS = 100_000_000
REPEAT = 3


@dataclass(frozen=True)
class DataSettings:
    """Options of `longspan bench data`.

    Attributes:
        corpus: folder of the corpus to read; None: one of random ids is made.
        tokens: of a pass, about, and of the corpus that is made.
        repeat: passes. peers: names of the peers to race. report: Markdown file to append the results to, or None.
    """

    corpus: Path | None
    tokens: int
    repeat: int
    peers: tuple[str, ...]
    report: Path | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without places."""
        return {"tokens": self.tokens, "repeat": self.repeat, "peers": list(self.peers), "own": self.corpus is None}


def read_data_settings(args: argparse.Namespace) -> DataSettings:
    """The checked settings.

    Raises:
        ConfigError: lists everything that is wrong with the options.
    """
    checks = Checks("data")
    checks.at_least("--tokens", args.tokens)
    checks.at_least("--repeat", args.repeat)
    if args.corpus is not None and not (Path(args.corpus) / "manifest.json").is_file():
        checks.add(f"--corpus {args.corpus}", "there is no corpus (no manifest.json). Name what `data build` wrote.")
    peers, report = read_peers(args.peers, checks), checks.file("--write-report", args.write_report)
    checks.finish()
    return DataSettings(
        corpus=None if args.corpus is None else Path(args.corpus),
        tokens=args.tokens or TOKENS,
        repeat=args.repeat or REPEAT,
        peers=peers,
        report=report,
    )
