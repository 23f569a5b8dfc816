"""The report's heart: bits per byte versus context length, and what the carried state is worth."""

from __future__ import annotations

from typing import Any

from longspan.trainer.evaluation.compare import PairedResults, targets_of
from longspan.trainer.report_data import Entry, RunRecord, checkpoint_step, number
from longspan.trainer.report_evaluation import gain, rate
from longspan.trainer.report_html import details, empty, figure, section, signed, table, text
from longspan.trainer.report_html import number as shown
from longspan.trainer.report_svg import Chart, Marker, Series, format_length, svg

# mode -> (legend, colour, style)
MODES: dict[str, tuple[str, int, Any]] = {
    "truncated": ("sees only the last L tokens", 1, "marked"),
    "state_reset": ("state forgotten L tokens ago, caches kept", 2, "marked"),
    "reset": ("state and caches forgotten L tokens ago", 5, "dashed"),
}
WHOLE = {
    "carried": ("carries everything since the start", 3),
    "swapped": ("another document's state", 4),
    "local": ("state forgotten after each training segment", 6),
}
GAINS = {
    "memory_gain": "memory gain: forgetting the state, minus carrying it",
    "content_gain": "content gain: another document's state, minus its own",
    "local_gain": "local gain: forgetting the state after each training segment, minus carrying it",
}


def length_sections(record: RunRecord) -> list[str]:
    """The newest evaluation's curve; with several checkpoints also the gain over steps."""
    heading = "Perplexity versus context length"
    if not record.evaluations:
        advice = (
            "Not evaluated yet: longspan evaluate RUN --spec configs/evals/quickstart.yaml, then write this page anew."
        )
        return [section(heading, empty(advice))]
    newest = newest_result(record)
    sections = [section(heading, _explain(newest), figure(svg(curve_chart(newest))), _gains(newest), _numbers(newest))]
    history = latest_of_each_step(record)
    if len(history) > 1:
        sections.append(_history(history))
    return sections


def newest_result(record: RunRecord) -> Entry:
    """The result of the latest checkpoint that has one."""
    return record.evaluations[-1]


def latest_of_each_step(record: RunRecord) -> list[Entry]:
    """Results under the newest one's spec, one a checkpoint, ascending: only those compare."""
    digest = newest_result(record).get("spec_digest")
    same = {checkpoint_step(result): result for result in record.evaluations if result.get("spec_digest") == digest}
    return [same[step] for step in sorted(same)]


def curve_chart(result: Entry) -> Chart:
    """Bits per byte over L (log 2), intervals as bands; modes without a length run across."""
    lengths = [entry["context_tokens"] for entry in result["curve"]]
    ends = (min(lengths), max(lengths)) if lengths else (1, 2)
    series = []
    for mode, (label, color, style) in MODES.items():
        entries = [entry for entry in result["curve"] if entry["mode"] == mode]
        line = [(entry["context_tokens"], entry["bits_per_byte"]) for entry in entries]
        band = [] if mode == "reset" else [(e["context_tokens"], e["ci_low"], e["ci_high"]) for e in entries]
        series.append(Series(label, line, color, style, band))
    for mode, (label, color) in WHOLE.items():
        entry = result.get(mode)
        if entry:
            band = [(x, entry["ci_low"], entry["ci_high"]) for x in ends] if mode == "carried" else []
            line = [(x, entry["bits_per_byte"]) for x in ends]
            series.append(Series(label, line, color, "line" if mode == "carried" else "dashed", band))
    model = result.get("model") or {}
    places = (("window_tokens", "window"), ("segment_tokens", "trained on"))
    markers = [
        Marker("x", model[key], f"{label} {format_length(model[key])}") for key, label in places if model.get(key)
    ]
    return Chart(
        title="Bits per byte versus context length",
        x_label="context length L, tokens of the document before the target",
        y_label="bits per byte",
        series=series,
        markers=[marker for marker in markers if ends[0] <= marker.value <= ends[1]],
        x_log2=True,
        width=1000,
        height=420,
    )


