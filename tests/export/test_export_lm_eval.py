"""lm-eval on an exported folder, offline: its rolling bits per byte are those of `longspan evaluate`, mode carried."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install 'longspan[lm-eval]'")

sys.path.append(str(Path(__file__).resolve().parents[1] / "evaluation"))
import tiny_run

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.modeling.hf.harness import LongspanHarness
from longspan.trainer import recipes
from longspan.trainer.evaluation.run import evaluate
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.export import export_checkpoint

TASKS = Path(__file__).resolve().parents[2] / "configs" / "lm_eval"
HARNESS = [sys.executable, "-m", "longspan.modeling.hf.harness", "run", "--model", "longspan"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lm_eval")
    corpus = tiny_run.corpus(root)
    run = tiny_run.run_directory(root / "runs" / "tiny", tiny_run.config(corpus))
    export_checkpoint(run, root / "export")
    return {"root": root, "corpus": corpus, "run": run, "export": root / "export"}


def text_of(places: dict[str, Path], document: str) -> str:
    manifest = Manifest.load(places["corpus"])
    tokens = DocumentReader(manifest).tokens(manifest.document(document))
    return bytes(tokens[1:-1].tolist()).decode()


def harness_results(folder: Path, places: dict[str, Path], texts: list[str]) -> tuple[float, list[float]]:
    """Bits per byte as lm-eval's own command line reports them, and the log-likelihood of each text."""
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "documents.jsonl").write_text(lines)
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [*HARNESS, "--model_args", f"pretrained={places['export']},part_tokens=37", "--tasks", "local_documents",
         "--include_path", str(TASKS), "--output_path", str(folder / "out"), "--batch_size", "2",
         "--device", "cpu", "--log_samples"],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    nats = {sample["doc_id"]: float(sample["bits_per_byte"][0]) for sample in found}
    rate = json.loads(report.read_text())["results"]["local_documents"]["bits_per_byte,none"]
    return rate, [nats[index] for index in range(len(texts))]


def test_rolling_bits_per_byte_are_those_of_carried(places: dict[str, Path], tmp_path: Path) -> None:
    spec = recipes.load(EvaluationSpec, tiny_run.spec_file(tmp_path, spans_per_document=1, span_bytes=320))
    result = evaluate(places["run"] / "checkpoints" / "step-00000001", spec)
    spans = {entry["id"]: entry["spans"][0] for entry in result["data"]["documents"]}
    ends = [text_of(places, name)[:stop] for name, (_, stop) in spans.items()]
    starts = [text_of(places, name)[:start] for name, (start, _) in spans.items()]
    rate, nats = harness_results(tmp_path / "harness", places, [*ends, *starts])
    num_bytes = sum(map(len, [*ends, *starts]))
    assert rate == pytest.approx(-math.fsum(nats) / num_bytes / math.log(2), abs=1e-9)
    # the harness scores from the first byte on: what lies before the spans is taken away again
    count = len(ends)
    scored = math.fsum(nats[count:]) - math.fsum(nats[:count])
    assert sum(map(len, ends)) - sum(map(len, starts)) == result["target_bytes"] == 3 * 320
    rate = scored / result["target_bytes"] / math.log(2)
    assert rate == pytest.approx(result["carried"]["bits_per_byte"], abs=1e-4)


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


@torch.inference_mode()
def test_adapter(places: dict[str, Path]) -> None:
    """Parts and batches change nothing; continuations follow their context; nothing is cut."""
    text = text_of(places, "t/b.txt")
    small = LongspanHarness(str(places["export"]), device="cpu", batch_size=3, part_tokens=7)
    whole = LongspanHarness(str(places["export"]), device="cpu", part_tokens=10**6)
    texts = [text, text[:5], text[:300], text[100:101]]
    rolling = whole.loglikelihood_rolling([Request(part) for part in texts])
    assert small.loglikelihood_rolling([Request(part) for part in texts]) == pytest.approx(rolling, rel=1e-5)
    ids = torch.tensor([[256, *text.encode()]])
    logits = whole.model(ids[:, :-1]).logits.double().log_softmax(-1)
    assert rolling[0] == pytest.approx(logits.gather(2, ids[:, 1:, None]).sum().item(), rel=1e-6)
    (pair,) = small.loglikelihood([Request(text[:200], text[200:300])])
    head = small.loglikelihood_rolling([Request(text[:200])])[0]
    assert pair[0] == pytest.approx(rolling[2] - head, abs=1e-3) and pair[1] is False
    made = small.generate_until([Request(text[:50], {"until": ["\0\0\0"], "max_gen_toks": 9})])[0]
    again, greedy = small.loglikelihood([Request(text[:50], made)])[0]
    assert math.isfinite(again) and (greedy or "\ufffd" in made)
    assert small.max_length >= 2**30 and small.prefix_token_id == 256 and small.eot_token_id == 257


def test_a_planted_loss_of_the_state_is_seen(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = LongspanHarness(str(places["export"]), device="cpu", part_tokens=16)
    text = text_of(places, "t/a.txt")
    right = model.loglikelihood_rolling([Request(text)])[0]
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda ids, **more: forward(ids, **{**more, "past_key_values": None}))
    lost = model.loglikelihood_rolling([Request(text)])[0]
    assert abs(lost - right) / (len(text) * math.log(2)) > 1e-3
