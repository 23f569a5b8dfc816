"""Evaluate one checkpoint: verified weights, held-out documents, scores, RUN/evals/KEY, once per key."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.entries import DocumentEntry
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.errors import LongspanError, UsageError
from longspan.modeling.model import LanguageModel
from longspan.trainer.checkpoint.load import LoadedModel, load_model, read_tokenizer, without_padding_rows
from longspan.trainer.corpus_tokenizer import check_tokenizer
from longspan.trainer.evaluation import targets
from longspan.trainer.evaluation.describe import describe
from longspan.trainer.evaluation.folders import (
    CURVE,
    RESULT,
    SUCCESS,
    evals_folder,
    is_torn,
    put_aside,
    read_result,
)
from longspan.trainer.evaluation.plot import curve_png
from longspan.trainer.evaluation.ranks import sum_over_ranks, together
from longspan.trainer.evaluation.repeats import repeated_tokens
from longspan.trainer.evaluation.result import summarise
from longspan.trainer.evaluation.scorer import Scorer
from longspan.trainer.evaluation.spec import PROTOCOL, EvaluationSpec, evaluation_key
from longspan.trainer.evaluation.specs import Spec, TaskSpec
from longspan.trainer.evaluation.task_result import task_png
from longspan.trainer.evaluation.tasks import NoCorpus, PreparedTasks, prepare_tasks
from longspan.trainer.evaluation.windows import Plan, Score, ScoredDocument, score_keys, shares
from longspan.trainer.shards import open_shards

if TYPE_CHECKING:  # a single process needs none of what it imports
    from longspan.cluster.mesh import Mesh

_RESULT_BYTES = 2**22  # more than a result with its picture has


def default_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluate(
    checkpoint: Path,
    spec: Spec,
    out: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Score a checkpoint, or read the result that its key already has.

    Args:
        checkpoint: checkpoint folder.
        spec: what to measure.
        out: folder of results; RUN/evals if None. The result is in `out`/KEY.
        device: where the model runs.
        progress: called with the fraction that is done.
        mesh: ranks that divide the documents; rank 0 writes the result. This process alone if None.

    Returns:
        result.json with two entries more: `folder`, and `reused` (whether it was there before).

    Raises:
        CheckpointError: the checkpoint does not verify.
        DataError: a document or the manifest does not hold what it should.
        UsageError: no shards, documents too short for the spec, or no place for the result.
        LongspanError: the result cannot be written.
    """
    started = time.monotonic()
    loaded = load_model(checkpoint, device)
    reader = open_evaluated_corpus(spec, loaded)
    try:
        key = _key(loaded, spec, reader)
        folder = (out or evals_folder(loaded.path)) / key
        known = read_result(folder)
        if known is not None if mesh is None else mesh.gather(known is not None)[0]:
            return {**(known or {}), "folder": str(folder), "reused": True}
        check_place(folder)
        prepared = prepare(loaded, spec, reader, device)
        result = prepared.assemble(_score(prepared, mesh, progress))
    finally:
        reader.close()
    result["seconds"] = round(time.monotonic() - started, 3)
    if mesh is None or mesh.rank == 0:
        try:
            publish(folder, result)
        except OSError as error:
            raise _unwritable(folder, error) from error
    return {**result, "folder": str(folder), "reused": False}


def _score(
    prepared: Prepared | PreparedTasks, mesh: Mesh | None, progress: Callable[[float], None] | None
) -> list[Any]:
    """All scores, this rank's and the others'."""
    if mesh is None:
        return prepared.score(progress=progress)
    own = prepared.shares(mesh.dp_cp_size)[mesh.data_rank]
    scores: list[Any] = together(mesh, lambda: prepared.score(own, progress))
    zeros: list[Any] = prepared.zeros()
    return sum_over_ranks(scores, zeros, mesh)


def _key(loaded: LoadedModel, spec: Spec, reader: DocumentReader | NoCorpus) -> str:
    if isinstance(spec, TaskSpec):
        return evaluation_key(loaded.fingerprint, spec, spec.dataset_digest)
    assert isinstance(reader, DocumentReader)
    return evaluation_key(loaded.fingerprint, spec, reader.manifest.digest)


def open_evaluated_corpus(spec: Spec, loaded: LoadedModel) -> DocumentReader | NoCorpus:
    """The spec's documents, or those that the run was trained on; nothing for a synthetic task.

    Raises:
        UsageError: there are none, or they hold the tokens of another tokenizer.
    """
    if isinstance(spec, TaskSpec):
        return NoCorpus()
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


@dataclass(frozen=True)
class Prepared:
    """An evaluation laid out; its documents can be scored in parts, by several processes.

    Attributes:
        loaded: the checkpoint.
        model: its model in the spec's precision, on `device`.
        spec: what to measure.
        key: name of the result.
        manifest: of the corpus.
        selection: documents and spans that were chosen.
        documents: with their tokens.
        plan: modes and context lengths.
        device: where the model is.
    """

    score_type: ClassVar[type[Score]] = Score

    loaded: LoadedModel
    model: LanguageModel
    spec: EvaluationSpec
    key: str
    manifest: Manifest
    selection: targets.Selection
    documents: list[ScoredDocument]
    plan: Plan
    device: torch.device | str

    def score(
        self, only: Collection[int] | None = None, progress: Callable[[float], None] | None = None
    ) -> list[Score]:
        """Scores of these documents (indices; all if None), in the order document, span, mode, length."""
        return Scorer(self.model, self.documents, self.plan, self.device, progress, only).run()

    def zeros(self) -> list[Score]:
        """Every score that there will be, before anything is added to it."""
        return [Score(*key) for key in score_keys(self.documents, self.plan)]

    def shares(self, ranks: int) -> list[list[int]]:
        """Documents of each rank, of about equal work."""
        return shares(self.documents, self.plan, ranks)

    def assemble(self, scores: Sequence[Score]) -> dict[str, Any]:
        """result.json without `seconds`, from the scores of all documents."""
        window = self.plan.window_tokens
        return {
            "key": self.key,
            "kind": "ppl_vs_length",
            "protocol": PROTOCOL,
            "spec": self.spec.canonical(),
            "spec_digest": self.spec.digest,
            **describe(self.loaded, self.device),
            "data": _describe_data(self.manifest, self.selection, self.documents, self.spec),
            **summarise(scores, self.documents, self.spec, window),
            "scores": [_describe_score(score, self.documents) for score in scores],
        }


