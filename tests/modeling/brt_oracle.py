"""Block-Recurrent layers and models in NumPy fp64, written from the paper's equations: one document, block by block.

Shares no code with the implementation: plain loops over blocks, layers and tokens, and the exact safe softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


def rms(x: Array, scale: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def heads(x: Array, num: int, normalise: bool) -> Array:
    """[L, H*Dh] -> [L, H, Dh], each head of unit length if asked."""
    x = x.reshape(x.shape[0], num, -1)
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) if normalise else x


def safe_softmax(logits: Array, floor: float = -1000.0) -> Array:
    """A fully masked row gives 0."""
    top = max(logits.max(), floor)
    e = np.exp(logits - top)
    return e / (e.sum() + np.exp(floor - top))


def bucket(distance: int) -> int:
    if distance < 16:
        return distance
    return min(31, 16 + math.floor(math.log(distance / 16) / math.log(128 / 16) * 16))


def turned(x: Array, place: int) -> Array:
    """Rotary position of one token: [H, Dh], the halves of a head are the pairs."""
    half = x.shape[-1] // 2
    angle = place * 10000.0 ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)


def window_read(t: int, q: Array, keys: list[Array], values: list[Array], table: Array | None, a: Array, w: int):
    """Token t (q [H, Dh]) reads positions t-2w+1 .. t+w; all but t-w .. t-1 are masked; missing ones are null keys.

    Positions are a table of biases [H, 32], or rotary without one.
    """
    out = np.zeros_like(q)
    span = range(t - 2 * w + 1, t + w)
    for h in range(q.shape[0]):
        logits = np.full(len(span), -1e6)
        for i, s in enumerate(span):
            if 0 < t - s <= w:
                k = keys[s] if s >= 0 else np.zeros_like(q)
                dot = (q @ k.T)[h, h] if table is not None else (turned(q, t) @ turned(k, s).T)[h, h]
                logits[i] = (dot + (0 if table is None else table[h, bucket(t - s)])) * abs(a[h])
        p = safe_softmax(logits)
        for i, s in enumerate(span):
            if 0 <= s < len(values):
                out[h] += p[i] * values[s][h]
    return out


def read(q: Array, k: Array, v: Array, a: Array) -> Array:
    """q [L, H, Dh] reads all of k, v [K, H, Dh] without mask or bias: [L, H*Dh]."""
    out = np.zeros_like(q)
    for h in range(q.shape[1]):
        logits = q[:, h] @ k[:, h].T * abs(a[h])
        out[:, h] = np.stack([safe_softmax(row) for row in logits]) @ v[:, h]
    return out.reshape(q.shape[0], -1)


def gate(p: dict[str, Array], prefix: str, state: Array, out: Array, hidden: Array, tanh: bool) -> Array:
    out = np.tanh(out) if tanh else out
    if f"{prefix}.bias" in p:
        g = sigmoid(p[f"{prefix}.bias"])
        return state * g + out * (1 - g)
    f = sigmoid(hidden @ p[f"{prefix}.forget_weight"].T + p[f"{prefix}.forget_bias"] + 1)
    i = sigmoid(hidden @ p[f"{prefix}.input_weight"].T + p[f"{prefix}.input_bias"] - 1)
    return state * f + out * i


def write(p: dict[str, Array], mode: str, state: Array, r: Array, tanh: bool = False) -> Array:
    w = "recurrent.write"
    if mode == "single":
        hidden = np.maximum(r @ p[f"{w}.ffn_hidden.weight"].T, 0)
        return gate(p, f"{w}.ffn_gate", state, hidden @ p[f"{w}.ffn_output.weight"].T, hidden, True)
    state = gate(p, f"{w}.gate", state, r @ p[f"{w}.output.weight"].T, r, tanh)
    if mode == "skip":
        return state
    hidden = np.maximum(rms(state, p[f"{w}.ffn_norm.scale"]) @ p[f"{w}.ffn_hidden.weight"].T, 0)
    return gate(p, f"{w}.ffn_gate", state, hidden @ p[f"{w}.ffn_output.weight"].T, hidden, tanh)


@dataclass
class Memory:
    """What one layer remembers of a document: every key and value so far, and the state, if any."""

    keys: list[Array] = field(default_factory=list)  # [H, Dh] each, normalised
    values: list[Array] = field(default_factory=list)
    state: Array | None = None  # [S, D]


def offered(p: dict[str, Array], state: Array, num_heads: int) -> tuple[Array, Array, Array]:
    """(u [S, D], keys, values [S, H, Dh]) of a state."""
    u = rms(state, p["recurrent.norm.scale"]) + p["recurrent.ids"]
    keys = heads(u @ p["recurrent.key.weight"].T, num_heads, True)
    return u, keys, heads(u @ p["recurrent.value.weight"].T, num_heads, False)


def tokens_of_block(p: dict[str, Array], x: Array, memory: Memory, seen: tuple | None, num_heads: int, w: int) -> Array:
    """Mixer output [L, D] of a block x [L, D]; `seen`: keys and values of the state that its tokens read, or None."""
    begin = len(memory.keys)
    q, k = (heads(x @ p[f"{n}.weight"].T, num_heads, True) for n in ("query", "key"))
    memory.keys += list(k)
    memory.values += list(heads(x @ p["value.weight"].T, num_heads, False))
    outputs = []
    for i in range(len(x)):
        table = p.get("position_table")
        parts = [window_read(begin + i, q[i], memory.keys, memory.values, table, p["scale"], w).reshape(-1)]
        if seen is not None:
            q2 = heads(x[i : i + 1] @ p["state_query.weight"].T, num_heads, True)
            parts.append(read(q2, *seen, p["state_scale"])[0])
        outputs.append(np.concatenate(parts) @ p["output.weight"].T)
    return np.stack(outputs)


def state_after_block(p: dict[str, Array], mode: str, memory: Memory, num_heads: int, w: int, tanh: bool) -> Array:
    """The state [S, D] after a whole block whose keys and values `memory` has already."""
    u, ks, vs = offered(p, memory.state, num_heads)
    qs = heads(u @ p["recurrent.write.query.weight"].T, num_heads, True)
    qt = heads(u @ p["recurrent.write.token_query.weight"].T, num_heads, True)
    null = [np.zeros_like(memory.keys[0])] * (2 * w)
    k2, v2 = (np.stack((null + seen)[-2 * w :]) for seen in (memory.keys, memory.values))
    own = read(qs, ks, vs, p["recurrent.write.self_scale"])
    tokens = read(qt, k2, v2, p["recurrent.write.token_scale"])
    return write(p, mode, memory.state, np.concatenate([own, tokens], 1), tanh)


def layer(p: dict[str, Array], mode: str, x: Array, num_heads: int, w: int) -> tuple[Array, Array]:
    """One document from its start: x [T, D] -> (mixer output [T, D], states after each block [n, S, D])."""
    memory, outputs, states = Memory(state=p["recurrent.initial"]), [], []
    for begin in range(0, len(x), w):
        seen = offered(p, memory.state, num_heads)[1:]
        outputs.append(tokens_of_block(p, x[begin : begin + w], memory, seen, num_heads, w))
        memory.state = state_after_block(p, mode, memory, num_heads, w, False)
        states.append(memory.state)
    return np.concatenate(outputs), np.stack(states)


def model(p: dict[str, Array], config: dict, tokens: Array) -> tuple[Array, list[Memory]]:
    """A whole model over one document from its start, every layer block by block.

    Args:
        p: parameters by name.
        config: `model_dump` of the configuration; window and recurrent layers only.
        tokens: int [T].

    Returns:
        logits [T, V]; what each layer remembers in the end.
    """
    num_heads, w = config["num_heads"], config["window_tokens"]
    layers = [layer for layer in config["layers"] for _ in range(layer["repeat"])]
    own = [{n.removeprefix(f"backbone.layers.{i}."): x for n, x in p.items() if f"layers.{i}." in n} for i in range(99)]
    mixers = [{n.removeprefix("mixer."): x for n, x in of.items() if n.startswith("mixer.")} for of in own]
    memories = [Memory(state=mixer.get("recurrent.initial")) for mixer, _ in zip(mixers, layers, strict=False)]
    logits = []
    for begin in range(0, len(tokens), w):
        x = p["embedding.weight"][tokens[begin : begin + w]]
        # what tokens read of states is settled before any layer sees the block
        seen = [None if m.state is None else offered(mixers[i], m.state, num_heads)[1:] for i, m in enumerate(memories)]
        if config["feedback"]:
            source = [pair for pair in seen if pair is not None][-1]
            seen = [source if pair is None else pair for pair in seen]
        for i, entry in enumerate(layers):
            x = x + tokens_of_block(mixers[i], rms(x, own[i]["norm.scale"]), memories[i], seen[i], num_heads, w)
            hidden = np.maximum(rms(x, own[i]["ffn_norm.scale"]) @ own[i]["ffn.hidden.weight"].T, 0)
            x = x + hidden @ own[i]["ffn.output.weight"].T
            if entry.get("update") == "trained" and len(x) == w:
                tanh = entry["candidate"] == "tanh"
                memories[i].state = state_after_block(mixers[i], entry["mode"], memories[i], num_heads, w, tanh)
        logits.append(rms(x, p["final_norm.scale"]) @ p["embedding.weight"].T / math.sqrt(config["dim"]))
    return np.concatenate(logits), memories
