"""A checkpoint as a Hugging Face folder: read, write beside the target, verify by loading, rename.

The trainer's own names are the names in the export (`modeling/hf` mirrors the modules), so a weight is copied, not
mapped. The folder needs nothing of Longspan: it holds its own two Python files.
"""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from collections.abc import Iterator
from importlib import import_module, machinery, util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging as hf_logging

from longspan import __version__
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.errors import CheckpointError, UsageError
from longspan.modeling.hf.configuration_longspan import LongspanConfig
from longspan.modeling.hf.expressible import inexpressible
from longspan.modeling.hf.modeling_longspan import LongspanForCausalLM
from longspan.modeling.hf.source import CONFIGURATION_FILE, MODELING_FILE, python_files
from longspan.trainer.checkpoint import contents
from longspan.trainer.checkpoint.load import read_config, read_tokenizer
from longspan.trainer.checkpoint.verify import checked_manifest, damaged, newest
from longspan.trainer.config import RunConfig
from longspan.trainer.export_card import Provenance, newest_result, write_card
from longspan.trainer.export_folder import check_target, published
from longspan.trainer.export_origin import EXPORT_MANIFEST, is_exported, write_origin
from longspan.trainer.export_tokenizer import write_tokenizer
from longspan.trainer.export_weights import MAX_SHARD_BYTES, tensor_sha256, without_padding, write_shards


def export_checkpoint(
    checkpoint: Path, out: Path, *, overwrite: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, Any]:
    """Write the Hugging Face form of a checkpoint. Nothing stands at `out` before everything is written and verified.

    Args:
        checkpoint: checkpoint folder, or run directory for its newest one.
        out: folder to write; must not exist.
        overwrite: replace `out` if it is an earlier export (or empty).
        max_shard_bytes: of one weights file.

    Returns:
        Where it is and what it holds.

    Raises:
        UsageError: `out` exists or cannot be written, there is no checkpoint, or its tokenizer has no Hugging Face
            form.
        CheckpointError: the checkpoint does not verify, or the export does not load back to equal weights.
    """
    source = newest(checkpoint)
    check_target(out, overwrite, EXPORT_MANIFEST)
    manifest, fingerprint = checked_manifest(source, skip="weights/")
    config = read_config(source, manifest)
    check_expressible(config)
    try:
        weights = contents.read_weights(source, manifest)
        data = contents.read_json(source, manifest, contents.DATA)
        tokenizer_files = contents.read_tokenizer_files(source, manifest)
    except CheckpointError as error:
        raise damaged(source, [str(error)]) from error
    tokenizer = read_tokenizer(source)
    tensors, dropped, padding = without_padding(weights, manifest.tied, used_ids(config, tokenizer))
    provenance = Provenance(
        fingerprint=fingerprint,
        step=manifest.step,
        checkpoint=source.name,
        counters=manifest.counters,
        data=data,
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        dropped=dropped,
        tokenizer=tokenizer,
    )
    result = newest_result(source, fingerprint)
    with published(out, overwrite, EXPORT_MANIFEST) as folder:
        write_tokenizer(source, tokenizer, folder)
        _write_code_and_config(folder, config, tokenizer)
        entries = write_shards(tensors, folder, max_shard_bytes)
        write_card(folder, config, provenance, result)
        write_origin(
            folder,
            config,
            step=manifest.step,
            counters=manifest.counters,
            data=data,
            tokenizer_files=tokenizer_files,
            padding=padding,
        )
        _write_manifest(folder, provenance, entries)
        verify_export(folder, tensors)
    return {
        "out": str(out),
        "checkpoint": str(source),
        "fingerprint": fingerprint,
        "step": manifest.step,
        "parameters": provenance.num_parameters,
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        "evaluation": None if result is None else result["key"],
    }


def check_expressible(config: RunConfig) -> None:
    """See that the Python files of an export know every layer of a model.

    Raises:
        UsageError: they do not; lists all that they do not know.
    """
    problems = inexpressible(config.model)
    if problems:
        raise UsageError(
            f"the model {config.model.name} has no form in Transformers:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\n`longspan generate` and `longspan evaluate` take the checkpoint itself."
        )


def used_ids(config: RunConfig, tokenizer: Tokenizer) -> int:
    """Rows of the embedding that stand for something.

    Raises:
        UsageError: the model has fewer rows than the tokenizer has ids.
    """
    if tokenizer.size > config.model.vocab_size:
        raise UsageError(
            f"the checkpoint's model has {config.model.vocab_size} rows for the {tokenizer.size} ids of its tokenizer "
            f"{tokenizer.name}, so that it cannot have been trained with it. Use another checkpoint."
        )
    return tokenizer.size


