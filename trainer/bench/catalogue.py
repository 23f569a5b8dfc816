"""The benchmarks by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One entry of `longspan bench list`.

    Attributes:
        measures: one line.
        module: in `trainer/bench`, with `measure(settings, session) -> Measured`; `data` needs no session and has a
            command of its own.
        peers: names that `--peers` takes, and what each is.
    """

    measures: str
    module: str
    peers: dict[str, str]


BENCHMARKS = {
    "step": Benchmark(
        "a whole training step of models: forward, backward, and the optimizer if asked for",
        "training_step",
        {
            "plain": "plain PyTorch: torch.compile, flex_attention, scan as a loop; no bias, cache or dropout",
            "lucidrains": "block-recurrent-transformer-pytorch 0.4.4 under bf16 autocast",
        },
    ),
    "block-recurrent": Benchmark(
        "the chain of states forward, per block; and a whole recurrent mixer forward and backward",
        "state_chain",
        {"eager": "plain PyTorch loop over the blocks", "graph": "the same loop as one CUDA graph"},
    ),
    "window-attention": Benchmark(
        "strict sliding-window attention with T5 bias, learned scales and cache: forward, and with backward",
        "window",
        {
            "flex": "flex_attention, strict mask, no bias, no cache, no normalisation",
            "flex_bias": "flex_attention, strict mask, T5 bias and scale that are learned",
            "varlen": "torch's varlen_attn, FlashAttention-2 with a window; a token sees itself; no bias",
            "cudnn": "cuDNN attention, all earlier tokens: for scale",
            "flash": "FlashAttention-2 in torch, all earlier tokens: for scale",
        },
    ),
    "cross-entropy": Benchmark(
        "linear output layer and cross-entropy, forward and backward",
        "losses",
        {
            "plain": "torch.compile of F.cross_entropy on logits in memory",
            "liger": "fused linear cross-entropy of liger-kernel",
            "torch": "F.linear_cross_entropy of torch 2.13 and later",
        },
    ),
    "context-parallel": Benchmark(
        "one sequence over several GPUs: a step against one GPU's, ring attention, exchange of linear layers' states",
        "context_parallel.measure",
        {},
    ),
    "data": Benchmark(
        "tokens a second of the readers from disk and over http, seeking in a large plan, BPE encoding; on the CPU",
        "data.measure",
        {
            "webdataset": "plain webdataset pipeline over the same shards, concatenated to batches; no hashes",
            "mosaicml-streaming": "StreamingDataset over the same documents in its own format; no hashes",
            "tokenizers": "plain tokenizers with the same vocabulary",
        },
    ),
}