def prepare(
    loaded: LoadedModel, spec: Spec, reader: DocumentReader | NoCorpus, device: torch.device | str
) -> Prepared | PreparedTasks:
    """Choose targets and read their documents, or make the samples of a task.

    Raises:
        DataError: a document does not hold what it should.
        UsageError: documents too short for the spec, or a spec that does not fit the model.
    """
    loaded = without_padding_rows(loaded)
    model = loaded.model
    if spec.precision == "bf16":  # a copy: the next spec may want the weights as they are
        model = copy.deepcopy(model).to(torch.bfloat16)
    key = _key(loaded, spec, reader)
    if isinstance(spec, TaskSpec):
        return prepare_tasks(loaded, model, spec, key, device)
    assert isinstance(reader, DocumentReader)
    window = loaded.config.model.window_tokens
    if window > spec.longest_tokens:
        raise UsageError(
            f"context_tokens ends at {spec.longest_tokens}, below the model's window of {window} tokens, which "
            f"carried, swapped and the memory gain need before each target. Put {window} into context_tokens."
        )
    selection = targets.select(reader.manifest.split(spec.split), spec)
    plan = Plan(
        modes=spec.modes,
        context_tokens=spec.context_tokens,
        reset_tokens=spec.reset_lengths,
        window_tokens=window,
        stride_tokens=spec.stride_tokens,
        stride_share=spec.stride_share,
        segment_tokens=loaded.config.data.segment_tokens,
        batch_tokens=spec.batch_tokens,
    )
    return Prepared(
        loaded=loaded,
        model=model,
        spec=spec,
        key=key,
        manifest=reader.manifest,
        selection=selection,
        documents=_read_documents(reader, selection, spec, loaded),
        plan=plan,
        device=device,
    )


def _describe_score(score: Score, documents: list[ScoredDocument]) -> dict[str, Any]:
    return {
        "document": documents[score.document].name,
        "span": score.span,
        "mode": score.mode,
        "context_tokens": score.context_tokens,
        "nats": score.nats,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "repeat_nats": score.repeat_nats,
        "repeat_tokens": score.repeat_tokens,
        "repeat_bytes": score.repeat_bytes,
    }


def _read_documents(
    reader: DocumentReader, selection: targets.Selection, spec: EvaluationSpec, loaded: LoadedModel
) -> list[ScoredDocument]:
    """Each document from bos to eos or to the end of its head; the whole document is verified by its hash."""
    tokenizer = None
    sizes = [reader.target_bytes_range(entry, 0, entry.num_tokens) for entry in selection.entries]
    laid = list(map(targets.token_ranges, sizes, selection.spans))
    targets.check_contexts(zip((entry.id for entry in selection.entries), sizes, laid, strict=True), spec)
    documents = []
    for entry, token_bytes, ranges in zip(selection.entries, sizes, laid, strict=True):
        end = targets.head_tokens(token_bytes, spec.max_document_bytes)
        tokens = reader.token_range(entry, 0, end)
        words = None
        if end == entry.num_tokens - 1:
            tokenizer = tokenizer or read_tokenizer(loaded.path)
            words = _words(reader, entry, tokenizer)
        repeats = repeated_tokens(tokens, spec.repeat_ngram_tokens, loaded.config.model.window_tokens)
        documents.append(ScoredDocument(entry.id, tokens, token_bytes[:end], ranges, entry.source, repeats, words))
    return documents


def _words(reader: DocumentReader, entry: DocumentEntry, tokenizer: Tokenizer) -> int:
    """Words of the text, whatever its tokens are: what stands between white space."""
    return len(tokenizer.decode(reader.tokens(entry)).split())


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


def check_place(folder: Path) -> None:
    """See that a result can be written there, before anything is computed for it.

    Raises:
        LongspanError: it cannot.
    """
    probe = folder.parent / f".tmp-{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, _RESULT_BYTES)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        probe.unlink(missing_ok=True)


def publish(folder: Path, result: dict[str, Any]) -> None:
    """Write the result under a temporary name and rename it, so that a folder with `_SUCCESS` is whole.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    temporary = folder.parent / f".tmp-{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        (temporary / RESULT).write_text(json.dumps(result, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        (task_png if result["kind"] == "synthetic" else curve_png)(result, temporary / CURVE)
        (temporary / SUCCESS).touch()
        for name in (RESULT, CURVE, SUCCESS):
            with (temporary / name).open("rb") as file:
                os.fsync(file.fileno())
        if is_torn(folder):
            put_aside(folder)
        os.rename(temporary, folder)
    except OSError:
        if read_result(folder) is None:  # else another evaluation of the same key was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> LongspanError:
    return LongspanError(
        f"the result cannot be written to {folder}: {error.strerror}. Free space or change permissions there, or name "
        f"another folder with --out, then evaluate again; results that are there already are untouched."
    )
