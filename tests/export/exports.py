"""Checkpoints of tiny models of every architecture, for tests of exports, generation and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.modeling.model import LanguageModel, build_model
from longspan.trainer import recipes
from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.config import RunConfig

WINDOW = 8
SLIDING = {"mixer": "sliding_window"}
ROTARY = SLIDING | {"positions": "rope"}
LINEAR = {"mixer": "linear_attention"}
RECURRENT = {"mixer": "block_recurrent", "num_states": 5}


def full(context_tokens: int) -> dict[str, Any]:
    return {"mixer": "full_attention", "context_tokens": context_tokens}


MODELS: dict[str, dict[str, Any]] = {
    "sliding_window": {"layers": [SLIDING, SLIDING]},
    "linear_attention": {"layers": [SLIDING, LINEAR]},
    "full_attention": {"layers": [full(11), SLIDING]},
    "full_attention_4096": {"layers": [full(4096)]},
    "frozen": {"layers": [SLIDING, RECURRENT | {"update": "frozen"}]},
    "hybrid": {"layers": [SLIDING, RECURRENT, LINEAR, full(20)]},
    "memory": {"layers": [SLIDING, full(9)], "memory": {"num_tokens": 3}},
    "memory_hybrid": {"layers": [RECURRENT, LINEAR, SLIDING], "memory": {"num_tokens": 9, "norm_penalty": 0.1}},
    "rotary": {"layers": [ROTARY, RECURRENT]},
    "lstm_dual_tanh": {"layers": [RECURRENT | {"gate": "lstm", "mode": "dual", "candidate": "tanh"}]},
    "feedback": {"layers": [SLIDING, RECURRENT, SLIDING], "feedback": True},
    "feedback_two": {
        "layers": [RECURRENT | {"mode": "single"}, ROTARY, RECURRENT | {"gate": "lstm"}],
        "feedback": True,
    },
    "feedback_memory": {"layers": [SLIDING, RECURRENT], "feedback": True, "memory": {"num_tokens": 3}},
    **{
        f"{gate}_{mode}": {"layers": [SLIDING, RECURRENT | {"gate": gate, "mode": mode}]}
        for gate in ("fixed", "lstm")
        for mode in ("skip", "dual", "single")
    },
}


def run_config(name: str, shards: str = "corpora/none", vocab_size: int = 384) -> RunConfig:
    """A run of the tiny model `name`."""
    sizes = {"dim": 16, "num_heads": 2, "head_dim": 8, "ffn_dim": 24, "window_tokens": WINDOW, "dropout": 0.1}
    raw = {
        "name": f"tiny_{name}",
        "model": sizes | MODELS[name] | {"vocab_size": vocab_size},
        "data": {"shards": shards, "segment_tokens": 4 * WINDOW, "lanes": 2},
        "training": {"steps": 2},
        "tracking": {"enabled": False},
    }
    return recipes.validate(RunConfig, raw, name)


def native_model(config: RunConfig, seed: int = 0) -> LanguageModel:
    """A model whose scales, norms and gates all matter, in evaluation mode."""
    torch.manual_seed(seed)
    model = build_model(config.model).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
            if path.endswith("scale") and "mixer" in path and "norm" not in path:
                parameter.mul_(3)
    return model


def native_logits(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, 384] of whole documents."""
    reset = torch.zeros(tokens.shape[0], -(-tokens.shape[1] // model.quantum), dtype=torch.bool)
    reset[:, 0] = True
    with torch.no_grad():
        return model(tokens, model.init_state(tokens.shape[0]), reset=reset)[0]


def run_directory(
    folder: Path, name: str, steps: tuple[int, ...] = (1,), tokenizer: Tokenizer | None = None, vocab_size: int = 384
) -> Path:
    """RUN with one checkpoint a step; the weights of step k are drawn with seed k. `tokenizer`: of its corpus."""
    config = run_config(name, vocab_size=vocab_size)
    plan, files = {"manifest_digest": "c0" * 32}, {}
    if tokenizer is not None:
        tokenizer.save(folder.parent / f"{folder.name}-tokenizer")
        files = {path.name: path.read_bytes() for path in (folder.parent / f"{folder.name}-tokenizer").iterdir()}
        plan["vocabulary_digest"] = tokenizer.digest
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(recipes.dump(config), encoding="utf-8")
    store = CheckpointStore(folder / "checkpoints", keep_last=len(steps))
    for step in steps:
        state = RunState(
            step=step,
            weights={path: tensor.detach() for path, tensor in native_model(config, step).named_parameters()},
            optimizer={},
            lanes={},
            lane_start=0,
            lane_stop=2,
            data={"plan": plan},
            rng={},
            counters={"tokens": 1234 * step},
            config_yaml=recipes.dump(config),
            tokenizer=files,
        )
        saved = store.save(state)
        assert saved.ok, saved.error
    return folder
