"""Parameter counts."""

from __future__ import annotations

from torch import nn

from longspan.modeling.model import LanguageModel

_NOT_COUNTED = ("embedding.weight", "scale", "position_table")


def num_parameters(model: nn.Module) -> int:
    """All parameters, the tied embedding once."""
    return sum(parameter.numel() for parameter in model.parameters())


def paper_count(model: LanguageModel) -> int:
    """Parameters as papers count them: without embedding, norm scales, attention scales and position tables."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.endswith(_NOT_COUNTED))
