"""Mixers of the Hugging Face form: pure torch, without dropout, made for decoding.

A mixer takes a *piece*: tokens that lie in one block of their document, at a phase of the block that may differ
from row to row. What it carries is a dictionary of tensors, batch first; it returns a new one and changes none.

Letters in shapes: B rows, P tokens of a piece, W window (block length), H heads, K width of a head,
S state vectors, D width of the residual stream.
"""

import importlib
import math
from functools import cache, cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -1e6
NUM_BUCKETS, MAX_DISTANCE = 32, 128
KERNEL_FORM = 1  # of what the module below takes and gives


@cache
def installed_kernels() -> Any:
    """Longspan's tuned forms of norms and of mixers over whole blocks; None without the package, or with another one
    than these files know."""
    try:
        kernels = importlib.import_module("longspan.modeling.exported_kernels")
    except ImportError:
        return None
    return kernels if kernels.FORM == KERNEL_FORM else None


def kernels_for(x: Tensor, choice: str) -> Any:
    """The kernels to run on x, or None: "auto" takes them on a GPU, "always" and "never" say it themselves."""
    return installed_kernels() if choice == "always" or (choice == "auto" and x.is_cuda) else None


class Piece:
    """Tokens that lie in one block of their row: `take` of each row, the first at position `phase` of its block.

    Rows in step share one row of the index tensors, which then broadcast.
    """

    def __init__(self, seen: Tensor, take: Tensor, window: int, device: torch.device) -> None:
        """seen, take: int64 [B] on the CPU, tokens of each row before and in this piece."""
        phase = seen % window
        self.width = int(take.max())
        self.ends = bool((phase + take == window).any())
        if bool((take == self.width).all()) and bool((seen == seen[0]).all()):
            seen, take, phase = seen[:1], take[:1], phase[:1]
        self.seen, self.take, self.phase = seen.to(device), take.to(device), phase.to(device)
        self.ended = self.phase + self.take == window  # [1 or B]: the piece completes a block
        self.steps = torch.arange(self.width, device=device)
        self.valid = self.steps < self.take[:, None]  # [1 or B, P]
        self.window = window

    @cached_property
    def distance(self) -> Tensor:
        """From each of the 2W keys, block before and current one, to each token: int64 [1 or B, P, 2W]."""
        places = (self.window + self.phase)[:, None] + self.steps
        return places[..., None] - torch.arange(2 * self.window, device=places.device)

    @cached_property
    def unseen(self) -> Tensor:
        """Keys out of a token's window: bool [1 or B, 1, P, 2W]."""
        return ((self.distance <= 0) | (self.distance > self.window))[:, None]

    @cached_property
    def buckets(self) -> Tensor:
        """Buckets of the distances: int64 [1 or B, P, 2W]."""
        return distance_bucket(self.distance.clamp(0, self.window))

    def append(self, buffer: Tensor, new: Tensor, start: Tensor) -> Tensor:
        """`buffer` [B, J, ...] with the tokens of `new` [B, P, ...] from index `start` [1 or B] on."""
        source = torch.arange(buffer.shape[1], device=new.device) - start[:, None]
        fresh = (source >= 0) & (source < self.take[:, None])
        return torch.where(align(fresh, buffer), take_along(new, source.clamp(0, self.width - 1)), buffer)

    def where_ended(self, after: Tensor, before: Tensor) -> Tensor:
        """`after` in the rows whose block is complete now, else `before`."""
        return torch.where(align(self.ended, before), after, before)


def align(mask: Tensor, tensor: Tensor) -> Tensor:
    """`mask` with as many dimensions as `tensor`, its own first."""
    return mask.reshape(mask.shape + (1,) * (tensor.dim() - mask.dim()))


