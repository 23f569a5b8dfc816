"""`longspan bench context-parallel` on two GPUs at small sizes: every case is measured, and the gradients agree."""

from __future__ import annotations

import json

import pytest
import torch

from longspan.trainer import cli

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
WORDS = ["--segment-tokens", "8192", "--ring-tokens", "4096", "--repeat", "2", "--json"]


def test_all_parts_on_two_gpus(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "context-parallel", *WORDS]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [row["status"] for row in result["rows"]] == ["measured"] * 12
    assert len(result["ratios"]) == 5 and all(ratio["value"] > 0 for ratio in result["ratios"])
    assert all(row["peak_gib"] > 0 for row in result["rows"][1:])
