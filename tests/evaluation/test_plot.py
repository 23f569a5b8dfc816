"""The curve as text and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan.trainer.evaluation.plot import BAR_WIDTH, curve_png, text_plot


def rate(value: float, spread: float) -> dict[str, float]:
    return {"bits_per_byte": value, "ci_low": value - spread, "ci_high": value + spread}


def result(**changes: Any) -> dict[str, Any]:
    return {
        "curve": [
            {"mode": "truncated", "context_tokens": 64, **rate(3.0, 0.5)},
            {"mode": "truncated", "context_tokens": 128, **rate(2.5, 0.25)},
            {"mode": "reset", "context_tokens": 64, **rate(3.0, 0.5)},
            {"mode": "state_reset", "context_tokens": 64, **rate(2.75, 0.25)},
        ],
        "carried": rate(2.25, 0.25),
        "swapped": None,
        "memory_gain": rate(0.5, 0.125),
        "content_gain": None,
        "spec": {"confidence": 0.95},
        "data": {"split": "held_out"},
        "model": {"segment_tokens": 512},
        "checkpoint": {"run": "tiny", "step": 3},
        "target_bytes": 10240,
        "num_documents": 20,
        **changes,
    }


def test_points_and_bands_stand_where_their_numbers_are() -> None:
    lines = text_plot(result()).splitlines()
    assert "10,240 bytes of 20 held-out documents" in lines[0] and "95%" in lines[1]
    names = ["truncated 64", "truncated 128", "state_reset 64", "carried"]
    assert [line[:24].strip() for line in lines[3:7]] == names  # reset repeats truncated and is left out
    rows = dict(zip(names, lines[3:7], strict=True))
    start = lines[3].index("├") - round((2.5 - 2.0) / 1.5 * (BAR_WIDTH - 1))
    for name, low, value, high in (
        ("truncated 64", 2.5, 3.0, 3.5),
        ("truncated 128", 2.25, 2.5, 2.75),
        ("carried", 2.0, 2.25, 2.5),
    ):
        assert [rows[name].index(mark) - start for mark in "├●┤"] == [
            round((x - 2.0) / 1.5 * (BAR_WIDTH - 1)) for x in (low, value, high)
        ], name
    assert lines[-1] == "  memory gain (state_reset minus carried): +0.5000 bits/byte, interval [+0.3750, +0.6250]"


def test_one_number_everywhere_is_still_a_plot() -> None:
    same = rate(2.0, 0.0)
    flat = result(curve=[{"mode": "truncated", "context_tokens": 8, **same}], carried=same, memory_gain=None)
    assert text_plot(flat).count("●") == 2


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    curve_png(result(), tmp_path / "curve.png")
    content = (tmp_path / "curve.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 10_000