def take_along(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, ...] at index [1 or B, N] -> [B, N, ...]."""
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    return x.gather(1, align(index, x).expand(*index.shape, *x.shape[2:]))


def distance_bucket(distance: Tensor) -> Tensor:
    """T5 bucket of a distance n >= 0: n below 16, then logarithmic up to 128, 32 buckets in all."""
    exact = NUM_BUCKETS // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)
    coarse = (exact + (ratio * (NUM_BUCKETS - exact)).floor().long()).clamp(max=NUM_BUCKETS - 1)
    return torch.where(distance < exact, distance, coarse)


def unit(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, times |scale| a head, computed in float32.

    Args:
        x: [..., H, K].
        scale: [H] or None.
    """
    wide = x.float()
    factor = torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
    factor = factor if scale is None else factor * scale.float().abs()[:, None]
    return (wide * factor).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k + bias) v. q [B,P,H,K], k, v [B,J,H,K], bias [1 or B, H, P, J] or None -> [B, P, H*K]."""
    logits = torch.einsum("bphk,bjhk->bhpj", q, k).float()
    weights = torch.softmax(logits if bias is None else logits + bias, -1)
    return torch.einsum("bhpj,bjhk->bphk", weights.to(v.dtype), v).flatten(2)


class Norm(nn.Module):
    """Root-mean-square normalisation, statistics in float32."""

    def __init__(self, dim: int, kernels: str = "never") -> None:
        """dim: width of the last dimension. kernels: see `kernels_for`."""
        super().__init__()
        self.scale, self.kernels = nn.Parameter(torch.ones(dim)), kernels

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in the type of x."""
        kernels = kernels_for(x, self.kernels)
        if kernels is not None:
            return cast(Tensor, kernels.rms_norm(x, self.scale))
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * self.scale.float()).to(x.dtype)


