"""The model card of an export: README.md with the measured curve as metadata, table and picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longspan import __version__
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.errors import LongspanError
from longspan.trainer.config import RunConfig
from longspan.trainer.evaluation.folders import SUCCESS, read_result, run_of
from longspan.trainer.evaluation.plot import curve_png

CURVE = "curve.png"
NUMBERS = "eval/ppl_vs_length.json"


@dataclass(frozen=True)
class Provenance:
    """Where an export comes from.

    Attributes:
        fingerprint: of the checkpoint, hex sha256.
        step: optimizer updates.
        checkpoint: name of its folder.
        counters: the trainer's counters.
        data: the saved state of the data reader.
        num_parameters: numbers in all exported tensors.
        dropped: what the export leaves out of the checkpoint's weights, and why.
        tokenizer: of the model.
    """

    fingerprint: str
    step: int
    checkpoint: str
    counters: dict[str, Any]
    data: dict[str, Any]
    num_parameters: int
    dropped: list[Any]
    tokenizer: Tokenizer

    @property
    def corpus_digest(self) -> str | None:
        """Digest of the corpus that was trained on."""
        digest = self.data.get("plan", {}).get("manifest_digest")
        return digest if isinstance(digest, str) else None


def newest_result(checkpoint: Path, fingerprint: str) -> dict[str, Any] | None:
    """The newest perplexity versus length of this very checkpoint in its run directory; None if there is none."""
    found = []
    for marker in (run_of(checkpoint) / "evals").glob(f"[!.]*/{SUCCESS}"):  # not what is being written
        result = read_result(marker.parent)
        if result is None or result.get("kind") == "synthetic":
            continue
        if result["checkpoint"]["fingerprint"] == fingerprint:
            found.append((marker.stat().st_mtime_ns, marker.parent.name, result))
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def write_card(folder: Path, config: RunConfig, provenance: Provenance, result: dict[str, Any] | None) -> None:
    """Write README.md, and with a result its picture and its numbers.

    Args:
        folder: of the export.
        config: of the run.
        provenance: of the weights.
        result: result.json of the checkpoint's newest evaluation, or None.
    """
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["longspan", "custom_code", "long-context", *(["byte-level"] if _is_bytes(provenance) else [])],
    }
    if result is not None:
        metadata["model-index"] = [{"name": config.name, "results": _index_entries(result)}]
        (folder / NUMBERS).parent.mkdir()
        numbers = {name: value for name, value in result.items() if name != "scores"}
        (folder / NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        curve_png(result, folder / CURVE)
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    body = _TEMPLATE.format(
        name=config.name,
        level="A byte-level" if _is_bytes(provenance) else "A",
        facts=_facts(config, provenance),
        curve=_curve_section(result),
        data=_data_section(config, provenance),
        provenance=_provenance_section(provenance),
        window=config.model.window_tokens,
    )
    (folder / "README.md").write_text(f"---\n{head}---\n\n{body}", encoding="utf-8")


def _index_entries(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry of `model-index` for each point of the curve, and one for `carried`."""
    points = [*result["curve"], {**result["carried"], "mode": "carried", "context_tokens": None}]
    entries = []
    for point in points:
        length = point["context_tokens"]
        where = f"{point['mode']}, context {length}" if length else point["mode"]
        entries.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {
                    "type": "longspan-corpus",
                    "name": f"{result['data']['split']} documents",
                    "args": {"context": length or "whole document", "mode": point["mode"]},
                },
                "metrics": [
                    {"type": "bits_per_byte", "name": f"bits per byte ({where})", "value": point["bits_per_byte"]}
                ],
            }
        )
    return entries


def _facts(config: RunConfig, provenance: Provenance) -> str:
    model = config.model
    mixers = [layer.model_dump()["mixer"] for layer in model.expanded_layers()]
    kinds = ", ".join(f"{mixers.count(kind)} x {kind}" for kind in dict.fromkeys(mixers))
    tokens = provenance.counters.get("tokens")
    length = f"{provenance.step:,} optimizer steps" + (f", {tokens:,} tokens" if isinstance(tokens, int) else "")
    rows = [
        ("parameters", f"{provenance.num_parameters:,}"),
        ("layers", kinds + (f", recurrent memory of {model.memory.num_tokens} tokens" if model.memory else "")),
        ("width, heads, feed-forward", f"{model.dim}, {model.num_heads} x {model.head_dim}, {model.ffn_dim}"),
        ("window (block) length", f"{model.window_tokens} tokens"),
        ("training length", f"{config.data.segment_tokens} tokens a segment, state carried from segment to segment"),
        ("trained for", length),
        ("vocabulary", _vocabulary(provenance.tokenizer)),
        ("types", "weights float32; recurrent and matrix states float32 whatever the weights are cast to"),
    ]
    return _table(("what", "value"), rows)


