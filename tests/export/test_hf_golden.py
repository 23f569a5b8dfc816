"""The Hugging Face form gives the numbers of the paper's authors, in both segments."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longspan.modeling.hf.configuration_longspan import LongspanConfig
from longspan.modeling.hf.mixers_longspan import distance_bucket
from longspan.modeling.hf.modeling_longspan import LongspanForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1] / "modeling"))
from golden_model import FOLDER, config_of, golden_model

TOLERANCE = 1e-5
WINDOW = 8


def hf_model(name: str) -> tuple[LongspanForCausalLM, dict[str, np.ndarray]]:
    """The authors' parameters in the Hugging Face form."""
    native, data = golden_model(name)
    config = config_of(name)
    model = LongspanForCausalLM(
        LongspanConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            num_attention_heads=config.num_heads,
            head_dim=config.head_dim,
            intermediate_size=config.ffn_dim,
            window_tokens=config.window_tokens,
            blocks=[layer.model_dump(exclude={"repeat"}) for layer in config.expanded_layers()],
        )
    )
    model.load_state_dict(native.state_dict(), strict=True)
    return model.eval(), data


@pytest.mark.parametrize("parts", [[32], [7, 1, 1, 14, 9], [1] * 32], ids=["whole", "parts", "tokens"])
@pytest.mark.parametrize("name", ["swa", "bias_skip_S8", "lstm_dual_S8"])
def test_both_segments(name: str, parts: list[int]) -> None:
    model, data = hf_model(name)
    first, second = (torch.from_numpy(data[f"seg{n}/tokens"]).long() for n in (1, 2))
    # row 0 goes on in the second segment, row 1 starts another document there
    documents = [(0, [first[:1], second[:1]]), (1, [first[1:]]), (1, [second[1:]])]
    segments = [["seg1", "seg2"], ["seg1"], ["seg2"]]
    for (row, pieces), names in zip(documents, segments, strict=True):
        cache = None
        for tokens, segment in zip(pieces, names, strict=True):
            logits = []
            for part in tokens.split(parts, dim=1):
                with torch.no_grad():
                    output = model(part, past_key_values=cache)
                cache = output.past_key_values
                logits.append(output.logits)
            expected = torch.from_numpy(data[f"{segment}/logits"][row])
            assert (torch.cat(logits, 1)[0] - expected).abs().max() <= TOLERANCE
            for index, layer in enumerate(cache.layers):
                for ours, theirs in (("keys", "previous_keys"), ("values", "previous_values")):
                    golden = torch.from_numpy(data[f"{segment}/state/transformer{index}/{theirs}"][row])
                    assert (layer.tensors[ours][0, :WINDOW] - golden).abs().max() <= TOLERANCE
                state = f"{segment}/state/transformer{index}/recurrent_state"
                assert (state in data) == ("state" in layer.tensors)
                if state in data:
                    golden = torch.from_numpy(data[state][row])
                    assert (layer.tensors["state"][0] - golden).abs().max() <= TOLERANCE


def test_buckets_of_distances() -> None:
    golden = np.load(FOLDER / "t5_buckets.npz")
    ours = distance_bucket(torch.from_numpy(golden["distance"]).long())
    assert torch.equal(ours, torch.from_numpy(golden["buckets"]).long())
