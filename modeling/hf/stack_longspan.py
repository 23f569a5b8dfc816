"""Stack of the Hugging Face form: layers, the cut into pieces, feedback, and the memory around all layers."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from longspan.modeling.hf.mixers_longspan import (
    FeedForward,
    FullMixer,
    LinearMixer,
    Mixer,
    Norm,
    Piece,
    WindowMixer,
    align,
    attend,
    kernels_for,
    take_along,
    unit,
)
from longspan.modeling.hf.recurrent_longspan import RecurrentMixer

MIXERS = {
    "sliding_window": WindowMixer,
    "block_recurrent": RecurrentMixer,
    "linear_attention": LinearMixer,
    "full_attention": FullMixer,
}


class FeedbackMixer(WindowMixer):
    """A window whose tokens also read the state of a recurrent layer above or below.

    What they read stands among the tensors that come in, as `RecurrentMixer` names it, and not among those that go out.
    """

    def __init__(self, config: Any, block: dict[str, Any]) -> None:
        """block: as of the window."""
        super().__init__(config, block, reads=2)
        self.state_query = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.state_scale = nn.Parameter(torch.ones(self.heads))

    def with_state(
        self, h: Tensor, mixed: Tensor, keys: Tensor, values: Tensor, piece: Piece, tensors: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens read the state from before their block."""
        query = unit(self.split(self.state_query(h)), self.state_scale)
        return torch.cat([mixed, attend(query, tensors["state_keys"], tensors["state_values"])], -1), {}


