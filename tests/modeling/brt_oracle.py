"""The Block-Recurrent layer in NumPy fp64, written from the paper's equations, token by token and block by block.

Shares no code with the implementation: plain loops over rows, blocks and tokens, and the exact safe softmax.
"""

from __future__ import annotations

import math

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


def window_read(t: int, q: Array, keys: dict[int, Array], values: dict[int, Array], table: Array, a: Array, w: int):
    """Token t (q [H, Dh]) reads positions t-2w+1 .. t+w; all but t-w .. t-1 are masked; missing ones are null keys."""
    out = np.zeros_like(q)
    span = range(t - 2 * w + 1, t + w)
    for h in range(q.shape[0]):
        logits = np.full(len(span), -1e6)
        for i, s in enumerate(span):
            if 0 < t - s <= w:
                dot = q[h] @ keys[s][h] if s in keys else 0.0
                logits[i] = (dot + table[h, bucket(t - s)]) * abs(a[h])
        p = safe_softmax(logits)
        for i, s in enumerate(span):
            if s in values:
                out[h] += p[i] * values[s][h]
    return out


def read(q: Array, k: Array, v: Array, a: Array) -> Array:
    """q [L, H, Dh] reads all of k, v [K, H, Dh] without mask or bias: [L, H*Dh]."""
    out = np.zeros_like(q)
    for h in range(q.shape[1]):
        logits = q[:, h] @ k[:, h].T * abs(a[h])
        out[:, h] = np.stack([safe_softmax(row) for row in logits]) @ v[:, h]
    return out.reshape(q.shape[0], -1)


def gate(p: dict[str, Array], prefix: str, state: Array, out: Array, hidden: Array) -> Array:
    if f"{prefix}.bias" in p:
        g = sigmoid(p[f"{prefix}.bias"])
        return state * g + out * (1 - g)
    f = sigmoid(hidden @ p[f"{prefix}.forget_weight"].T + p[f"{prefix}.forget_bias"] + 1)
    i = sigmoid(hidden @ p[f"{prefix}.input_weight"].T + p[f"{prefix}.input_bias"] - 1)
    return state * f + out * i


def write(p: dict[str, Array], mode: str, state: Array, r: Array) -> Array:
    w = "recurrent.write"
    if mode == "single":
        hidden = np.maximum(r @ p[f"{w}.ffn_hidden.weight"].T, 0)
        return gate(p, f"{w}.ffn_gate", state, np.tanh(hidden @ p[f"{w}.ffn_output.weight"].T), hidden)
    state = gate(p, f"{w}.gate", state, r @ p[f"{w}.output.weight"].T, r)
    if mode == "skip":
        return state
    hidden = np.maximum(rms(state, p[f"{w}.ffn_norm.scale"]) @ p[f"{w}.ffn_hidden.weight"].T, 0)
    return gate(p, f"{w}.ffn_gate", state, hidden @ p[f"{w}.ffn_output.weight"].T, hidden)


def layer(p: dict[str, Array], mode: str, x: Array, num_heads: int, w: int) -> tuple[Array, Array]:
    """One row, one document from its start: x [T, D] -> (mixer output [T, D], states after each block [n, S, D])."""
    q, q2, k = (heads(x @ p[f"{n}.weight"].T, num_heads, True) for n in ("query", "state_query", "key"))
    v = heads(x @ p["value.weight"].T, num_heads, False)
    keys, values = dict(enumerate(k)), dict(enumerate(v))
    null = np.zeros_like(k[0])
    c, outputs, states = p["recurrent.initial"], [], []
    for begin in range(0, len(x), w):
        u = rms(c, p["recurrent.norm.scale"]) + p["recurrent.ids"]
        ks = heads(u @ p["recurrent.key.weight"].T, num_heads, True)
        vs = heads(u @ p["recurrent.value.weight"].T, num_heads, False)
        for t in range(begin, begin + w):
            own = window_read(t, q[t], keys, values, p["position_table"], p["scale"], w)
            seen = read(q2[t][None], ks, vs, p["state_scale"])[0]
            outputs.append(np.concatenate([own.reshape(-1), seen]) @ p["output.weight"].T)
        qs = heads(u @ p["recurrent.write.query.weight"].T, num_heads, True)
        qt = heads(u @ p["recurrent.write.token_query.weight"].T, num_heads, True)
        both = range(begin - w, begin + w)
        k2, v2 = (np.stack([source.get(s, null) for s in both]) for source in (keys, values))
        r = np.concatenate(
            [read(qs, ks, vs, p["recurrent.write.self_scale"]), read(qt, k2, v2, p["recurrent.write.token_scale"])], 1
        )
        c = write(p, mode, c, r)
        states.append(c)
    return np.stack(outputs), np.stack(states)
