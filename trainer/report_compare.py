"""One page that lays several runs side by side: curves on the same targets, and differences paired by document."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longspan import __version__
from longspan.errors import UsageError
from longspan.trainer.evaluation.bootstrap import Interval
from longspan.trainer.evaluation.compare import PairedResults, targets_of
from longspan.trainer.report_data import Entry, RunRecord, checkpoint_step, points, read_run
from longspan.trainer.report_evaluation import (
    colour,
    gain,
    newest_of_each_spec,
    position_section,
    rate,
    repeat_section,
    task_sections,
    whole_section,
)
from longspan.trainer.report_html import digest, document, empty, figure, section, table, text
from longspan.trainer.report_svg import Chart, Marker, Series, svg

COMPARISON = "comparison.html"


@dataclass(frozen=True)
class Comparison:
    """Runs, and the newest result of each on the same targets.

    Attributes:
        names: what each run is called on the page; all differ.
        records: what is known about each.
        results: of perplexity versus length, one a run; empty if they share no targets.
        tasks: (name, result) of synthetic tasks that at least two runs have.
        paired: the results resampled together; None without them.
    """

    names: list[str]
    records: list[RunRecord]
    results: list[Entry]
    tasks: list[tuple[str, Entry]]
    paired: PairedResults | None


def write_comparison(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page about several runs; the first one is what the others are compared with.

    Args:
        runs: run directories, two or more.
        out: the file; `comparison.html` beside the first run if None.

    Returns:
        Where it is.

    Raises:
        UsageError: one is no run directory, one is named twice, no two share an evaluation, or the page cannot be
            written.
    """
    page = render_comparison(read_comparison(runs))
    path = out or runs[0].absolute().parent / COMPARISON
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}. Name another file with --out.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_comparison(runs: Sequence[Path]) -> Comparison:
    """Read runs and choose what compares.

    Raises:
        UsageError: as `write_comparison`.
    """
    resolved = [run.resolve() for run in runs]
    twice = sorted({str(run) for run, path in zip(runs, resolved, strict=True) if resolved.count(path) > 1})
    if twice:
        raise UsageError(f"{', '.join(twice)} named more than once. Give different run directories.")
    records = [read_run(run) for run in runs]
    names = _names(records)
    results = _shared_results(records)
    tasks = _shared_tasks(names, records)
    if not results and not tasks:
        known = "\n".join(
            f"  {name}: {', '.join(_described(result) for result in [*record.evaluations, *record.tasks]) or 'none'}"
            for name, record in zip(names, records, strict=True)
        )
        raise UsageError(
            f"these runs have no evaluation in common: same spec, same documents, same spans. They have\n{known}\n"
            f"Evaluate all of them with one spec on the same documents: longspan evaluate RUN --spec SPEC."
        )
    return Comparison(names, records, results, tasks, PairedResults(results) if results else None)


def _names(records: list[RunRecord]) -> list[str]:
    """Names of the folders, with as much of the path before them as makes them differ."""
    for depth in range(1, 1 + max(len(record.path.resolve().parts) for record in records)):
        names = ["/".join(record.path.resolve().parts[-depth:]) for record in records]
        if len(set(names)) == len(names):
            return names
    return [str(record.path) for record in records]


def _described(result: Entry) -> str:
    return f"{(result.get('spec') or {}).get('name')} ({str(result.get('spec_digest'))[:8]})"


def _shared_results(records: list[RunRecord]) -> list[Entry]:
    """The newest results of all runs that share spec and targets; of several specs the one evaluated last."""

    def mark(result: Entry) -> tuple[str, str]:
        return str(result.get("spec_digest")), str(targets_of(result))

    by_mark = [{mark(result): result for result in record.evaluations} for record in records]
    shared = [found for found in by_mark[0] if all(found in others for others in by_mark[1:])]
    return [found[shared[-1]] for found in by_mark] if shared else []


def _shared_tasks(names: list[str], records: list[RunRecord]) -> list[tuple[str, Entry]]:
    newest = [newest_of_each_spec(record.tasks) for record in records]
    digests = [str(result.get("spec_digest")) for results in newest for result in results]
    return [
        (name, result)
        for name, results in zip(names, newest, strict=True)
        for result in results
        if digests.count(str(result.get("spec_digest"))) > 1
    ]


