"""The report's charts of the training run: loss, throughput, learning rate and gradient norm."""

from __future__ import annotations

import json
import math
from pathlib import Path

from longspan.trainer.report_data import RunRecord, points
from longspan.trainer.report_html import figure, section
from longspan.trainer.report_svg import Chart, Marker, Series, svg

MOST_POINTS = 300

Points = list[tuple[float, float]]


def binned(values: Points, most: int = MOST_POINTS) -> tuple[Points, list[tuple[float, float, float]]]:
    """At most `most` means of neighbouring points, and the range (x, lowest, highest) of each.

    A range says something only where several points share a bin; with fewer points than bins it is empty.
    """
    if len(values) <= most:
        return values, []
    means, ranges = [], []
    for index in range(most):
        part = values[index * len(values) // most : (index + 1) * len(values) // most]
        xs, ys = [x for x, _ in part], [y for _, y in part]
        x = sum(xs) / len(xs)
        means.append((x, sum(ys) / len(ys)))
        ranges.append((x, min(ys), max(ys)))
    return means, ranges


def smoothed(values: Points) -> Points:
    """Centred mean over a fiftieth of the points."""
    reach = max(1, len(values) // 100)
    if len(values) < 50:
        return values
    averages = []
    for index, (x, _) in enumerate(values):
        window = values[max(0, index - reach) : index + reach + 1]
        averages.append((x, sum(y for _, y in window) / len(window)))
    return averages


def curve(name: str, values: Points, color: int) -> list[Series]:
    """A noisy series: raw values (or their range) faint, their smooth course on top."""
    means, ranges = binned(values)
    smooth = Series(name, smoothed(means), color, band=ranges)
    if ranges or len(means) < 50:
        return [smooth]
    return [Series("", means, color, "faint"), smooth]


def loss_section(record: RunRecord) -> str:
    """Bits per byte of training and held-out text over steps, beside what plain compressors reach."""
    markers = baselines(record)
    chart = Chart(
        title="Bits per byte over steps",
        x_label="step",
        y_label="bits per byte",
        series=[
            *curve("training", points(record.steps, "bits_per_byte"), 1),
            Series("held-out documents", points(record.validations, "bits_per_byte"), 2, "marked"),
        ],
        markers=markers,
        y_top=max((marker.value for marker in markers), default=math.inf) * 1.08,  # worse than counting bytes is noise
        width=1000,
        height=360,
    )
    skipped = sum(1 for entry in record.steps if entry.get("skipped"))
    note = f"{skipped} steps were skipped because of NaN or Inf." if skipped else ""
    return section("Loss", figure(svg(chart), note), about="Lower is better: bits that the model needs for a byte.")


def baselines(record: RunRecord) -> list[Marker]:
    """What byte statistics and xz reach on the same held-out documents, from the corpus's statistics."""
    shards = str((record.config.get("data") or {}).get("shards"))
    try:
        held_out = json.loads((Path(shards) / "statistics.json").read_text(encoding="utf-8"))["held_out"]
        return [
            Marker("y", float(held_out["unigram_bits_per_byte"]), "byte frequencies alone"),
            Marker("y", float(held_out["xz_bits_per_byte"]), "xz -9"),
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # the corpus is elsewhere, or was built without held-out documents


def speed_sections(record: RunRecord) -> list[str]:
    """Throughput, and what moves the weights."""
    speed = Chart(
        title="Tokens per second over steps",
        x_label="step",
        y_label="tokens per second",
        series=curve("", points(record.steps, "tokens_per_second"), 3),
        y_from_zero=True,
        width=520,
        height=280,
    )
    gradient = Chart(
        title="Gradient norm over steps",
        x_label="step",
        y_label="gradient norm",
        series=curve("", points(record.steps, "grad_norm"), 4),
        y_from_zero=True,
        width=520,
        height=280,
    )
    rate = Chart(
        title="Learning rate over steps",
        x_label="step",
        y_label="learning rate",
        series=[Series("", binned(points(record.steps, "lr"))[0], 5)],
        y_from_zero=True,
        width=520,
        height=280,
    )
    memory = Chart(
        title="Memory over steps",
        x_label="step",
        y_label="GiB",
        series=[Series("", binned(points(record.steps, "memory_gib"))[0], 6)],
        y_from_zero=True,
        width=520,
        height=280,
    )
    cards = [
        section("Throughput", figure(svg(speed))),
        section("Gradient norm", figure(svg(gradient))),
        section("Learning rate", figure(svg(rate))),
        section("Memory of the process", figure(svg(memory))),
    ]
    return [f'<div class="pair">{"".join(cards)}</div>']