class FeedForward(nn.Module):
    """Two matrices and a ReLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        """Widths of the stream and between the matrices."""
        super().__init__()
        self.hidden = nn.Linear(dim, hidden, bias=False)
        self.output = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.output(torch.relu(self.hidden(x)))


class Mixer(nn.Module):
    """What moves information along the sequence: projections to heads and back, and what a subclass does between."""

    def __init__(self, config: Any, reads: int = 1) -> None:
        """reads: results, each H*K wide, that the output projection takes."""
        super().__init__()
        self.heads, self.head_dim, self.window = config.num_attention_heads, config.head_dim, config.window_tokens
        dim, inner = config.hidden_size, self.heads * self.head_dim
        self.query, self.key, self.value = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.output = nn.Linear(reads * inner, dim, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """[B, P, H*K] -> [B, P, H, K]."""
        return x.unflatten(-1, (self.heads, self.head_dim))

    def start(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Tensors at the start of a document."""
        raise NotImplementedError

    def forward(self, h: Tensor, piece: Piece, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """h [B, P, D], normalised -> [B, P, D] and the tensors after the piece."""
        raise NotImplementedError

    def blocks(
        self, h: Tensor, pieces: list[Piece], tensors: dict[str, Tensor], kernels: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `forward` for whole blocks h [B, n*W, D], which are the n pieces. kernels: of `installed_kernels`."""
        parts = []
        for part, piece in zip(h.split(self.window, 1), pieces, strict=True):
            mixed, tensors = self(part, piece, tensors)
            parts.append(mixed)
        return torch.cat(parts, 1), tensors


class WindowMixer(Mixer):
    """Attention to exactly the last W tokens. Keys before the document are zero and not masked.

    Tensors: keys, values [B, 2W, H, K]: the block before, and the current one as far as it goes.
    """

    def __init__(self, config: Any, block: dict[str, Any], reads: int = 1) -> None:
        """block: positions, t5 or rope."""
        super().__init__(config, reads)
        self.scale = nn.Parameter(torch.ones(self.heads))
        self.rotary = block.get("positions") == "rope"
        if not self.rotary:
            self.position_table = nn.Parameter(torch.zeros(self.heads, NUM_BUCKETS))

    def start(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Null keys and values."""
        shape = (batch, 2 * self.window, self.heads, self.head_dim)
        return {name: torch.zeros(shape, device=device, dtype=self.key.weight.dtype) for name in ("keys", "values")}

    def forward(self, h: Tensor, piece: Piece, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Window attention, and what a subclass reads and writes besides."""
        start = self.window + piece.phase
        keys = piece.append(tensors["keys"], unit(self.split(self.key(h))), start)
        values = piece.append(tensors["values"], self.split(self.value(h)), start)
        mixed, after = self.with_state(h, self.attend_window(h, keys, values, piece), keys, values, piece, tensors)
        if piece.ends:  # the current block becomes the block before
            keys, values = (piece.where_ended(x.roll(-self.window, 1), x) for x in (keys, values))
        return self.output(mixed), {**after, "keys": keys, "values": values}

    def blocks(
        self, h: Tensor, pieces: list[Piece], tensors: dict[str, Tensor], kernels: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """All blocks at once."""
        mixed, tensors = kernels.window_blocks(self, h, tensors)
        return self.output(mixed), tensors

    def attend_window(self, h: Tensor, keys: Tensor, values: Tensor, piece: Piece) -> Tensor:
        """Each token reads the W tokens before it, itself not included. -> [B, P, H*K]."""
        query = unit(self.split(self.query(h)), self.scale)
        if self.rotary:  # positions matter by their differences alone, so they count from the oldest key
            places = (self.window + piece.phase)[:, None] + piece.steps  # [1 or B, P], among the keys
            query, keys = rotate(query, places), rotate(keys, torch.arange(2 * self.window, device=h.device)[None])
            bias = query.new_zeros(1, 1, 1, 1, dtype=torch.float32)
        else:
            scaled = self.position_table.float() * self.scale.float().abs()[:, None]
            bias = scaled[:, piece.buckets].transpose(0, 1)
        return attend(query, keys, values, bias.masked_fill(piece.unseen, MASKED))

    def with_state(
        self, h: Tensor, mixed: Tensor, keys: Tensor, values: Tensor, piece: Piece, tensors: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A plain window has no state."""
        return mixed, {}


class LinearMixer(Mixer):
    """Linear attention with the feature map elu + 1.

    Tensors: matrix float32 [B, H, K, K] and normaliser float32 [B, H, K], sums over all tokens so far.
    """

    def __init__(self, config: Any, block: dict[str, Any]) -> None:
        """block: nothing of it is used."""
        super().__init__(config)

    def start(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Sums over no token."""
        shape = (batch, self.heads, self.head_dim)
        return {
            "matrix": torch.zeros(*shape, self.head_dim, device=device),
            "normaliser": torch.zeros(shape, device=device),
        }

    def forward(self, h: Tensor, piece: Piece, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Each token reads the sums up to itself."""
        q, k = (F.elu(self.split(dense(h)).float()) + 1 for dense in (self.query, self.key))
        k, v = k * piece.valid[..., None, None], self.split(self.value(h)).float()
        inside = torch.einsum("bphk,bjhk->bhpj", q, k).tril()
        total = torch.einsum("bhpj,bjhv->bphv", inside, v) + torch.einsum("bphk,bhkv->bphv", q, tensors["matrix"])
        weight = inside.sum(-1).transpose(1, 2) + torch.einsum("bphk,bhk->bph", q, tensors["normaliser"])
        y = (total / (weight + 1e-6)[..., None]).to(h.dtype).flatten(2)
        matrix = tensors["matrix"] + torch.einsum("bjhk,bjhv->bhkv", k, v)
        return self.output(y), {"matrix": matrix, "normaliser": tensors["normaliser"] + k.sum(1)}


class FullMixer(Mixer):
    """Causal attention with rotary positions to the last C tokens of the document, itself included.

    Tensors: keys (not rotated), values [B, J, H, K] of the tokens before, the newest last; J grows to C - 1.
    """

    def __init__(self, config: Any, block: dict[str, Any]) -> None:
        """block: context_tokens, which is C."""
        super().__init__(config)
        self.context = block["context_tokens"]

    def start(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """No tokens."""
        shape = (batch, 0, self.heads, self.head_dim)
        return {name: torch.zeros(shape, device=device, dtype=self.key.weight.dtype) for name in ("keys", "values")}

    def forward(self, h: Tensor, piece: Piece, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Each token reads those before it and itself."""
        keys, values = (
            torch.cat([tensors[name], self.split(dense(h))], 1)
            for name, dense in (("keys", self.key), ("values", self.value))
        )
        cached = tensors["keys"].shape[1]
        place = torch.arange(keys.shape[1], device=h.device)
        distance = (cached + piece.steps)[:, None] - place
        known = place >= cached - piece.seen[:, None]  # [1 or B, J]: the rest stands before the document
        mask = (distance >= 0) & (distance < self.context) & known[:, None]
        # positions matter by their differences alone, so they count from the oldest key
        q, k = rotate(self.split(self.query(h)), cached + piece.steps[None]), rotate(keys, place[None])
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), values.transpose(1, 2), attn_mask=mask[:, None]
        )
        length = min(keys.shape[1], self.context - 1)
        newest = (cached + piece.take)[:, None] - length + torch.arange(length, device=h.device)
        kept = {name: take_along(x, newest.clamp(min=0)) for name, x in (("keys", keys), ("values", values))}
        return self.output(y.transpose(1, 2).flatten(2)), kept


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions `places` [1 or B, T]; x [B, T, H, K]: the halves of a head are the pairs."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = places[..., None].double() * frequency
    cos, sin = angle.cos().float()[:, :, None], angle.sin().float()[:, :, None]
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