def render_comparison(comparison: Comparison) -> str:
    """The whole page as HTML text that is also well-formed XML; refers to nothing outside itself."""
    names = " · ".join(text(name) for name in comparison.names)
    named = list(zip(comparison.names, comparison.results, strict=False))
    sections = [
        f'<header><h1>Comparison of {len(comparison.names)} runs</h1><p class="status">{names}</p></header>',
        *(_result_sections(comparison) if comparison.results else [_no_results()]),
        _source_section(comparison),
        position_section(named),
        repeat_section(named),
        whole_section(named),
        *task_sections(comparison.tasks),
        _training_section(comparison),
        _what(comparison),
    ]
    return document("Comparison", "\n".join(filter(None, sections)))


def _no_results() -> str:
    return section(
        "Perplexity versus context length",
        empty("The runs share no evaluation of perplexity versus length; evaluate all with one spec."),
    )


def _result_sections(comparison: Comparison) -> list[str]:
    first = comparison.results[0]
    spec = first.get("spec") or {}
    about = (
        f"The same spans of the same {len(targets_of(first))} documents, predicted with the last L tokens of the "
        f"document (lines with dots) and with everything carried since its start (dashes). Bands are "
        f"{spec.get('confidence', 0.95):.0%} intervals over documents; whether two runs differ, the next chart says, "
        f"since they stumble over the same documents."
    )
    return [
        section(
            "Perplexity versus context length", _summary(comparison), figure(svg(_curves(comparison))), about=about
        ),
        _difference_section(comparison),
    ]


def _summary(comparison: Comparison) -> str:
    paired = comparison.paired
    assert paired is not None
    rows = []
    for index, (name, result) in enumerate(zip(comparison.names, comparison.results, strict=True)):
        model = result.get("model") or {}
        difference = paired.difference(index, ("carried", 0))
        rows.append(
            [
                f"<span class='chip s{colour(index)}'></span>{text(name)}",
                text(model.get("name", "")),
                f"{checkpoint_step(result):,}",
                rate(result.get("carried")),
                "reference" if index == 0 else gain(_entry(difference)),
                gain(result.get("memory_gain")),
                gain(result.get("content_gain")),
            ]
        )
    head = [
        "run",
        "model",
        "step",
        "carried, bits per byte",
        f"minus {comparison.names[0]}",
        "memory gain",
        "content gain",
    ]
    return table(head, rows, (2, 3, 4, 5, 6))


def _entry(interval: Interval | None) -> Entry | None:
    return None if interval is None else interval.as_dict()


def _curves(comparison: Comparison) -> Chart:
    series = []
    lengths = [entry["context_tokens"] for result in comparison.results for entry in result["curve"]] or [1, 2]
    for index, (name, result) in enumerate(zip(comparison.names, comparison.results, strict=True)):
        curve = [entry for entry in result["curve"] if entry["mode"] == "truncated"]
        line = [(entry["context_tokens"], entry["bits_per_byte"]) for entry in curve]
        band = [(e["context_tokens"], e["ci_low"], e["ci_high"]) for e in curve if e["ci_low"] is not None]
        if line:
            series.append(Series(name, line, colour(index), "marked", band))
        carried = result["carried"]["bits_per_byte"]
        ends = [(min(lengths), carried), (max(lengths), carried)]
        series.append(Series(f"{name}, carried", ends, colour(index), "dashed"))
    return Chart(
        title="Bits per byte versus context length, all runs",
        x_label="context length L, tokens of the document before the target",
        y_label="bits per byte",
        series=series,
        x_log2=True,
        width=1000,
        height=420,
    )