def hf_config(config: RunConfig, tokenizer: Tokenizer) -> LongspanConfig:
    """The configuration of a run's model in its Hugging Face form, padding rows of the vocabulary left out."""
    model = config.model
    exported = LongspanConfig(
        vocab_size=used_ids(config, tokenizer),
        padded_vocab_size=model.vocab_size,
        hidden_size=model.dim,
        num_attention_heads=model.num_heads,
        head_dim=model.head_dim,
        intermediate_size=model.ffn_dim,
        window_tokens=model.window_tokens,
        blocks=[layer.model_dump(mode="json", exclude={"repeat"}) for layer in model.expanded_layers()],
        feedback=model.feedback,
        memory=None if model.memory is None else {"num_tokens": model.memory.num_tokens},
        training_tokens=config.data.segment_tokens,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.pad,
        dtype=torch.float32,
    )
    exported.architectures = [LongspanForCausalLM.__name__]
    exported.auto_map = {
        "AutoConfig": f"{CONFIGURATION_FILE.removesuffix('.py')}.{LongspanConfig.__name__}",
        "AutoModelForCausalLM": f"{MODELING_FILE.removesuffix('.py')}.{LongspanForCausalLM.__name__}",
    }
    return exported


def check_exported(folder: Path) -> None:
    """Raises UsageError if a folder holds no exported model."""
    if not is_exported(folder):
        raise UsageError(f"{folder} is no exported model: its config.json does not say model_type longspan.")


def load_exported(folder: Path, device: str | torch.device = "cpu") -> LongspanForCausalLM:
    """The model of an exported folder, in evaluation mode. Runs this package's code, not the folder's.

    Raises:
        UsageError: the folder is no export of Longspan, or of a model that this version does not know.
        CheckpointError: its weights cannot be read, or are not those of the model that config.json describes.
    """
    check_exported(folder)
    again = "Export the model again."
    try:
        with _quiet():
            loaded: Any = LongspanForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, SafetensorError, RuntimeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be loaded: {error}. {again}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder}/config.json describes no model of this version of Longspan: {error}") from error
    model, info = loaded
    problems = loading_problems(info)
    if problems:  # the library would go on with random numbers
        raise CheckpointError(f"{folder}: not the weights of its config.json: {'; '.join(problems)}. {again}")
    return model.to(device).eval()


def loading_problems(info: dict[str, Any]) -> list[str]:
    """What Transformers reports of a load that was not exact, a line for each kind: missing, left over, ..."""
    return [f"{kind}: {sorted(map(str, names))[:10]}" for kind, names in info.items() if names]


def verify_export(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Load an export strictly with its own Python files and compare every number with the source.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or of other numbers.
    """
    with _own_code(folder) as model_class, _quiet():
        model, info = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    problems = loading_problems(info)
    loaded = dict(model.named_parameters())
    problems += [f"not filled: {name}" for name in loaded.keys() - tensors.keys()]
    problems += [f"not used: {name}" for name in tensors.keys() - loaded.keys()]
    problems += [
        f"other numbers: {name}"
        for name in loaded.keys() & tensors.keys()
        if tensor_sha256(loaded[name].detach()) != tensor_sha256(tensors[name])
    ]
    if problems:
        raise CheckpointError(
            "the export does not load back to the checkpoint's weights, so it was not published:\n"
            + "\n".join(f"  {problem}" for problem in sorted(problems)[:20])
        )


def _write_code_and_config(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    for name, text in python_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    hf_config(config, tokenizer).save_pretrained(folder)
    specials = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    GenerationConfig(**specials).save_pretrained(folder)


def _write_manifest(folder: Path, provenance: Provenance, entries: list[dict[str, Any]]) -> None:
    manifest = {
        "format": "longspan-export",
        "longspan_version": __version__,
        "checkpoint": {
            "name": provenance.checkpoint,
            "step": provenance.step,
            "fingerprint": provenance.fingerprint,
        },
        "tokenizer": {name: getattr(provenance.tokenizer, name) for name in ("name", "kind", "size", "digest")},
        "num_parameters": provenance.num_parameters,
        "tensors": entries,
        "dropped": provenance.dropped,
    }
    (folder / EXPORT_MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _own_code(folder: Path) -> Iterator[Any]:
    """The model class that the folder's own Python files define, under a package name of its own."""
    package = f"longspan_export_{uuid.uuid4().hex[:8]}"
    spec = machinery.ModuleSpec(package, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules[package] = util.module_from_spec(spec)
    try:
        yield import_module(f"{package}.{MODELING_FILE.removesuffix('.py')}").LongspanForCausalLM
    finally:
        sys.dont_write_bytecode = writes_bytecode
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of the library: what matters is checked here."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
