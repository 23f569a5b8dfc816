"""The report's words and tables: header, summary numbers, samples, data, checkpoints, machine, configuration."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from typing import Any

from longspan import __version__
from longspan.trainer.report_data import Entry, RunRecord, number, points
from longspan.trainer.report_html import details, digest, duration, empty, section, short, signed, size, table, text
from longspan.trainer.report_html import number as shown
from longspan.trainer.report_length import newest_result

SHOWN_SAMPLES = 3
PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "triton", "mlflow", "ray")


def header(record: RunRecord) -> str:
    """Name of the run, how far it came, and when."""
    name = str(record.config.get("name") or record.path.name)
    started, ended = _times(record)
    words = [f"run directory <b>{text(record.path.name)}</b>"]
    if started is not None and ended is not None:
        words.append(time.strftime("%Y-%m-%d %H:%M", time.localtime(started)))
        words.append(f"{duration(ended - started)} from first to last record")
    return f'<header><h1>{text(name)}</h1><p class="status">{_badge(record)}{" · ".join(words)}</p></header>'


def _badge(record: RunRecord) -> str:
    done, wanted = last_step(record), _section(record, "training").get("steps")
    if wanted and done >= wanted:
        return f'<span class="badge good">finished</span>{done:,} steps · '
    goal = f" of {wanted:,}" if isinstance(wanted, int) else ""
    ends = [entry for entry in record.other if entry.get("kind") == "end"]
    newest_start = max((index for index, e in enumerate(record.other) if e.get("kind") == "start"), default=-1)
    ended = bool(ends) and record.other.index(ends[-1]) > newest_start
    kind, word = ("bad", "stopped early") if ended else ("open", "running or interrupted")
    return f'<span class="badge {kind}">{word}</span>step {done:,}{goal} · '


def last_step(record: RunRecord) -> int:
    """The last optimizer step in the log; 0 before the first."""
    return int(record.steps[-1]["step"]) if record.steps else 0


def _times(record: RunRecord) -> tuple[float | None, float | None]:
    entries = [*record.other, *record.steps, *record.validations, *record.checkpoints]
    moments = [moment for entry in entries if (moment := number(entry, "time")) is not None]
    return (min(moments), max(moments)) if moments else (None, None)


def _section(record: RunRecord, name: str) -> Entry:
    section_ = record.config.get(name)
    return section_ if isinstance(section_, dict) else {}


def tiles(record: RunRecord) -> str:
    """The numbers that a reader looks for first."""
    held_out = points(record.validations, "bits_per_byte")
    training = [value for _, value in points(record.steps, "bits_per_byte")[-20:]]
    speeds = [value for _, value in points(record.steps, "tokens_per_second")]
    flops = [value for _, value in points(record.steps, "model_flops_per_second")]
    last: Entry = record.steps[-1] if record.steps else {}
    cells = [
        _tile("held-out bits per byte", shown(held_out[-1][1] if held_out else None), "", _best(held_out)),
        _gain_tile(record),
        _tile(
            "training bits per byte",
            shown(statistics.fmean(training) if training else None),
            "",
            "mean of the last steps",
        ),
        _tile("tokens seen", short(number(last, "tokens")), "", f"{last_step(record):,} steps"),
        _tile("tokens per second", short(statistics.median(speeds) if speeds else None), "", "median step"),
        _tile("model FLOP per second", short(statistics.median(flops) if flops else None), "", "median step"),
        _tile("parameters", short(_parameters(record)), "", _layers(record)),
        _tile("skipped steps", short(number(last, "skips")), "", _failures(record)),
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _tile(name: str, value: str, unit: str, note: str) -> str:
    after = f'<span class="unit">{text(unit)}</span>' if unit else ""
    return (
        f'<div class="tile"><div class="name">{text(name)}</div><div class="value">{text(value)}{after}</div>'
        f'<div class="note">{text(note)}</div></div>'
    )


def _best(held_out: list[tuple[float, float]]) -> str:
    if not held_out:
        return "not validated yet"
    step, value = min(held_out, key=lambda point: point[1])
    return "the best so far" if step == held_out[-1][0] else f"best {value:.3f} at step {step:,.0f}"


def _gain_tile(record: RunRecord) -> str:
    gain: Entry = (newest_result(record).get("memory_gain") or {}) if record.evaluations else {}
    low, high = number(gain, "ci_low"), number(gain, "ci_high")
    note = "not evaluated yet" if low is None else f"interval {signed(low)} to {signed(high)}"
    return _tile("memory gain", signed(number(gain, "bits_per_byte")), "", note)


def _parameters(record: RunRecord) -> float | None:
    logged = [number(entry, "parameters") for entry in record.other if entry.get("kind") == "start"]
    stored = [entry["parameters"] for entry in record.committed]
    return next((value for value in [*reversed(logged), *reversed(stored)] if value), None)


def _layers(record: RunRecord) -> str:
    layers = _section(record, "model").get("layers")
    if not isinstance(layers, list):
        return ""
    count = sum(layer.get("repeat", 1) for layer in layers if isinstance(layer, dict))
    return f"{count} layers, window {_section(record, 'model').get('window_tokens', '?')}"


def _failures(record: RunRecord) -> str:
    count = len(record.failures)
    return f"{count} failed checkpoint saves" if count else "no failed checkpoint saves"


def samples(record: RunRecord) -> str:
    """The last texts that the model wrote while it was trained."""
    written = [entry for entry in record.validations if entry.get("sample")]
    prompt = str(_section(record, "validation").get("sample_prompt", ""))
    blocks = [
        f"<p><b>step {entry['step']:,}</b></p><pre><b>{text(prompt)}</b>{text(entry['sample'])}</pre>"
        for entry in reversed(written[-SHOWN_SAMPLES:])
    ]
    about = "Drawn from the model, newest first; the prompt is in bold."
    return section("Text samples", *(blocks or [empty("No sample was drawn yet.")]), about=about)


def data(record: RunRecord) -> str:
    """The corpus: documents and bytes by source and split, licence, digest."""
    manifest = record.manifest
    if manifest is None:
        shards = _section(record, "data").get("shards", "unknown")
        return section("Data", empty(f"The corpus is not at hand any more: {shards}"))
    counts: dict[tuple[str, str], list[int]] = {}
    for document in manifest.get("documents", []):
        cell = counts.setdefault((document["source"], document["split"]), [0, 0])
        cell[0] += 1
        cell[1] += document["num_bytes"]
    about = {source["name"]: source for source in manifest.get("sources", [])}
    rows = []
    for (source, split), (documents, total) in sorted(counts.items()):
        origin = about.get(source, {})
        rows.append(
            [
                text(source),
                text(split.replace("_", "-")),
                f"{documents:,}",
                size(total),
                text(origin.get("origin", "")),
                text(origin.get("licence", "")),
            ]
        )
    vocabulary: Entry = manifest.get("vocabulary") or {}
    head = ["source", "split", "documents", "size", "origin", "licence"]
    facts = [
        ["corpus digest", digest(manifest.get("digest", "unknown"))],
        ["shards", text(f"{len(manifest.get('shards', []))} in {_section(record, 'data').get('shards')}")],
        ["tokenizer", text(f"{vocabulary.get('name', 'unknown')}, {short(number(vocabulary, 'size'))} ids")],
        ["tokenizer digest", digest(vocabulary.get("digest", "unknown"))],
    ]
    return section("Data", table(head, rows, (2, 3)), table(["fact", "value"], facts))


def checkpoints(record: RunRecord) -> str:
    """Checkpoints on disk with their fingerprints, and failed saves."""
    seconds = {entry.get("step"): number(entry, "seconds") for entry in record.checkpoints}
    rows = [
        [
            f"{entry['step']:,}",
            size(entry["bytes"]),
            f"{entry['parameters']:,}",
            shown(seconds.get(entry["step"]), 2),
            digest(entry["committed"].split(" ")[0]),
        ]
        for entry in record.committed
    ]
    head = ["step", "size", "parameters", "seconds to save", "fingerprint (sha256)"]
    content = table(head, rows, (0, 1, 2, 3)) if rows else empty("No checkpoint was committed yet.")
    failed = [[f"{entry.get('step', '?')}", text(entry.get("error", ""))] for entry in record.failures]
    return section("Checkpoints on disk", content, table(["step", "save that failed"], failed) if failed else "")


def machine(record: RunRecord) -> str:
    """Where and with what the run was made, as far as it was recorded."""
    starts = [entry for entry in record.other if entry.get("kind") == "start"]
    rows = []
    for entry in starts[-3:]:
        hidden = ("kind", "time", "step", "versions")
        facts = ", ".join(f"{key} {value}" for key, value in entry.items() if key not in hidden)
        versions = entry.get("versions")
        facts += ", " + _joined(versions) if isinstance(versions, dict) else ""
        rows.append([f"process from step {entry.get('step', '?')}", text(facts)])
    if record.evaluations:
        rows.append(["evaluation", text(_joined(newest_result(record).get("environment") or {}))])
    rows.append(
        ["this page", text(f"longspan {__version__}, Python {platform.python_version()}, {_joined(_versions())}")]
    )
    rows.append(["written", time.strftime("%Y-%m-%d %H:%M:%S %Z")])
    return section("Versions and device", table(["what", "value"], rows))


def _joined(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def configuration(record: RunRecord) -> str:
    """The resolved configuration, which runs again as it stands."""
    if not record.config_text:
        return section("Configuration", empty("config.yaml is missing."))
    content = f'<pre class="config">{text(record.config_text)}</pre>'
    return section("Configuration", details("RUN/config.yaml, all fields resolved", content))