def _difference_section(comparison: Comparison) -> str:
    """Every run minus the first, at each context length and carried, resampled by document."""
    paired = comparison.paired
    assert paired is not None
    lengths = [length for mode, length in paired.variants() if mode == "truncated"]
    series = []
    for index, name in enumerate(comparison.names[1:], start=1):
        found = [(length, paired.difference(index, ("truncated", length))) for length in lengths]
        line = [(length, entry.bits_per_byte) for length, entry in found if entry]
        band = [
            (float(length), entry.ci_low, entry.ci_high)
            for length, entry in found
            if entry and entry.ci_low is not None and entry.ci_high is not None
        ]
        series.append(Series(name, [(float(x), y) for x, y in line], colour(index), "marked", band))
    chart = Chart(
        title=f"Bits per byte minus those of {comparison.names[0]}",
        x_label="context length L, tokens of the document before the target",
        y_label="difference, bits per byte",
        series=series,
        markers=[Marker("y", 0.0, comparison.names[0])],
        x_log2=True,
        width=1000,
        height=320,
    )
    rows = [
        [text(name), text(mode), f"{length:,}" if length else "whole document", gain(_entry(difference))]
        for index, name in enumerate(comparison.names[1:], start=1)
        for mode, length in paired.variants()
        if (difference := paired.difference(index, (mode, length)))
    ]
    head = ["run", "mode", "context (tokens)", f"minus {comparison.names[0]}, bits per byte"]
    about = (
        f"Below zero: better than {comparison.names[0]}. Intervals are those of the difference, over resamples that "
        "take the same documents of both runs; bold: the interval leaves zero out."
    )
    return section(f"Difference to {comparison.names[0]}", figure(svg(chart)), table(head, rows, (2, 3)), about=about)


def _source_section(comparison: Comparison) -> str:
    """Carried rate, paired difference and memory gain of every run on the documents of each source."""
    if not comparison.results:
        return ""
    documents = comparison.results[0]["data"]["documents"]
    sources = sorted({str(entry["source"]) for entry in documents if entry.get("source")})
    rows = []
    for source in sources:
        paired = PairedResults(comparison.results, source)
        window = ((comparison.results[0].get("model") or {}).get("window_tokens")) or 0
        for index, name in enumerate(comparison.names):
            difference = paired.difference(index, ("carried", 0))
            rows.append(
                [
                    text(source),
                    text(name),
                    f"{len(paired.names)}",
                    rate(_entry(paired.rate(index, ("carried", 0)))),
                    "reference" if index == 0 else gain(_entry(difference)),
                    gain(_entry(paired.gain(index, ("state_reset", window)))),
                ]
            )
    if not rows:
        return ""
    first = comparison.names[0]
    head = ["source", "run", "documents", "carried, bits per byte", f"minus {first}", "memory gain"]
    return section("By source", table(head, rows, (2, 3, 4, 5)))


def _training_section(comparison: Comparison) -> str:
    """Held-out bits per byte while training."""
    series = [
        Series(name, points(record.validations, "bits_per_byte"), colour(index), "marked")
        for index, (name, record) in enumerate(zip(comparison.names, comparison.records, strict=True))
    ]
    if not any(entry.points for entry in series):
        return ""
    chart = Chart("Held-out bits per byte over steps", "step", "bits per byte", series, width=1000, height=320)
    return section(
        "While training", figure(svg(chart)), about="Bits per byte of held-out documents at each validation."
    )


def _what(comparison: Comparison) -> str:
    """Which files and digests stand behind the page."""
    rows = []
    for name, result in zip(comparison.names, comparison.results, strict=False):
        data, checkpoint = result.get("data") or {}, result.get("checkpoint") or {}
        tokenizer = data.get("tokenizer") or {}
        rows.append(
            [
                text(name),
                digest(str(checkpoint.get("fingerprint", ""))[:16]),
                text(f"{(result.get('spec') or {}).get('name')}, {str(result.get('spec_digest'))[:8]}"),
                text(f"{tokenizer.get('name', '')}"),
                digest(str(data.get("mask_digest", ""))[:16]),
                text(f"{result.get('num_documents')} documents, {result.get('target_bytes', 0):,} bytes"),
            ]
        )
    written = text(f"longspan {__version__}, written {time.strftime('%Y-%m-%d %H:%M:%S %Z')}")
    head = ["run", "checkpoint", "spec", "tokenizer", "targets", "scored"]
    return section("What was compared", table(head, rows) if rows else "", f"<p class='about'>{written}</p>")
