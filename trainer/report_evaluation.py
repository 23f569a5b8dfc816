"""Parts of a page about evaluations, for one run or for several side by side: sources, places, repeats, tasks."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.trainer.report_data import Entry, RunRecord, number
from longspan.trainer.report_html import figure, section, signed, table, text
from longspan.trainer.report_html import number as shown
from longspan.trainer.report_svg import Chart, Series, svg

Named = Sequence[tuple[str, Entry]]  # what to call a result, and the result
COLOURS = 6


def colour(index: int) -> int:
    """Colour class of the index-th run."""
    return index % COLOURS + 1


def rate(entry: Entry | None, decimals: int = 4) -> str:
    """Bits per byte with their interval in small letters; a dash for none."""
    entry = entry or {}
    low, high = number(entry, "ci_low"), number(entry, "ci_high")
    span = "" if low is None or high is None else f" <span class='ci'>{low:.{decimals}f} to {high:.{decimals}f}</span>"
    return f"{shown(number(entry, 'bits_per_byte'), decimals)}{span}"


def gain(entry: Entry | None) -> str:
    """A difference with its sign and interval, bold where the interval leaves zero out; a dash for none."""
    entry = entry or {}
    value, low, high = (number(entry, key) for key in ("bits_per_byte", "ci_low", "ci_high"))
    if low is None or high is None:
        return signed(value)
    strong = low > 0 or high < 0
    head = f"<b>{signed(value)}</b>" if strong else signed(value)
    return f"{head} <span class='ci'>{signed(low)} to {signed(high)}</span>"


def evaluation_sections(record: RunRecord) -> list[str]:
    """What else the newest evaluation of a run says, and its synthetic tasks."""
    named = [(record.path.resolve().name, result) for result in record.evaluations[-1:]]
    tasks = [(record.path.resolve().name, result) for result in newest_of_each_spec(record.tasks)]
    parts = [source_section(named), position_section(named), repeat_section(named), whole_section(named)]
    return [part for part in [*parts, *task_sections(tasks)] if part]


def source_section(results: Named) -> str:
    """Bits per byte, memory gain and useful context of each source; nothing where there is one source."""
    sources = sorted({source for _, result in results for source in result.get("by_source") or {}})
    if len(sources) < 2:
        return ""
    rows = []
    for source in sources:
        for name, result in results:
            part = (result.get("by_source") or {}).get(source) or {}
            useful = part.get("useful_context_tokens")
            rows.append(
                [
                    text(source),
                    text(name),
                    f"{part.get('num_documents', 0)}",
                    rate(part.get("carried")),
                    gain(part.get("memory_gain")),
                    gain(part.get("content_gain")),
                    f"{useful:,}" if isinstance(useful, int) else "–",
                ]
            )
    head = ["source", "run", "documents", "carried, bits per byte", "memory gain", "content gain", "useful context"]
    about = (
        "The same measures on the documents of each source. Useful context: the shortest L whose bits per byte are "
        "surely within half a percent of those at the longest."
    )
    return section("By source", table(head, rows, (2, 3, 4, 5, 6)), about=about)


def position_section(results: Named) -> str:
    """Carried bits per byte over the place in the document."""
    series, counts = [], []
    for index, (name, result) in enumerate(results):
        position = result.get("position") or {}
        buckets = [bucket for bucket in position.get("buckets") or [] if bucket["first"] >= 16]
        middle = [((bucket["first"] * bucket["last"]) ** 0.5, bucket) for bucket in buckets]
        points = [(x, bucket["bits_per_byte"]) for x, bucket in middle]
        band = [(x, b["ci_low"], b["ci_high"]) for x, b in middle if b.get("ci_low") is not None]
        if points:
            series.append(Series(name, points, colour(index), "marked", band))
            counts.append(f"{position['num_documents']} documents of {name}")
    if not series:
        return ""
    chart = Chart(
        title="Bits per byte by place in the document",
        x_label="tokens of the document before the token",
        y_label="bits per byte",
        series=series,
        x_log2=True,
        width=1000,
        height=340,
    )
    about = (
        f"Every token, carried from the document's start; the same documents at every place ({', '.join(counts)}), "
        "each counting alike. Bands are intervals over documents."
    )
    return section("Loss by place in the document", figure(svg(chart)), about=about)


def repeat_section(results: Named) -> str:
    """Carried rate and memory gain on tokens that repeat something from far back, and on the others."""
    rows = []
    sizes = ""
    for name, result in results:
        repeat = result.get("by_repeat") or {}
        sizes = f"{repeat.get('ngram_tokens')} tokens, last seen more than {repeat.get('beyond_tokens')} tokens back"
        for label, key in (("repeats", "repeat"), ("all others", "other")):
            part = repeat.get(key)
            if part:
                cells = [rate(part.get("carried")), gain(part.get("memory_gain")), gain(part.get("content_gain"))]
                rows.append([text(name), label, f"{part['target_tokens']:,}", *cells])
    if not any(row[1] == "repeats" for row in rows):
        return ""
    head = ["run", "tokens that are", "number", "carried, bits per byte", "memory gain", "content gain"]
    about = f"Repeats complete a sequence of {sizes}: what a window cannot see, but a memory could."
    return section("Repeats from far back", table(head, rows, (2, 3, 4, 5)), about=about)


def whole_section(results: Named) -> str:
    """Every token of every document, with perplexity per word where whole documents were read."""
    rows = []
    for name, result in results:
        whole = result.get("whole") or {}
        if whole:
            words = number(whole, "perplexity_per_word")
            rows.append(
                [
                    text(name),
                    f"{whole['num_documents']}, {'whole' if whole['complete'] else 'heads only'}",
                    f"{whole['tokens']:,}",
                    f"{whole['bytes']:,}",
                    rate(whole),
                    shown(number(whole, "perplexity_per_token"), 3),
                    shown(words, 2),
                ]
            )
    if not rows:
        return ""
    head = ["run", "documents", "tokens", "bytes", "bits per byte", "perplexity per token", "per word"]
    about = "Carried from each document's start. Perplexity per word needs whole documents, and counts their words."
    return section("Every token", table(head, rows, (2, 3, 4, 5, 6)), about=about)


def task_sections(results: Named) -> list[str]:
    """A table for each synthetic task: wrong samples of every test set, over all seeds and seed by seed."""
    suites: dict[str, list[tuple[str, Entry]]] = {}
    for name, result in results:
        suites.setdefault(str((result.get("spec") or {}).get("name")), []).append((name, result))
    sections = []
    for suite, members in sorted(suites.items()):
        rows = []
        tests = list(dict.fromkeys((t["test"], t["low"], t["high"]) for _, result in members for t in result["tests"]))
        for test, low, high in tests:
            for name, result in members:
                found = [t for t in result["tests"] if (t["test"], t["low"], t["high"]) == (test, low, high)]
                rows += [_task_row(test, low, high, name, entry) for entry in found]
        head = ["test set", "sizes", "run", "wrong", "samples", "right", "95% interval", "wrong, seed by seed"]
        sections.append(section(f"Task: {suite}", table(head, rows, (3, 4, 5, 6))))
    return sections


def _task_row(test: str, low: int, high: int, name: str, entry: Entry) -> list[str]:
    seeds = ", ".join(f"{seed['errors']:,}" for seed in entry["seeds"])
    return [
        text(test),
        f"{low:,}–{high:,}",
        text(name),
        f"{entry['errors']:,}",
        f"{entry['total']:,}",
        f"{entry['accuracy']:.4f}",
        f"{entry['ci_low']:.4f} to {entry['ci_high']:.4f}",
        text(seeds),
    ]


def newest_of_each_spec(results: Sequence[Entry]) -> list[Entry]:
    """The last result of every spec, in the order given."""
    return list({str(result.get("spec_digest")): result for result in results}.values())
