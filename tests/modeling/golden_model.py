"""The authors' parameters under our names, so that tests compare the same function."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longspan.modeling.config import ModelConfig
from longspan.modeling.model import LanguageModel, build_model
from longspan.modeling.state import State

FOLDER = Path(__file__).resolve().parents[1] / "golden"
RECURRENT_LAYER = 1
GATES = {"swa": None, "bias_skip_S8": ("fixed", "skip"), "lstm_dual_S8": ("lstm", "dual")}

TOKEN_NAMES = {
    "norm.scale": "tbase/_kvq/pre_attn_layernorm/scale",
    "mixer.query.weight": "tbase/_kvq/queries_layer/kernel",
    "mixer.key.weight": "tbase/_kvq/keys_layer/kernel",
    "mixer.value.weight": "tbase/_kvq/values_layer/kernel",
    "mixer.output.weight": "tbase/post_attn_mlp/output_layer/kernel",
    "mixer.scale": "tbase/_kvq/attention_scale",
    "mixer.position_table": "relative_positions/rel_embedding",
    "ffn_norm.scale": "tbase/pre_ffn_layernorm/scale",
    "ffn.hidden.weight": "tbase/ffn/hidden0/kernel",
    "ffn.output.weight": "tbase/ffn/output_layer/kernel",
    "mixer.state_query.weight": "tbase/_kvq/queries2_layer/kernel",
    "mixer.state_scale": "tbase/attention_scale2",
}
STATE_NAMES = {
    "initial": "recurrent_initial_state",
    "norm.scale": "recurrent_tbase/_kvq/pre_attn_layernorm/scale",
    "ids": "recurrent_tbase/_kvq/position_embeddings",
    "key.weight": "recurrent_tbase/_kvq/keys_layer/kernel",
    "value.weight": "recurrent_tbase/_kvq/values_layer/kernel",
    "write.query.weight": "recurrent_tbase/_kvq/queries_layer/kernel",
    "write.token_query.weight": "recurrent_tbase/_kvq/queries2_layer/kernel",
    "write.self_scale": "recurrent_tbase/_kvq/attention_scale",
    "write.token_scale": "recurrent_tbase/attention_scale2",
    "write.output.weight": "recurrent_tbase/post_attn_mlp/output_layer/kernel",
    "write.ffn_norm.scale": "recurrent_tbase/pre_ffn_layernorm/scale",
    "write.ffn_hidden.weight": "recurrent_tbase/ffn/hidden0/kernel",
    "write.ffn_output.weight": "recurrent_tbase/ffn/output_layer/kernel",
}
for ours, theirs in (("gate", "post_attn_mlp"), ("ffn_gate", "ffn")):
    STATE_NAMES[f"write.{ours}.bias"] = f"recurrent_tbase/{theirs}/gate_bias"
    for direction in ("forget", "input"):
        STATE_NAMES[f"write.{ours}.{direction}_weight"] = f"recurrent_tbase/{theirs}/{direction}_gate/kernel"
        STATE_NAMES[f"write.{ours}.{direction}_bias"] = f"recurrent_tbase/{theirs}/{direction}_gate/bias"


def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / f"{name}.npz"))


def authors_name(ours: str) -> str:
    """The authors' parameter path of one of our parameters."""
    if ours == "embedding.weight":
        return "embed/embedding"
    if ours == "final_norm.scale":
        return "final_layernorm/scale"
    _, _, layer, rest = ours.split(".", 3)
    table, rest = (STATE_NAMES, rest.removeprefix("mixer.recurrent.")) if "recurrent" in rest else (TOKEN_NAMES, rest)
    return f"transformer{layer}/{table[rest]}"


def to_ours(array: np.ndarray, name: str) -> Tensor:
    """Their kernels are [in, out], ours [out, in]."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.T.contiguous() if name.endswith(("kernel",)) else tensor


def config_of(name: str) -> ModelConfig:
    layers: list[dict] = [{"mixer": "sliding_window"} for _ in range(3)]
    if GATES[name] is not None:
        gate, mode = GATES[name]
        layers[RECURRENT_LAYER] = {"mixer": "block_recurrent", "gate": gate, "mode": mode, "num_states": 8}
    return ModelConfig(
        vocab_size=40, dim=32, num_heads=2, head_dim=16, ffn_dim=64, window_tokens=8, dropout=0.0, layers=layers
    )


def golden_model(name: str) -> tuple[LanguageModel, dict[str, np.ndarray]]:
    """(model with the authors' parameters, the file)."""
    data = load(name)
    model = build_model(config_of(name))
    theirs = {ours: authors_name(ours) for ours, _ in model.named_parameters()}
    unused = {key for key in data if key.startswith("params/")} - {f"params/{path}" for path in theirs.values()}
    assert not unused, unused
    model.load_state_dict({ours: to_ours(data[f"params/{path}"], path) for ours, path in theirs.items()})
    return model, data


def golden_state(data: dict[str, np.ndarray], segment: str) -> State:
    """The authors' caches and recurrent state after a segment."""
    state: State = {}
    for layer in range(3):
        prefix = f"{segment}/state/transformer{layer}"
        entry: State = {
            "keys": torch.from_numpy(data[f"{prefix}/previous_keys"]),
            "values": torch.from_numpy(data[f"{prefix}/previous_values"]),
        }
        if f"{prefix}/recurrent_state" in data:
            entry["state"] = torch.from_numpy(data[f"{prefix}/recurrent_state"])
        state[f"layer{layer}"] = entry
    return state


def settings(name: str) -> dict:
    """The authors' configuration."""
    return json.loads(str(load(name)["config"]))
