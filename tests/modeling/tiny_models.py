"""Tiny models of every architecture, with parameters that make every path count."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.modeling.config import ModelConfig
from longspan.modeling.model import LanguageModel, build_model

WINDOW = 4
VOCAB = 17

SLIDING = {"mixer": "sliding_window"}
ROTARY = SLIDING | {"positions": "rope"}
LINEAR = {"mixer": "linear_attention"}
FULL = {"mixer": "full_attention", "context_tokens": 6}
RECURRENT = {"mixer": "block_recurrent", "num_states": 3}


def recurrent(gate: str, mode: str) -> dict:
    return RECURRENT | {"gate": gate, "mode": mode}


# a new mixer joins all laws with one line here
MODELS: dict[str, dict] = {
    "sliding_window": {"layers": [SLIDING, SLIDING]},
    "fixed_skip": {"layers": [SLIDING, recurrent("fixed", "skip")]},
    "fixed_dual": {"layers": [recurrent("fixed", "dual")]},
    "fixed_single": {"layers": [recurrent("fixed", "single")]},
    "lstm_skip": {"layers": [recurrent("lstm", "skip")]},
    "lstm_dual": {"layers": [recurrent("lstm", "dual"), SLIDING]},
    "lstm_single": {"layers": [recurrent("lstm", "single")]},
    "lstm_skip_tanh": {"layers": [recurrent("lstm", "skip") | {"candidate": "tanh"}]},
    "two_recurrent": {"layers": [recurrent("fixed", "skip"), ROTARY, recurrent("fixed", "single")]},
    "feedback": {"layers": [SLIDING, recurrent("fixed", "dual"), SLIDING], "feedback": True},
    "feedback_two": {"layers": [recurrent("lstm", "single"), RECURRENT, ROTARY], "feedback": True},
    "frozen": {"layers": [RECURRENT | {"update": "frozen"}]},
    "linear_attention": {"layers": [LINEAR, LINEAR]},
    "full_attention": {"layers": [FULL, FULL]},
    "hybrid": {"layers": [LINEAR, FULL, RECURRENT, SLIDING]},
    "memory": {"layers": [SLIDING, SLIDING], "memory": {"num_tokens": 2, "norm_penalty": 0.1}},
    "memory_hybrid": {"layers": [FULL, RECURRENT, LINEAR], "memory": {"num_tokens": 3, "norm_penalty": 0.1}},
}


def tiny_config(name: str, **changes: object) -> ModelConfig:
    sizes = {
        "vocab_size": VOCAB,
        "dim": 16,
        "num_heads": 2,
        "head_dim": 8,
        "ffn_dim": 24,
        "window_tokens": WINDOW,
        "dropout": 0.0,
    }
    return ModelConfig(**(sizes | MODELS[name] | changes))


def tiny_model(name: str, dtype: torch.dtype = torch.float64, **changes: object) -> LanguageModel:
    """A model whose scales and norms are not all one, so that a missing factor shows; bf16-representable values."""
    torch.manual_seed(0)
    model = build_model(tiny_config(name, **changes))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("scale"):
                parameter.copy_(1 + 0.25 * torch.randn_like(parameter))
                if "mixer" in path and "norm" not in path:
                    parameter.mul_(3)
            parameter.copy_(parameter.bfloat16())
    return model.to(dtype)


def random_tokens(rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def no_reset(model: LanguageModel, rows: int, tokens: int) -> Tensor:
    return torch.zeros(rows, -(-tokens // model.quantum), dtype=torch.bool)