class Layer(nn.Module):
    """A mixer and a feed-forward network, each with its norm and residual."""

    def __init__(self, config: Any, block: dict[str, Any]) -> None:
        """block: the mixer's name and options."""
        super().__init__()
        if block["mixer"] not in MIXERS:
            raise ValueError(f"mixer {block['mixer']!r} in config.blocks: known are {', '.join(MIXERS)}")
        self.norm = Norm(config.hidden_size, config.kernels)
        reads_state = config.feedback and block["mixer"] == "sliding_window"
        self.mixer: Mixer = (FeedbackMixer if reads_state else MIXERS[block["mixer"]])(config, block)
        self.ffn_norm = Norm(config.hidden_size, config.kernels)
        self.ffn = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, piece: Piece, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """x [B, P, D] -> y [B, P, D] and the mixer's tensors after the piece."""
        mixed, tensors = self.mixer(self.norm(x), piece, tensors)
        y = x + mixed
        return y + self.ffn(self.ffn_norm(y)), tensors

    def blocks(
        self, x: Tensor, pieces: list[Piece], tensors: dict[str, Tensor], kernels: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `forward` for whole blocks; see `Mixer.blocks`."""
        mixed, tensors = self.mixer.blocks(self.norm(x), pieces, tensors, kernels)
        y = x + mixed
        return y + self.ffn(self.ffn_norm(y)), tensors


def by_block(
    x: Tensor, lengths: Tensor, seen: Tensor, window: int, run: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Run tokens in parts that never cross the edge of a block in any row.

    Args:
        x: [B, T, D], the tokens of each row first.
        lengths, seen: int64 [B] on the CPU, tokens of each row here and before.
        window: W.
        run: takes a part [B, P, D], and for each row the tokens before it and in it; gives [B, P, D].

    Returns:
        [B, T, D]; what stands after a row's tokens means nothing.
    """
    done, parts, width = torch.zeros_like(seen), [], 0
    place = torch.zeros(x.shape[:2], dtype=torch.int64)  # of each token's result in the joined parts
    while bool((done < lengths).any()):
        take = torch.minimum(window - (seen + done) % window, lengths - done)
        steps = torch.arange(int(take.max()))
        index = (done[:, None] + steps).clamp(max=x.shape[1] - 1)
        place.scatter_add_(1, index, (width + steps) * (steps < take[:, None]))
        same = bool((index == index[0]).all())
        parts.append(run(take_along(x, (index[:1] if same else index).to(x.device)), seen + done, take))
        done, width = done + take, width + len(steps)
    if not parts:
        return x
    same = bool((place == place[0]).all())
    return take_along(torch.cat(parts, 1), (place[:1] if same else place).to(x.device))


class Stack(nn.Module):
    """All layers; what they carry is a list with one dictionary of tensors a layer."""

    def __init__(self, config: Any) -> None:
        """One layer for each entry of config.blocks."""
        super().__init__()
        self.window, self.kernels = config.window_tokens, config.kernels
        self.layers = nn.ModuleList(Layer(config, block) for block in config.blocks)
        recurrent = [index for index, block in enumerate(config.blocks) if block["mixer"] == "block_recurrent"]
        self.source = recurrent[-1] if config.feedback else None  # whose state the windows read

    def start(self, batch: int, device: torch.device) -> list[dict[str, Tensor]]:
        """What is carried at the start of a document."""
        return [cast(Layer, layer).mixer.start(batch, device) for layer in self.layers]

    def forward(
        self, x: Tensor, lengths: Tensor, seen: Tensor, carried: list[dict[str, Tensor]]
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """x [B, T, D], lengths and seen int64 [B] on the CPU (see `by_block`) -> y [B, T, D], carried after it."""
        carried = list(carried)
        kernels = kernels_for(x, self.kernels)
        whole = int(lengths.min()) // self.window * self.window
        if kernels is None or self.source is not None or not whole or bool((seen % self.window).any()):
            return self._by_block(x, lengths, seen, carried), carried
        pieces = [
            Piece(seen + begin, torch.full_like(seen, self.window), self.window, x.device)
            for begin in range(0, whole, self.window)
        ]
        head = x[:, :whole]
        for index, layer in enumerate(self.layers):
            head, carried[index] = cast(Layer, layer).blocks(head, pieces, carried[index], kernels)
        rest = self._by_block(x[:, whole:], lengths - whole, seen + whole, carried)
        return torch.cat([head, rest], 1), carried

    def _by_block(self, x: Tensor, lengths: Tensor, seen: Tensor, carried: list[dict[str, Tensor]]) -> Tensor:
        """As `forward`, block by block through all layers; changes the list `carried`."""

        def run(part: Tensor, before: Tensor, take: Tensor) -> Tensor:
            piece = Piece(before, take, self.window, part.device)
            read = {} if self.source is None else carried[self.source]  # a layer that ends a block makes a new one
            offered = {name: read[name] for name in ("state_keys", "state_values") if name in read}
            for index, layer in enumerate(self.layers):
                part, carried[index] = layer(part, piece, offered | carried[index])
            return part

        return by_block(x, lengths, seen, self.window, run)


class MemoryStack(nn.Module):
    """A stack that starts fresh in each block with read tokens made from a memory; write tokens give the next memory.

    Carried, after the layers' tensors: memory float32 [B, M, D].
    """

    def __init__(self, config: Any) -> None:
        """config.memory: num_tokens, which is M."""
        super().__init__()
        self.window, self.num_tokens, dim = config.window_tokens, config.memory["num_tokens"], config.hidden_size
        self.stack = Stack(config)
        self.norm = Norm(dim)
        self.read_ids, self.write_ids = (nn.Parameter(torch.zeros(self.num_tokens, dim)) for _ in range(2))

    def start(self, batch: int, device: torch.device) -> list[dict[str, Tensor]]:
        """An empty memory, and the layers after its read tokens."""
        return self.open_block(torch.zeros(batch, *self.read_ids.shape, device=device))

    def open_block(self, memory: Tensor) -> list[dict[str, Tensor]]:
        """What is carried before the first token of a block."""
        rows = memory.shape[0]
        _, carried = self.stack(
            self.tokens(memory, self.read_ids),
            torch.full((rows,), self.num_tokens),
            torch.zeros(rows, dtype=torch.int64),
            self.stack.start(rows, memory.device),
        )
        return [*carried, {"memory": memory}]

    def tokens(self, memory: Tensor, ids: Tensor) -> Tensor:
        """Read or write tokens [B, M, D] of a memory."""
        return (self.norm(memory) + ids.float()).to(ids.dtype)

    def forward(
        self, x: Tensor, lengths: Tensor, seen: Tensor, carried: list[dict[str, Tensor]]
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """As `Stack.forward`."""
        held = [carried]

        def run(part: Tensor, before: Tensor, take: Tensor) -> Tensor:
            *layers, last = held[0]
            inside = self.num_tokens + before % self.window
            y, layers = self.stack(part, take, inside, layers)
            held[0] = [*layers, last]
            ended = before % self.window + take == self.window
            if bool(ended.any()):
                write = self.tokens(last["memory"], self.write_ids)
                written, _ = self.stack(write, ended * self.num_tokens, inside + take, layers)
                fresh = self.open_block(written.float())
                held[0] = [where_rows(ended.to(x.device), new, old) for new, old in zip(fresh, held[0], strict=True)]
            return y

        return by_block(x, lengths, seen, self.window, run), held[0]


def where_rows(rows: Tensor, new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `new` in the rows bool [B], else of `old`; those that hold fewer tokens get room before them."""
    merged = {}
    for name, tensor in new.items():
        length = max(tensor.shape[1], old[name].shape[1])
        after, before = (
            torch.cat([x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:]), x], 1) if x.shape[1] < length else x
            for x in (tensor, old[name])
        )
        merged[name] = torch.where(align(rows, after), after, before)
    return merged
