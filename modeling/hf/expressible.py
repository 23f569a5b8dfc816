"""Which model configurations the Python files of an export know. A configuration beyond it is refused, not guessed."""

from __future__ import annotations

from longspan.modeling.config import ModelConfig

_ANY = None
LAYERS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "sliding_window": {"positions": ("t5", "rope")},
    "block_recurrent": {
        "gate": ("fixed", "lstm"),
        "mode": ("skip", "dual", "single"),
        "candidate": ("linear", "tanh"),
        "num_states": _ANY,
        "update": ("trained", "frozen"),
    },
    "linear_attention": {},
    "full_attention": {"context_tokens": _ANY},
}
_SIZES = {"name", "vocab_size", "dim", "num_heads", "head_dim", "ffn_dim", "window_tokens", "dropout"}
_WHOLE = _SIZES | {"layers", "feedback", "memory"}
_MEMORY = {"num_tokens", "norm_penalty"}


def inexpressible(model: ModelConfig) -> list[str]:
    """What of a configuration has no form in Transformers, a line each; empty if all has."""
    problems = [
        f"{name} = {getattr(model, name)!r}: not known"
        for name, field in type(model).model_fields.items()
        if name not in _WHOLE and getattr(model, name) != field.default
    ]
    for index, layer in enumerate(model.layers):
        fields = layer.model_dump(exclude={"repeat"})
        mixer = fields.pop("mixer")
        known = LAYERS.get(mixer)
        if known is None:
            problems.append(f"layers[{index}].mixer = {mixer!r}: known are {', '.join(LAYERS)}")
            continue
        for name, value in fields.items():
            values = known.get(name, ())
            if values is not None and value not in values:
                allowed = f"known are {', '.join(values)}" if values else "no such option is known"
                problems.append(f"layers[{index}].{name} = {value!r}: {allowed}")
    unknown = set() if model.memory is None else model.memory.model_dump().keys() - _MEMORY
    return [*problems, *(f"memory.{name}: not known" for name in sorted(unknown))]
