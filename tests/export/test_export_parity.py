"""Exports in a fresh process that cannot import longspan: the same numbers as the trainer's model, however decoded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import native_logits, native_model, run_config, run_directory

from longspan.data_pipeline.vocabulary import PAD
from longspan.trainer.export import export_checkpoint

TOLERANCE = 1e-5
STEP = 1
USED_IDS = PAD + 1
# one of each kind of layer and of stack; every recipe's logits and splits: test_export_models.py
MODELS = ("fixed_skip", "lstm_dual_tanh", "hybrid", "feedback_two", "memory_hybrid")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the fresh process wrote down about each model."""
    root = tmp_path_factory.mktemp("parity")
    folders = {}
    for name in MODELS:
        folders[name] = root / f"export-{name}"
        export_checkpoint(run_directory(root / f"run-{name}", name, (STEP,)), folders[name])
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    report = root / "report.json"
    script = Path(__file__).with_name("fresh_process.py")
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(report), *map(str, folders.values())],
        cwd=elsewhere,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(report.read_text())
    assert found["modules"] == []
    return {name: found[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_trainers(seen: dict[str, Any], name: str) -> None:
    tokens = torch.tensor(seen[name]["tokens"])
    native = native_logits(native_model(run_config(name), STEP), tokens)[..., :USED_IDS]
    exported = torch.tensor(seen[name]["logits"])
    assert exported.shape == native.shape
    assert (exported - native).abs().max() <= TOLERANCE
    divergence = torch.nn.functional.kl_div(
        exported.double().log_softmax(-1), native.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert divergence.max() < 1e-9
    assert native.abs().max() > 0.5, "logits too small for the comparison to mean much"


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_any_length_equal_the_whole(seen: dict[str, Any], name: str) -> None:
    worst = max(seen[name]["splits"].items(), key=lambda item: item[1])
    assert worst[1] <= TOLERANCE, worst


@pytest.mark.parametrize("name", MODELS)
def test_ways_to_decode_agree(seen: dict[str, Any], name: str) -> None:
    found = seen[name]["generation"]
    assert len(found["greedy"]) == len(found["drawn"]) == 21 + 12  # two edges of blocks among them
    assert found["greedy"] == found["greedy_without_cache"] == found["greedy_prefill_in_parts"]
    assert found["beams"] == found["beams_without_cache"]
    assert found["batch"] == found["alone"]
    assert all(token < USED_IDS for token in found["drawn"])


@pytest.mark.parametrize("name", MODELS)
def test_padding_anywhere_changes_nothing(seen: dict[str, Any], name: str) -> None:
    assert seen[name]["padding"]["whole"] <= TOLERANCE
    assert seen[name]["padding"]["steps"] <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_rows_with_padding_behind_them_go_on_from_their_last_token(seen: dict[str, Any], name: str) -> None:
    batch, alone = seen[name]["right_padded"]
    assert batch == alone and len(batch[2]) == 12


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_goes_on_from_a_cache(seen: dict[str, Any], name: str) -> None:
    straight, kept, loaded = seen[name]["going_on"]
    assert straight == kept == loaded


@pytest.mark.parametrize("name", MODELS)
def test_other_types(seen: dict[str, Any], name: str) -> None:
    found = seen[name]["bf16"]
    assert 0 < found["difference"] < 0.05
    assert found["states"] in ([], ["torch.float32"]) and found["auto"] == "torch.float32"


@pytest.mark.parametrize("name", MODELS)
def test_cache_can_be_reset_and_reordered(seen: dict[str, Any], name: str) -> None:
    found = seen[name]["cache"]
    for fact in ("reorder", "reset", "kept", "loss"):
        assert found[fact] <= TOLERANCE, fact
    assert found["tuple"] == 2 and found["no_cache"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("assisted", "ValueError: assisted generation is not supported with stateful models"),
        ("static", "ValueError: cache_implementation = 'static'"),
        ("foreign_cache", "TypeError: past_key_values is a DynamicCache"),
        ("crop", "ValueError: a Longspan cache cannot be cropped"),
        ("mask", "ValueError: attention_mask is [2, 1, 3, 3]"),
        ("rows", "ValueError: the cache holds 2 rows, input_ids has 1"),
        ("empty", "ValueError: input_ids is [2, 0]: give [rows, tokens] with one token at least"),
        ("nothing", "ValueError: input_ids is missing"),
        ("flat", "ValueError: input_ids is [43]"),
        ("attentions", "ValueError: output_attentions is not supported"),
        ("attentions_not_asked", "None"),
        ("hidden_states", "ValueError: output_hidden_states is not supported"),
        ("embeddings", "ValueError: inputs_embeds is not supported by a Longspan model: give input_ids"),
        ("embeddings_generate", "ValueError: inputs_embeds is not supported"),
        ("unknown", "TypeError: colour: a Longspan model takes no such argument"),
        ("read_already", "ValueError: past_key_values has read 43 columns, and the text has 43"),
        ("read_already_in_parts", "ValueError: past_key_values has read 43 columns, and the text has 43"),
    ],
)
def test_what_cannot_work_is_refused(seen: dict[str, Any], case: str, message: str) -> None:
    assert str(seen["fixed_skip"]["refusals"][case]).startswith(message)


def test_tokenizer_of_the_export(seen: dict[str, Any]) -> None:
    for text, ids in seen["fixed_skip"]["tokenizer"].items():
        assert ids == [256, *text.encode()]
