"""`longspan evaluate` on a GPU: numbers are those of the CPU, and memory does not grow with the document."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from longspan.modeling.config import ModelConfig
from longspan.modeling.model import build_model
from longspan.trainer import recipes
from longspan.trainer.evaluation.run import evaluate
from longspan.trainer.evaluation.scorer import Scorer
from longspan.trainer.evaluation.specs import load_spec
from longspan.trainer.evaluation.windows import Plan, ScoredDocument

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MODES = ["truncated", "carried", "reset", "state_reset", "swapped", "local"]


def test_scores_on_the_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    run = tiny_run.run_directory(tmp_path / "runs" / "tiny", tiny_run.config(tiny_run.corpus(tmp_path)))
    spec, checkpoint = load_spec(tiny_run.spec_file(tmp_path, modes=MODES)), run / "checkpoints" / "step-00000001"
    one = evaluate(checkpoint, spec, tmp_path / "cpu")
    other = evaluate(checkpoint, spec, tmp_path / "gpu", device="cuda")
    half = evaluate(checkpoint, spec.model_copy(update={"precision": "bf16"}), tmp_path / "gpu", device="cuda")
    assert len(one["scores"]) == len(other["scores"]) == len(half["scores"])
    for a, b, c in zip(one["scores"], other["scores"], half["scores"], strict=True):
        assert b["nats"] == pytest.approx(a["nats"], rel=2e-3)  # tensor cores may round fp32 products to tf32
        assert c["nats"] == pytest.approx(a["nats"], rel=0.05)
        assert (a["tokens"], a["bytes"]) == (b["tokens"], b["bytes"]) == (c["tokens"], c["bytes"])


def test_memory_does_not_grow_with_the_document() -> None:
    raw = recipes.read_recipe("configs/model/rec_fixed_skip_12l.yaml")["model"]
    small = {"dim": 256, "num_heads": 2, "ffn_dim": 512, "vocab_size": 384, "dropout": 0.0}
    model = build_model(ModelConfig.model_validate({**raw, **small})).to("cuda", torch.bfloat16).eval()
    plan = Plan(("carried", "state_reset"), (512,), (512,), 512, 256, batch_tokens=16384)
    peaks = []
    for length in (262144, 1048576):  # 16 segments and more: the first ones still find the allocator growing
        tokens = np.random.default_rng(0).integers(0, 256, length)
        document = ScoredDocument("d", tokens, np.ones(length, dtype=np.int64), [(60000, 60512)])
        Scorer(model, [document], plan, "cuda").run()
        torch.cuda.reset_peak_memory_stats()
        Scorer(model, [document], plan, "cuda").run()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.01 * peaks[0]
