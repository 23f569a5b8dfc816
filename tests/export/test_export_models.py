"""Every model recipe in its Hugging Face form: the trainer's logits, at once, in parts, and on our kernels' code."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import exports
import model_recipes
import pytest
import torch
from model_recipes import STRUCTURES, WINDOW, exported, native, run_config
from torch import Tensor

from longspan.errors import UsageError
from longspan.modeling.hf import expressible
from longspan.modeling.hf.expressible import inexpressible
from longspan.modeling.hf.modeling_longspan import LongspanCache
from longspan.trainer.export import check_expressible

TOLERANCE = 1e-5  # of the largest logit
TOKENS = 5 * WINDOW + 3


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def tokens() -> Tensor:
    ids = torch.randint(0, 256, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 256
    return ids


def native_logits(model: Any, ids: Tensor) -> Tensor:
    reset = torch.zeros(ids.shape[0], -(-ids.shape[1] // model.quantum), dtype=torch.bool)
    reset[:, 0] = True
    return model(ids, model.init_state(ids.shape[0]), reset=reset)[0][..., :259]


def in_parts(model: Any, ids: Tensor, sizes: list[int]) -> Tensor:
    cache, logits = None, []
    for part in ids.split(sizes, dim=1):
        output = model(part, past_key_values=cache)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1)


def splits() -> list[list[int]]:
    """Cuts at W - 1, W, W + 1, 2W + 1, with single tokens behind them, and random cuts."""
    found = [[first, 1, 1, TOKENS - first - 2] for first in (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1)]
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        places = [0, *sorted(torch.randperm(TOKENS - 1, generator=generator)[:7].add(1).tolist()), TOKENS]
        found.append([b - a for a, b in itertools.pairwise(places)])
    return found


@pytest.mark.parametrize("name", model_recipes.RECIPES)
def test_every_recipe_can_be_exported(name: str) -> None:
    assert inexpressible(model_recipes.tiny(name)) == []
    check_expressible(run_config(name))
    assert model_recipes.structure(name) in STRUCTURES


@pytest.mark.parametrize("name", [*STRUCTURES.values(), *exports.MODELS])
@torch.inference_mode()
def test_logits_of_every_recipe(name: str) -> None:
    config = exports.run_config(name) if name in exports.MODELS else run_config(name)
    ids = tokens()
    model = native(config.model)
    wanted = native_logits(model, ids)
    assert wanted.abs().max() > 0.5
    made = exported(model, config, kernels="never")
    whole = made(ids).logits
    assert relative(whole, wanted) <= TOLERANCE
    for sizes in splits():
        assert relative(in_parts(made, ids, sizes), whole) <= TOLERANCE, sizes
    made = exported(model, config, kernels="always")
    assert relative(made(ids).logits, wanted) <= TOLERANCE
    assert relative(in_parts(made, ids, [3, 5, 2 * WINDOW, TOKENS - 24]), whole) <= TOLERANCE


@torch.inference_mode()
def test_the_kernels_run_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan.modeling import exported_kernels

    config = run_config("rec_fixed_skip_quickstart")
    calls: list[str] = []
    for name in ("window_blocks", "recurrent_blocks", "rms_norm"):
        right = getattr(exported_kernels, name)
        monkeypatch.setattr(
            exported_kernels, name, lambda *args, name=name, right=right: (calls.append(name), right(*args))[1]
        )
    for choice, seen in (
        ("auto", set()),
        ("never", set()),
        ("always", {"window_blocks", "recurrent_blocks", "rms_norm"}),
    ):
        calls.clear()
        exported(native(config.model), config, choice)(tokens())
        assert set(calls) == seen, choice


@torch.inference_mode()
def test_a_long_text_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than PART_TOKENS tokens run at once, and the results are those of the whole."""
    import longspan.modeling.hf.modeling_longspan as module

    config = run_config("hybrid_12l")
    model = exported(native(config.model), config)
    ids, mask = tokens(), torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :5] = 0
    whole = model(ids, attention_mask=mask).logits
    monkeypatch.setattr(module, "PART_TOKENS", 2 * WINDOW)
    widths: list[int] = []
    run = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda x, *args: (widths.append(x.shape[1]), run(x, *args))[1])
    for columns in (0, 1, 4, torch.tensor([3, 20, TOKENS - 4])):
        widths.clear()
        cache = LongspanCache(model.config)
        model(ids[:, :3], past_key_values=cache, attention_mask=mask[:, :3])
        rest = model(ids[:, 3:], attention_mask=mask, past_key_values=cache, logits_to_keep=columns).logits
        wanted = whole[:, 3:]
        wanted = wanted[:, columns] if isinstance(columns, Tensor) else wanted[:, -columns or None :]
        real = (mask[:, 3:][:, columns] if isinstance(columns, Tensor) else mask[:, 3:][:, -columns or None :]) != 0
        assert relative(rest[real], wanted[real]) <= TOLERANCE
        assert max(widths) <= 2 * WINDOW and len(widths) > 2


