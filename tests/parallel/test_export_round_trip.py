"""Trained on several ranks, saved, exported, loaded, imported: the same bits all the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_parallel_training import run_ranks, train_here
from tiny_training import build_tiny_corpus

from longspan.trainer.checkpoint.load import load_model
from longspan.trainer.export import export_checkpoint, load_exported
from longspan.trainer.export_import import import_export


@pytest.mark.long
@pytest.mark.parametrize("dp", [1, 2])
def test_tensor_parallel_and_zero_2(tmp_path: Path, dp: int) -> None:
    shards = build_tiny_corpus(tmp_path / "corpus")
    sizes = {"parallel__tp": 2, "parallel__zero_stage": 2, "training__steps": 3, "training__micro_batch_lanes": 2}
    run_ranks(train_here, 2 * dp, str(shards), str(tmp_path / "run"), sizes, False)
    trained = dict(load_model(tmp_path / "run").model.named_parameters())
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    exported = dict(load_exported(tmp_path / "export").named_parameters())
    import_export(tmp_path / "export", tmp_path / "back")
    back = dict(load_model(tmp_path / "back").model.named_parameters())
    assert trained.keys() == exported.keys() == back.keys()
    for name, tensor in trained.items():
        assert torch.equal(back[name], tensor), name
        assert torch.equal(exported[name], tensor[: exported[name].shape[0]]), name
    assert exported["embedding.weight"].shape[0] < trained["embedding.weight"].shape[0]
