"""What the README tells people to type and to write is accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from longspan.data_pipeline.corpus_config import CorpusConfig, corpus_problems
from longspan.modeling.config import ModelConfig
from longspan.trainer import recipes
from longspan.trainer.cli import build_parser

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for line in README.splitlines() if line.startswith("longspan ")]
RECIPES = {text.splitlines()[0]: yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    build_parser().parse_args(arguments)
    for name in arguments:
        if name.startswith("configs/"):
            recipes.find_recipe(name)


def test_own_corpus_is_a_recipe() -> None:
    config = recipes.validate(CorpusConfig, RECIPES["# my_corpus.yaml"], "README.md", corpus_problems)
    assert f"--set data.shards={config.out}\n" in README


def test_own_model_is_the_packaged_recipe() -> None:
    written = ModelConfig.model_validate(RECIPES["model:"]["model"])
    packaged = recipes.read_recipe("configs/model/rec_fixed_skip_12l.yaml")["model"]
    assert written.model_copy(update={"name": packaged["name"]}) == ModelConfig.model_validate(packaged)
