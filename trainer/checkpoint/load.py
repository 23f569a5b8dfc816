"""A model and its tokenizer from a checkpoint, for evaluation, export and generation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from longspan.data_pipeline.tokenization import load_tokenizer
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
from longspan.data_pipeline.tokenization.description import DESCRIPTION_NAME, read_description
from longspan.data_pipeline.vocabulary import ByteVocabulary
from longspan.errors import CheckpointError, LongspanError
from longspan.modeling.model import LanguageModel, build_model
from longspan.trainer import recipes
from longspan.trainer.checkpoint import contents
from longspan.trainer.checkpoint.manifest import Manifest
from longspan.trainer.checkpoint.verify import checked_manifest, damaged, newest
from longspan.trainer.config import RunConfig


@dataclass(frozen=True)
class LoadedModel:
    """A verified checkpoint's model.

    Attributes:
        model: in evaluation mode, on the device asked for, fp32.
        config: the run's configuration.
        step: optimizer updates that made the model.
        fingerprint: hex sha256 that changes with any byte of the checkpoint.
        path: checkpoint folder.
        tokenizer_digest: of the tokenizer whose ids the model was trained on.
        used_ids: ids of that tokenizer; the rows of the embedding behind them pad it and stand for nothing.
    """

    model: LanguageModel
    config: RunConfig
    step: int
    fingerprint: str
    path: Path
    tokenizer_digest: str
    used_ids: int


def load_model(path: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Verify a checkpoint whole and build its model.

    Args:
        path: checkpoint folder, or a run directory for its newest published checkpoint.
        device: where the model goes.

    Raises:
        UsageError: the path is neither of the two.
        CheckpointError: the checkpoint does not verify (names file and byte range), or does not hold the weights
            of the model that its configuration describes.
    """
    folder = newest(Path(path))
    manifest, fingerprint = checked_manifest(folder, skip="weights/")
    try:
        weights = contents.read_weights(folder, manifest)
    except CheckpointError as error:
        raise damaged(folder, [str(error)]) from error
    config = read_config(folder, manifest)
    with torch.random.fork_rng(devices=[]):  # initial values are about to be replaced: leave the caller's generator
        model = build_model(config.model)
    assign_weights(model, weights, folder)
    digest = tokenizer_digest(folder)
    used = _tokenizer_size(folder)
    return LoadedModel(model.to(device).eval(), config, manifest.step, fingerprint, folder, digest, used)


def without_padding_rows(loaded: LoadedModel) -> LoadedModel:
    """The same model, changed: its softmax is over the ids of its tokenizer, as in an export.

    Probability on rows that pad the vocabulary is on nothing that can come (docs/decisions/016-padding-rows.md).
    """
    embedding = loaded.model.embedding
    if embedding.weight.shape[0] > loaded.used_ids:
        embedding.weight = torch.nn.Parameter(embedding.weight.detach()[: loaded.used_ids].clone())
        embedding.num_embeddings = loaded.used_ids
    return loaded


def read_config(folder: Path, manifest: Manifest) -> RunConfig:
    """The run configuration that a checkpoint was written with.

    Raises:
        CheckpointError: this version of Longspan cannot read it.
    """
    text = contents.read_file(folder, manifest, contents.CONFIG).decode()
    try:
        return recipes.validate(RunConfig, yaml.safe_load(text), f"{folder / contents.CONFIG}")
    except (LongspanError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder / contents.CONFIG} is no configuration of this version: {error}") from error


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a verified checkpoint: its own copy of the corpus's, or bytes where it has none.

    Raises:
        UsageError: this machine or version cannot use it. CheckpointError: as `tokenizer_digest`.
    """
    tokenizer_digest(folder)
    saved = folder / contents.TOKENIZER
    return load_tokenizer(saved) if (saved / DESCRIPTION_NAME).is_file() else ByteTokenizer()


def tokenizer_digest(folder: Path) -> str:
    """Digest of a verified checkpoint's tokenizer, without loading it.

    Raises:
        CheckpointError: it is not that of the data which the model was trained on; names both digests.
    """
    saved = folder / contents.TOKENIZER
    found = read_description(saved).digest if (saved / DESCRIPTION_NAME).is_file() else ByteVocabulary().digest
    trained = json.loads((folder / contents.DATA).read_bytes()).get("plan", {}).get("vocabulary_digest", found)
    if trained != found:
        raise CheckpointError(
            f"checkpoint {folder} keeps the tokenizer {found}, but its model was trained with {trained}. "
            f"Use another checkpoint of the run."
        )
    return found


def _tokenizer_size(folder: Path) -> int:
    saved = folder / contents.TOKENIZER
    return read_description(saved).size if (saved / DESCRIPTION_NAME).is_file() else ByteTokenizer().size


def assign_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Copy `weights` into the model's parameters; every name and shape must match.

    Raises:
        CheckpointError: lists the first parameters that are missing, unknown or of another shape.
    """
    parameters = dict(model.named_parameters())
    problems = [f"{name}: not in the checkpoint" for name in parameters.keys() - weights.keys()]
    problems += [
        f"{name}: unknown to the model"
        for name in weights.keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    ]
    problems += [
        f"{name}: {list(weights[name].shape)} in the checkpoint, {list(parameters[name].shape)} in the model"
        for name in parameters.keys() & weights.keys()
        if weights[name].shape != parameters[name].shape
    ]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in sorted(problems)[:10])
        raise CheckpointError(
            f"checkpoint {folder} does not fit its own {contents.CONFIG}; {len(problems)} differences:\n{shown}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
