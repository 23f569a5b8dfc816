"""Evaluate one checkpoint: verified weights, held-out documents, scores, RUN/evals/KEY, once per key."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.errors import UsageError
from longspan.trainer.checkpoint.load import LoadedModel, load_model
from longspan.trainer.corpus_tokenizer import check_tokenizer
from longspan.trainer.evaluation import targets
from longspan.trainer.evaluation.folders import CURVE, RESULT, SUCCESS, commit_time, evals_folder, read_result, run_of
from longspan.trainer.evaluation.plot import curve_png
from longspan.trainer.evaluation.result import summarise
from longspan.trainer.evaluation.scorer import Scorer
from longspan.trainer.evaluation.spec import PROTOCOL, EvaluationSpec, evaluation_key
from longspan.trainer.evaluation.windows import Plan, Score, ScoredDocument
from longspan.trainer.shards import open_shards


def default_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluate(
    checkpoint: Path,
    spec: EvaluationSpec,
    out: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Score a checkpoint, or read the result that its key already has.

    Args:
        checkpoint: checkpoint folder.
        spec: what to measure.
        out: folder of results; RUN/evals if None. The result is in `out`/KEY.
        device: where the model runs.
        progress: called with the fraction that is done.

    Returns:
        result.json with two entries more: `folder`, and `reused` (whether it was there before).

    Raises:
        CheckpointError: the checkpoint does not verify.
        DataError: a document or the manifest does not hold what it should.
        UsageError: no shards, documents too short for the spec, or no place for the result.
    """
    started = time.monotonic()
    loaded = load_model(checkpoint, device)
    reader = _open_corpus(spec, loaded)
    try:
        key = evaluation_key(loaded.fingerprint, spec, reader.manifest.digest)
        folder = (out or evals_folder(loaded.path)) / key
        known = read_result(folder)
        if known is not None:
            return {**known, "folder": str(folder), "reused": True}
        result = {"key": key, **_measure(loaded, spec, reader, device, progress)}
    finally:
        reader.close()
    result["seconds"] = round(time.monotonic() - started, 3)
    _publish(folder, result)
    return {**result, "folder": str(folder), "reused": False}


def _open_corpus(spec: EvaluationSpec, loaded: LoadedModel) -> DocumentReader:
    """The spec's documents, or those that the run was trained on.

    Raises:
        UsageError: there are none, or they hold the tokens of another tokenizer.
    """
    shards = spec.shards or loaded.config.data.shards
    try:
        reader = open_shards(shards, loaded.config.data)
    except UsageError as error:
        if spec.shards:
            raise
        raise UsageError(
            f"{error} The run was trained on data.shards = {loaded.config.data.shards}, "
            f"seen from {Path.cwd()}; to name another place: --set shards=FOLDER."
        ) from error
    check_tokenizer(loaded.tokenizer_digest, reader.manifest.vocabulary, str(loaded.path), shards)
    return reader


def _measure(
    loaded: LoadedModel,
    spec: EvaluationSpec,
    reader: DocumentReader,
    device: torch.device | str,
    progress: Callable[[float], None] | None,
) -> dict[str, Any]:
    """Choose targets, score them in every mode, sum up: result.json without `key` and `seconds`."""
    window = loaded.config.model.window_tokens
    if window > spec.longest_tokens:
        raise UsageError(
            f"context_tokens ends at {spec.longest_tokens}, below the model's window of {window} tokens, which "
            f"carried, swapped and the memory gain need before each target. Put {window} into context_tokens."
        )
    selection = targets.select(reader.manifest.split(spec.split), spec)
    documents = _read_documents(reader, selection, spec)
    plan = Plan(
        modes=spec.modes,
        context_tokens=spec.context_tokens,
        reset_tokens=spec.reset_lengths,
        window_tokens=window,
        stride_tokens=spec.stride_tokens,
        batch_tokens=spec.batch_tokens,
    )
    scores = Scorer(loaded.model, documents, plan, device, progress).run()
    return {
        "protocol": PROTOCOL,
        "spec": spec.canonical(),
        "spec_digest": spec.digest,
        "checkpoint": _describe_checkpoint(loaded),
        "model": {
            "name": loaded.config.model.name,
            "window_tokens": window,
            "quantum": loaded.model.quantum,
            "segment_tokens": loaded.config.data.segment_tokens,
        },
        "data": _describe_data(reader.manifest, selection, documents, spec),
        **summarise(scores, spec, window),
        "scores": [_describe_score(score, documents) for score in scores],
        "environment": _environment(device),
    }


