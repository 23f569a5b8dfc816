"""The curve for the terminal and as a picture. matplotlib is loaded when a picture is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BAR_WIDTH = 44
COLOURS = {
    "truncated": "#1f5fa8",
    "reset": "#8a6d3b",
    "state_reset": "#c0392b",
    "carried": "#1b7f4b",
    "local": "#7d4fa8",
}
LABELS = {
    "truncated": "only the last L tokens (truncated)",
    "reset": "state and caches cleared L tokens before (reset)",
    "state_reset": "state cleared L tokens before (state_reset)",
    "carried": "everything carried since the document's start",
    "local": "state cleared after each training segment (local)",
}


def text_plot(result: dict[str, Any]) -> str:
    """The curve as text: a line a point, its interval drawn as a band on a common scale.

    Args:
        result: result.json.
    """
    rows = [_row(entry["mode"], entry["context_tokens"], entry) for entry in _shown(result)]
    rows.append(_row("carried", None, result["carried"]))
    rows += [_row(mode, None, result[mode]) for mode in ("swapped", "local") if result.get(mode)]
    low, high = min(row[2] for row in rows), max(row[3] for row in rows)
    lines = [
        f"Bits per byte by context length, on the same {result['target_bytes']:,} bytes of {result['num_documents']} "
        f"{result['data']['split'].replace('_', '-')} documents",
        f"(bands: {result['spec']['confidence']:.0%} intervals over documents)",
        f"  {'context':>22}  {'bits/byte':>9}  {'interval':^15}  {low:<.3f}{'':{BAR_WIDTH - 10}}{high:>.3f}",
    ]
    for label, value, ci_low, ci_high in rows:
        lines.append(
            f"  {label:>22}  {value:9.4f}  {ci_low:.3f} .. {ci_high:.3f}  {_bar(value, ci_low, ci_high, low, high)}"
        )
    return "\n".join([*lines, *_gain_lines(result)])


def _shown(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Points of the text plot: the whole truncated curve, and `state_reset`; `reset` repeats `truncated`."""
    return [entry for entry in result["curve"] if entry["mode"] in ("truncated", "state_reset")]


def _row(mode: str, length: int | None, entry: dict[str, Any]) -> tuple[str, float, float, float]:
    label = mode if length is None else f"{mode} {length}"
    return label, entry["bits_per_byte"], entry["ci_low"], entry["ci_high"]


def _bar(value: float, ci_low: float, ci_high: float, low: float, high: float) -> str:
    scale = (BAR_WIDTH - 1) / (high - low) if high > low else 0.0
    first, middle, last = (round((x - low) * scale) for x in (ci_low, value, ci_high))
    cells = ["─" if first <= i <= last else " " for i in range(BAR_WIDTH)]
    cells[first], cells[last], cells[middle] = "├", "┤", "●"
    return "".join(cells).rstrip()


def _gain_lines(result: dict[str, Any]) -> list[str]:
    gains = (
        ("memory_gain", "memory gain (state_reset minus carried)"),
        ("content_gain", "content gain (another document's state minus its own)"),
        ("local_gain", "local gain (state cleared after each training segment, minus carrying it)"),
    )
    return [
        f"  {label}: {result[name]['bits_per_byte']:+.4f} bits/byte, interval "
        f"[{result[name]['ci_low']:+.4f}, {result[name]['ci_high']:+.4f}]"
        for name, label in gains
        if result.get(name)
    ]


def curve_png(result: dict[str, Any], path: Path) -> None:
    """Draw the curve into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure(result)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def _figure(result: dict[str, Any]) -> Any:
    """A matplotlib Figure: bits per byte over context length, bands = intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    longest = 1
    for mode in ("truncated", "reset", "state_reset"):
        points = [entry for entry in result["curve"] if entry["mode"] == mode]
        if not points:
            continue
        lengths = [entry["context_tokens"] for entry in points]
        longest = max(longest, *lengths)
        style = {"truncated": "o-", "reset": "x:", "state_reset": "s--"}[mode]
        axes.plot(lengths, [p["bits_per_byte"] for p in points], style, color=COLOURS[mode], label=LABELS[mode])
        low, high = [p["ci_low"] for p in points], [p["ci_high"] for p in points]
        if mode != "reset":  # it lies on the truncated curve in models without absolute positions
            axes.fill_between(lengths, low, high, color=COLOURS[mode], alpha=0.15, linewidth=0)
        if len(points) == 1 and mode != "reset":
            axes.vlines(lengths, low, high, color=COLOURS[mode], alpha=0.5)
    carried = result["carried"]
    axes.axhline(carried["bits_per_byte"], color=COLOURS["carried"], label=LABELS["carried"])
    axes.axhspan(carried["ci_low"], carried["ci_high"], color=COLOURS["carried"], alpha=0.12, linewidth=0)
    if result.get("local"):
        axes.axhline(result["local"]["bits_per_byte"], color=COLOURS["local"], linestyle="-.", label=LABELS["local"])
    trained = result["model"]["segment_tokens"]
    axes.axvline(trained, color="0.6", linestyle=":", label=f"training segment, {trained} tokens")
    axes.set_xscale("log", base=2)
    ticks = sorted({entry["context_tokens"] for entry in result["curve"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("context length L (tokens of the document before the target)")
    axes.set_ylabel("bits per byte")
    axes.set_title(
        f"{result['checkpoint']['run']}, step {result['checkpoint']['step']}: "
        f"{result['num_documents']} documents, {result['spec']['confidence']:.0%} intervals"
    )
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return figure
