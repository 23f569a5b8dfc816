"""Configuration of an exported Longspan model. Needs transformers alone; this file is part of every export."""

from typing import Any

from transformers import PretrainedConfig

UNLIMITED = 2**30  # tokens: what stands for "no limit" where a number is asked for


class LongspanConfig(PretrainedConfig):
    """Sizes and layers of a model.

    Args:
        vocab_size: rows of the embedding, one for each id that stands for something.
        padded_vocab_size: rows that the model was trained with; the further ones stand for nothing and are not here.
        hidden_size: width of the residual stream.
        num_attention_heads: attention heads.
        head_dim: width of one head.
        intermediate_size: hidden width of the feed-forward network.
        window_tokens: W: block length and sliding window.
        blocks: one dictionary a layer, from the bottom up: `mixer` and the options of that mixer.
            (`layer_types` is a name of the library, which accepts only its own kinds of layers there.)
        feedback: window layers also read the state of the last recurrent layer.
        memory: options of the recurrent memory around the whole stack, or None.
        training_tokens: length of the segments that the model was trained on.
        max_position_embeddings: longest text; there is no limit, and tools that cut texts to it must not.
        kernels: "auto": on a GPU, run Longspan's own kernels where that package is installed; "never": plain PyTorch;
            "always": wherever it is installed.
        state_dtype: type of recurrent and matrix states, whatever the type of the weights.
    """

    model_type = "longspan"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 259,
        hidden_size: int = 1024,
        num_attention_heads: int = 8,
        head_dim: int = 128,
        intermediate_size: int = 4096,
        window_tokens: int = 512,
        blocks: list[dict[str, Any]] | None = None,
        feedback: bool = False,
        memory: dict[str, Any] | None = None,
        training_tokens: int | None = None,
        padded_vocab_size: int | None = None,
        max_position_embeddings: int = UNLIMITED,
        kernels: str = "auto",
        state_dtype: str = "float32",
        use_cache: bool = True,
        bos_token_id: int | None = 256,
        eos_token_id: int | None = 257,
        pad_token_id: int | None = 258,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        """Keep the sizes; everything else goes to the library's base class."""
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.window_tokens = window_tokens
        self.blocks = [{"mixer": "sliding_window"}] if blocks is None else [dict(block) for block in blocks]
        self.num_hidden_layers = len(self.blocks)
        self.feedback = feedback
        self.memory = memory
        self.training_tokens = training_tokens
        self.padded_vocab_size = padded_vocab_size
        self.max_position_embeddings = max_position_embeddings
        if kernels not in ("auto", "always", "never"):
            raise ValueError(f"kernels = {kernels!r}: use auto, always or never")
        self.kernels = kernels
        self.state_dtype = state_dtype
        self.use_cache = use_cache
        kwargs.pop("num_hidden_layers", None)  # follows from blocks
        kwargs |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)
