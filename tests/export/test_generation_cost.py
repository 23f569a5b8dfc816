"""`generate` costs as much at token 50,000 as at token 5,000, in time and in memory: nothing is computed again."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from typing import Any

import exports
import pytest
import torch
from model_recipes import exported, native
from transformers import StoppingCriteria, StoppingCriteriaList

EARLY, LATE, SPAN = 5_000, 50_000, 200


class Clock(StoppingCriteria):
    """Notes the process's CPU time at each token."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seconds.append(time.process_time())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def resident_kib() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def cache_bytes(cache: Any) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in layer.tensors.values())


@pytest.mark.long
@pytest.mark.timeout(3000)
@torch.inference_mode()
def test_cost_of_a_token_does_not_grow() -> None:
    config = exports.run_config("fixed_skip")
    model = exported(native(config.model), config)
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    ids = torch.tensor([[256, *b"In the beginning"]])
    early = model.generate(ids, max_new_tokens=EARLY, **options)
    memory = {EARLY: resident_kib()}
    going_on = copy.deepcopy(early.past_key_values)
    late = model.generate(early.sequences, past_key_values=going_on, max_new_tokens=LATE - EARLY, **options)
    memory[LATE] = resident_kib()
    assert late.sequences.shape[1] == LATE + ids.shape[1] == late.past_key_values.get_seq_length() + 1
    assert cache_bytes(late.past_key_values) == cache_bytes(early.past_key_values)
    assert memory[LATE] - memory[EARLY] < 8 * 1024, "KiB; the ids themselves take some"

    def milliseconds(made: Any) -> float:
        clock, cache = Clock(), copy.deepcopy(made.past_key_values)
        more = {"max_new_tokens": SPAN, "stopping_criteria": StoppingCriteriaList([clock])}
        model.generate(made.sequences, past_key_values=cache, **more, **options)
        return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(clock.seconds[20:]))

    # in turns, since other work on the machine makes every token slower for a while
    times = [(milliseconds(early), milliseconds(late)) for _ in range(5)]
    at_early, at_late = (min(column) for column in zip(*times, strict=True))
    print(f"milliseconds of CPU per token: {at_early:.3f} from {EARLY:,} on, {at_late:.3f} from {LATE:,} on")
    print(f"memory of the process: {memory[EARLY] / 1024:.1f} MiB at {EARLY:,}, {memory[LATE] / 1024:.1f} at {LATE:,}")
    assert at_late < 1.15 * at_early


@torch.inference_mode()
def test_a_token_runs_the_layers_on_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is projected at each token of a block, its last one included, is one token and, at its end, the state."""
    config = exports.run_config("hybrid")
    model = exported(native(config.model), config)
    model(torch.full((1, 3), 65))
    cache = model(torch.arange(1, 14)[None]).past_key_values
    layer = model.backbone.layers[1].mixer
    widths: list[int] = []
    layer.key.register_forward_hook(lambda module, given, result: widths.append(given[0].shape[1]))
    layer.recurrent.key.register_forward_hook(lambda module, given, result: widths.append(-given[0].shape[1]))
    for token in range(2 * exports.WINDOW):
        cache = model(torch.tensor([[token]]), past_key_values=cache).past_key_values
    states = -config.model.layers[1].num_states
    assert widths.count(1) == 2 * exports.WINDOW and widths.count(states) == 2 and len(widths) == 2 * exports.WINDOW + 2
