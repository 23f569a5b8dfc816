"""Every model recipe of the repository, its structure kept and its sizes made tiny."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from longspan.modeling.config import ModelConfig
from longspan.modeling.hf.modeling_longspan import LongspanForCausalLM
from longspan.modeling.model import LanguageModel, build_model
from longspan.trainer import recipes
from longspan.trainer.config import RunConfig

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "model"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
WINDOW = 8


def tiny(name: str, window: int = WINDOW) -> ModelConfig:
    """The recipe's layers, in its order and with its options; at most two of a kind in a row."""
    model = recipes.validate(ModelConfig, recipes.read_recipe(FOLDER / f"{name}.yaml")["model"], name)
    raw = model.model_dump(mode="json") | {
        "vocab_size": 384, "dim": 16, "num_heads": 2, "head_dim": 8, "ffn_dim": 24, "window_tokens": window,
    }  # fmt: skip
    for layer in raw["layers"]:
        layer["repeat"] = min(layer["repeat"], 2)
        small = {"num_states": 5, "context_tokens": 19}
        layer.update({field: value for field, value in small.items() if field in layer})
    if raw["memory"]:
        raw["memory"]["num_tokens"] = 3
    return ModelConfig.model_validate(raw)


def structure(name: str) -> str:
    """What two recipes share if they differ in name and size alone."""
    return json.dumps(tiny(name).model_dump(mode="json", exclude={"name", "dropout"}), sort_keys=True)


STRUCTURES = {structure(name): name for name in reversed(RECIPES)}


def run_config(name: str, window: int = WINDOW) -> RunConfig:
    """A run of the tiny form of a recipe."""
    raw = {
        "name": name,
        "model": tiny(name, window).model_dump(mode="json"),
        "data": {"shards": "corpora/none", "segment_tokens": 4 * window, "lanes": 2},
        "training": {"steps": 2},
        "tracking": {"enabled": False},
    }
    return recipes.validate(RunConfig, raw, name)


def native(config: ModelConfig) -> LanguageModel:
    """A model whose scales, norms and gates all matter, in evaluation mode."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
            if path.endswith("scale") and "mixer" in path and "norm" not in path:
                parameter.mul_(3)
    return model


def exported(model: LanguageModel, config: RunConfig, kernels: str = "auto") -> LongspanForCausalLM:
    """Its Hugging Face form, without the way over files."""
    from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
    from longspan.trainer.export import hf_config

    form = hf_config(config, ByteTokenizer())
    form.kernels = kernels
    made = LongspanForCausalLM(form)
    weights = dict(model.state_dict())
    weights["embedding.weight"] = weights["embedding.weight"][: form.vocab_size]
    made.load_state_dict(weights, strict=True)
    return made.eval()