def _explain(result: Entry) -> str:
    spec = result.get("spec") or {}
    split = str((result.get("data") or {}).get("split", "held_out")).replace("_", "-")
    return (
        f'<p class="about">The same {result.get("target_bytes", 0):,} bytes of {result.get("num_documents", 0)} '
        f"{text(split)} documents, predicted with more or less of the document before them, by the model of step "
        f"{checkpoint_step(result):,}. Bands are {spec.get('confidence', 0.95):.0%} intervals over documents. Where "
        "the green line lies below the others, what the model carries beyond its window helps.</p>"
    )


def _gains(result: Entry) -> str:
    rows = []
    for key, label in GAINS.items():
        gain = result.get(key)
        if gain:
            sure = "yes" if gain["ci_low"] > 0 else "no"
            interval = f"{signed(gain['ci_low'])} to {signed(gain['ci_high'])}"
            rows.append([text(label), f"<b>{signed(gain['bits_per_byte'])}</b>", interval, sure])
    head = ["difference of bits per byte", "value", "interval", "interval above zero"]
    return table(head, rows, (1, 2)) if rows else ""


def _numbers(result: Entry) -> str:
    entries = [*result["curve"]]
    entries += [{**result[mode], "mode": mode} for mode in WHOLE if result.get(mode)]
    gains = {("truncated", entry["context_tokens"]): entry for entry in result.get("context_gain") or []}
    rows = [
        [
            text(entry["mode"]),
            f"{entry['context_tokens']:,}" if entry.get("context_tokens") else "whole document",
            shown(number(entry, "bits_per_byte"), 4),
            f"{shown(number(entry, 'ci_low'), 4)} to {shown(number(entry, 'ci_high'), 4)}",
            shown(number(entry, "perplexity_per_token"), 4),
            gain(gains.get((entry["mode"], entry.get("context_tokens")))),
        ]
        for entry in entries
    ]
    head = [
        "mode",
        "context (tokens)",
        "bits per byte",
        "interval",
        "perplexity per token",
        "minus the longest context",
    ]
    return details("All numbers", table(head, rows, (1, 2, 3, 4, 5)))


def _history(results: list[Entry]) -> str:
    """Memory gain and bits per byte of every evaluated checkpoint."""
    gains = [(checkpoint_step(result), result["memory_gain"]) for result in results if result.get("memory_gain")]
    carried = [(checkpoint_step(result), result["carried"]) for result in results if result.get("carried")]

    def chart(title: str, entries: list[tuple[int, Entry]], color: int, zero: bool) -> str:
        return svg(
            Chart(
                title=title,
                x_label="step of the checkpoint",
                y_label="bits per byte",
                series=[
                    Series(
                        "",
                        [(step, entry["bits_per_byte"]) for step, entry in entries],
                        color,
                        "marked",
                        [(step, entry["ci_low"], entry["ci_high"]) for step, entry in entries],
                    )
                ],
                y_from_zero=zero,
                width=520,
                height=280,
            )
        )

    cards = [
        section("Memory gain over steps", figure(chart("Memory gain over steps", gains, 2, True))),
        section(
            "Carried bits per byte over steps", figure(chart("Carried bits per byte over steps", carried, 3, False))
        ),
    ]
    return f'<div class="pair">{"".join(cards)}</div>{_steps(results)}'


def _steps(results: list[Entry]) -> str:
    """Every checkpoint's carried rate, minus that of the checkpoint before: paired, so that noise shows as noise."""
    rows = []
    for before, result in zip([None, *results[:-1]], results, strict=True):
        change = "–"
        if before is not None and targets_of(before) == targets_of(result) and result.get("scores"):
            found = PairedResults([before, result]).difference(1, ("carried", 0))
            change = gain(None if found is None else found.as_dict())
        rows.append([f"{checkpoint_step(result):,}", rate(result.get("carried")), change])
    head = ["step", "carried, bits per byte", "minus the checkpoint before"]
    return section("Checkpoint by checkpoint", table(head, rows, (0, 1, 2)))
