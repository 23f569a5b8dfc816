"""Serves lives of a reader; see `forked_lives`. A request is that of `data_life.live`, with `plant`: a bug or None."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_pipeline"))

import data_life
import data_planted
import webdataset  # noqa: F401  imported once, not in every life
from forked_lives import serve


def live(request: dict[str, Any]) -> None:
    """One reader."""
    if request["plant"]:
        getattr(data_planted, request["plant"])()
    data_life.live(request)


if __name__ == "__main__":
    serve(live, lambda request: Path(request["folder"]) / "messages")