@torch.inference_mode()
@pytest.mark.parametrize("name", ["hybrid_12l", "rec_fixed_skip_quickstart", "feedback_lstm_single_quickstart"])
def test_going_on_from_a_saved_cache(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = run_config(name)
    model = exported(native(config.model), config)
    ids = tokens()[:1, :21]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(ids, **options)
    save_file(first.past_key_values.to_tensors(), tmp_path / "cache.safetensors")
    cache = LongspanCache.from_tensors(model.config, load_file(tmp_path / "cache.safetensors"))
    again = model.generate(first.sequences, past_key_values=cache, **options)
    straight = model.generate(ids, **{**options, "max_new_tokens": 16})
    assert again.sequences.tolist() == straight.sequences.tolist()
    with pytest.raises(ValueError, match="layers 0 to"):
        LongspanCache.from_tensors(model.config, {"99.seen": torch.zeros(1)})


@torch.inference_mode()
def test_two_thousand_tokens_with_and_without_a_cache() -> None:
    """By causality, greedy without a cache is what one pass over the result says at each place."""
    config = run_config("rec_fixed_skip_quickstart")
    model = exported(native(config.model), config)
    ids = model.generate(tokens()[:1, :5], max_new_tokens=2000, do_sample=False, eos_token_id=None)
    assert ids.shape[1] == 2005 and len(set(ids[0, 5:].tolist())) > 3
    logits = model(ids).logits[0, 4:-1]
    best = logits.argmax(-1)
    # where two logits are closer than rounding, either may win
    value = logits.max(-1).values - logits.gather(1, ids[0, 5:, None])[:, 0]
    assert (best == ids[0, 5:]).float().mean() > 0.999 and value.max() <= 1e-5 * logits.abs().max()


@pytest.mark.long
@pytest.mark.timeout(1200)
@torch.inference_mode()
@pytest.mark.parametrize("name", ["rec_fixed_skip_quickstart", "hybrid_12l"])
def test_two_thousand_tokens_computed_anew_each_time(name: str) -> None:
    """Greedy as `use_cache=False` does it: all tokens so far at each step, over 15 ends of a block."""
    config = run_config(name, window=128)
    model = exported(native(config.model), config)
    # no three tokens twice: an untrained model would say one for ever, which proves little
    options = {"max_new_tokens": 2000, "do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 3}
    ids = tokens()[:1, :5]
    widths: list[int] = []
    model.embedding.register_forward_hook(lambda module, given, made: widths.append(given[0].shape[1]))
    with_cache = model.generate(ids, **options)
    assert widths == [5] + [1] * 1999, "one token at a time"
    widths.clear()
    started = time.process_time()
    without = model.generate(ids, use_cache=False, **options)
    print(f"{name}: 2,000 tokens without a cache in {time.process_time() - started:.0f} s of CPU")
    assert widths == list(range(5, 2005)), "everything anew at each token"
    assert torch.equal(with_cache, without) and with_cache.shape[1] == 2005
    assert len(set(with_cache[0, 5:].tolist())) > 20, "no constant text"


def test_a_model_that_transformers_cannot_express(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(expressible.LAYERS, "linear_attention")
    monkeypatch.setitem(expressible.LAYERS, "block_recurrent", {"gate": ("lstm",)})
    with pytest.raises(UsageError, match="has no form in Transformers") as caught:
        check_expressible(run_config("hybrid_12l"))
    assert "'linear_attention'" in str(caught.value) and "gate = 'fixed'" in str(caught.value)
    assert "num_states = 5: no such option" in str(caught.value)