def _is_bytes(provenance: Provenance) -> bool:
    return provenance.tokenizer.kind == "bytes"


def _vocabulary(tokenizer: Tokenizer) -> str:
    specials = f"bos {tokenizer.bos}, eos {tokenizer.eos}, pad {tokenizer.pad}"
    if tokenizer.kind == "bytes":
        return f"bytes: ids 0 to 255, {specials}"
    return f"{tokenizer.name}: {tokenizer.size:,} ids, {specials}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _curve_section(result: dict[str, Any] | None) -> str:
    if result is None:
        return "This checkpoint has not been evaluated yet."
    rows = [
        (point["mode"], f"{point['context_tokens']:,}", *_rate(point), f"{point['perplexity_per_token']:.4f}")
        for point in result["curve"]
    ]
    for mode in ("carried", "swapped"):
        point = result.get(mode)
        if point:
            rows.append((mode, "whole document", *_rate(point), f"{point['perplexity_per_token']:.4f}"))
    share = f"{result['spec']['confidence']:.0%}"
    lines = [
        f"Bits per byte of the same {result['target_bytes']:,} bytes in {result['num_documents']} "
        f"{result['data']['split'].replace('_', '-')} documents, given more or less of the document before them. "
        f"Intervals: {share}, resampled over documents.",
        "",
        f"![Bits per byte by context length]({CURVE})",
        "",
        _table(("mode", "context (tokens)", "bits per byte", f"{share} interval", "perplexity per token"), rows),
    ]
    gain = result.get("memory_gain")
    if gain:
        lines += [
            "",
            f"**Memory gain**: forgetting the carried state {gain['context_tokens']} tokens before the target costs "
            f"{gain['bits_per_byte']:+.4f} bits per byte ({share} interval {gain['ci_low']:+.4f} to "
            f"{gain['ci_high']:+.4f}).",
        ]
    digest = result["data"].get("digest")
    lines += [
        "",
        f"All numbers: `{NUMBERS}`. Protocol {result['protocol']}, spec {result['spec_digest']}, data {digest}.",
    ]
    return "\n".join(lines)


def _rate(point: dict[str, Any]) -> tuple[str, str]:
    return f"{point['bits_per_byte']:.4f}", f"{point['ci_low']:.4f} to {point['ci_high']:.4f}"


def _data_section(config: RunConfig, provenance: Provenance) -> str:
    lines = [f"Corpus digest: `{provenance.corpus_digest or 'unknown'}`."]
    try:
        manifest = Manifest.load(config.data.shards)
    except LongspanError:
        return lines[0]  # the shards are elsewhere; the digest still names them
    if manifest.digest == provenance.corpus_digest:
        rows = [(source.name, source.origin, source.licence) for source in manifest.sources]
        lines += ["", _table(("source", "origin", "licence"), rows)]
    return "\n".join(lines)


def _provenance_section(provenance: Provenance) -> str:
    rows = [
        ("checkpoint", f"`{provenance.checkpoint}`"),
        ("checkpoint fingerprint (sha256)", f"`{provenance.fingerprint}`"),
        ("longspan", __version__),
        ("tensors, shapes, sha256", "`export_manifest.json`"),
    ]
    return _table(("what", "value"), rows)


_TEMPLATE = """# {name}

{level} language model that carries a state through documents of any length, trained with Longspan.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
inputs = tokenizer("In the beginning", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200, do_sample=True)[0], skip_special_tokens=True))
```

The two Python files in this folder are all the code it needs; on a GPU they run the kernels of the package `longspan`
where that is installed. `generate()` carries the state in its cache: greedy,
sampling and beams; batches may be padded anywhere. A long text may be given in parts of any length
(`past_key_values` of one call to the next) with the same result.

## Model

{facts}

## Perplexity versus context length

{curve}

## Training data

{data}

## Limits

- Made for text like its training data; it has not been tuned to follow instructions and may produce anything.
- Every text must start with bos (the tokenizer adds it): the model never saw anything else.
- Runs in transformers 5.17 and later. Not supported: vLLM, SGLang, TGI, llama.cpp and other runtimes that expect
  plain attention caches; assisted (speculative) decoding and cache cropping, because a state cannot be rolled back;
  static and quantized caches.
- The state is written once in {window} tokens.

## Provenance

{provenance}
"""
