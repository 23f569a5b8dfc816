"""Two ways to load an export, with the package and with the folder's own code: the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from exports import run_directory

from longspan.trainer.export import export_checkpoint

SCRIPT = """
import json, sys
route, folder = sys.argv[1:]
if route == "package":
    import longspan.modeling.hf
import torch
from transformers import AutoConfig, AutoModelForCausalLM
trust = route != "package"
config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
ids = torch.arange(90).reshape(2, 45) % 256
with torch.no_grad():
    logits = model(ids).logits
    text = model.generate(ids[:1], max_new_tokens=20, do_sample=False, eos_token_id=None)[0].tolist()
place = type(model).__module__, type(config).__module__
print(json.dumps({"bits": logits.view(torch.int32).flatten().tolist(), "text": text, "place": place}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("routes")
    export_checkpoint(run_directory(root / "run", "hybrid"), root / "out")
    return root / "out"


def test_both_routes_give_the_same_bits(folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    found = {}
    for route in ("package", "folder"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, route, str(folder)],
            env=environment, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found[route] = json.loads(done.stdout.splitlines()[-1])
    assert all(place.startswith("longspan.modeling.hf.") for place in found["package"]["place"])
    assert all(place.startswith("transformers_modules.") for place in found["folder"]["place"])
    assert found["package"]["bits"] == found["folder"]["bits"]
    assert found["package"]["text"] == found["folder"]["text"]