def _describe_score(score: Score, documents: list[ScoredDocument]) -> dict[str, Any]:
    return {
        "document": documents[score.document].name,
        "span": score.span,
        "mode": score.mode,
        "context_tokens": score.context_tokens,
        "nats": score.nats,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }


def _read_documents(reader: DocumentReader, selection: targets.Selection, spec: EvaluationSpec) -> list[ScoredDocument]:
    """Bos and the scored head of each document; the whole document is verified by its hash."""
    documents = []
    for entry, spans in zip(selection.entries, selection.spans, strict=True):
        token_bytes = reader.target_bytes_range(entry, 0, entry.num_tokens)
        ranges = targets.token_ranges(token_bytes, spans)
        targets.check_context(entry.id, token_bytes, ranges, spec)
        end = targets.head_tokens(token_bytes, selection.head_bytes)
        documents.append(ScoredDocument(entry.id, reader.token_range(entry, 0, end), token_bytes[:end], ranges))
    return _with_donors(documents) if "swapped" in spec.modes else documents


def _with_donors(documents: list[ScoredDocument]) -> list[ScoredDocument]:
    """Make the second longest document as long as the longest, by its own beginning again.

    In bytes the heads are equally long, in tokens not: the longest one's donor would end before it.
    """
    *_, second, first = sorted(documents, key=lambda document: len(document.tokens))
    size = len(first.tokens)
    longer = replace(second, tokens=np.resize(second.tokens, size), token_bytes=np.resize(second.token_bytes, size))
    return [longer if document is second else document for document in documents]


def _describe_checkpoint(loaded: LoadedModel) -> dict[str, Any]:
    return {
        "path": str(loaded.path),
        "run": run_of(loaded.path).name,
        "name": loaded.config.name,
        "step": loaded.step,
        "fingerprint": loaded.fingerprint,
        "committed": commit_time(loaded.path),
    }


def _describe_data(
    manifest: Manifest, selection: targets.Selection, documents: list[ScoredDocument], spec: EvaluationSpec
) -> dict[str, Any]:
    return {
        "shards": str(manifest.folder),
        "digest": manifest.digest,
        "tokenizer": {"name": manifest.vocabulary.name, "digest": manifest.vocabulary.digest},
        "split": spec.split,
        "documents": [
            {"id": entry.id, "source": entry.source, "num_bytes": entry.num_bytes, "spans": [list(s) for s in spans]}
            for entry, spans in zip(selection.entries, selection.spans, strict=True)
        ],
        "excluded": [{"id": entry.id, "num_bytes": entry.num_bytes} for entry in selection.excluded],
        "needed_bytes": selection.needed_bytes,
        "mask_digest": targets.mask_digest([d.name for d in documents], [list(d.spans) for d in documents]),
    }


def _environment(device: torch.device | str) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def _publish(folder: Path, result: dict[str, Any]) -> None:
    """Write the result under a temporary name and rename it, so that a folder with `_SUCCESS` is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".tmp-{folder.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        (temporary / RESULT).write_text(json.dumps(result, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        curve_png(result, temporary / CURVE)
        (temporary / SUCCESS).touch()
        for name in (RESULT, CURVE, SUCCESS):
            with (temporary / name).open("rb") as file:
                os.fsync(file.fileno())
        os.rename(temporary, folder)
    except OSError:
        if read_result(folder) is None:  # else another evaluation of the same key was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
