"""The lengths of a corpus's documents as text and as a picture. matplotlib is loaded when a picture is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan.errors import UsageError

_BAR_WIDTH = 40
_COLOURS = ("#1f5fa8", "#c0392b", "#1b7f4b", "#8a6d3b", "#6c3483", "#117a8b", "#b9770e", "#566573")
_UNITS = ((2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki"))


def summary_text(summary: dict[str, Any]) -> str:
    """The table that `longspan data inspect` prints. `summary`: of `summarise`."""
    vocabulary = summary["vocabulary"]
    lines = [
        f"{summary['folder']}: corpus {summary['name']}, {summary['documents']:,} documents, "
        f"{summary['bytes']:,} bytes, {summary['tokens']:,} tokens in {summary['shards']:,} shards of "
        f"{summary['shard_bytes']:,} bytes",
        f"vocabulary {vocabulary['name']} ({vocabulary['kind']}, {vocabulary['size']:,} ids, embedding of "
        f"{vocabulary['padded_size']:,} rows), manifest digest {summary['digest'][:16]}",
        "",
        f"{'source':<16} {'split':<9}{'documents':>10}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}",
    ]
    for name, source in summary["sources"].items():
        for split, cell in source["splits"].items():
            if cell["documents"]:
                content = cell["tokens"] - 2 * cell["documents"]
                ratio = f"{cell['bytes'] / content:.3f}" if content else "-"
                lines.append(
                    f"{name:<16} {split:<9}{cell['documents']:>10,}{cell['bytes']:>16,}{cell['tokens']:>16,}{ratio:>13}"
                )
    groups = summary["groups"]
    if groups["shared"]:
        lines += ["", f"{groups['documents']:,} documents are in {groups['shared']:,} groups of near-duplicates"]
    for name, source in summary["sources"].items():
        lines += ["", *_source_lines(name, source)]
    return "\n".join(lines)


def _source_lines(name: str, source: dict[str, Any]) -> list[str]:
    licences = "; ".join(f"{licence} ({count:,})" for licence, count in source["licences"].items())
    lines = [f"{name}: {source['kind']}, {source['origin']}", f"  licences: {licences or 'no documents'}"]
    most = max((entry["documents"] for entry in source["lengths"]), default=0)
    if most:
        lines.append(
            f"  tokens of a document: {source['shortest_tokens']:,} to {source['longest_tokens']:,}, "
            f"median {source['median_tokens']:,.0f}"
        )
    for entry in source["lengths"]:
        bar = "█" * -(-entry["documents"] * _BAR_WIDTH // most)
        lines.append(f"  {tokens_label(entry['from_tokens']):>7} {entry['documents']:>9,} {bar}")
    return lines


def tokens_label(tokens: int) -> str:
    """A power of two in short: 512, 4Ki, 1Mi."""
    return next((f"{tokens // unit}{name}" for unit, name in _UNITS if tokens >= unit), str(tokens))


def save_picture(summary: dict[str, Any], file: Path) -> None:
    """Write documents and tokens by length of document, stacked by source, as PNG. `summary`: of `summarise`.

    Raises:
        UsageError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    found = [entry["from_tokens"] for source in summary["sources"].values() for entry in source["lengths"]]
    powers = range(min(found, default=1).bit_length() - 1, max(found, default=1).bit_length())
    lengths = [2**power for power in powers]
    places = {length: place for place, length in enumerate(lengths)}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), dpi=120)
    for axis, quantity in zip(axes, ("documents", "tokens"), strict=True):
        below = [0] * len(lengths)
        for number, (name, source) in enumerate(summary["sources"].items()):
            heights = [0] * len(lengths)
            for entry in source["lengths"]:
                heights[places[entry["from_tokens"]]] = entry[quantity]
            colour = _COLOURS[number % len(_COLOURS)]
            axis.bar(range(len(lengths)), heights, bottom=below, label=name, color=colour, width=0.85)
            below = [base + height for base, height in zip(below, heights, strict=True)]
        axis.set_xticks(range(len(lengths)), [tokens_label(length) for length in lengths], rotation=45)
        axis.set_xlabel("tokens of a document, at least")
        axis.set_ylabel(quantity)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.ticklabel_format(axis="y", style="plain" if max(below, default=0) < 10**6 else "sci", scilimits=(0, 0))
    if summary["sources"]:
        axes[0].legend(frameon=False)
    figure.suptitle(f"{summary['name']}: {summary['documents']:,} documents, {summary['tokens']:,} tokens")
    figure.tight_layout()
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise UsageError(f"cannot write the picture to {file}: {error.strerror}. Choose another --png.") from None
    finally:
        pyplot.close(figure)
