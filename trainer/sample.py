"""A text sample from a model, token by token through its decode state."""

from __future__ import annotations

import torch

from longspan.data_pipeline.vocabulary import BOS, EOS, ByteVocabulary
from longspan.modeling.model import LanguageModel


@torch.no_grad()
def sample_text(
    model: LanguageModel, prompt: str, num_tokens: int, *, seed: int, temperature: float, device: torch.device
) -> str:
    """Continue `prompt` by up to `num_tokens` tokens; ends early at the end of the document.

    Draws from a generator of its own, so that sampling never changes a training run.

    Args:
        model: in evaluation mode.
        prompt: put after the begin-of-document token.
        num_tokens: most tokens of the continuation.
        seed: of the draws.
        temperature: above 0; 1 = the model's own distribution.
        device: of the model.

    Returns:
        The continuation without the prompt; bytes that are no UTF-8 come out as replacement characters. It ends
        where logits are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    state = model.decode_state(model.init_state(1, device))
    for token in ByteVocabulary.encode(prompt.encode())[:-1].tolist():
        logits, state = model.step_tokens(torch.tensor([token], device=device), state)
    drawn: list[int] = []
    for _ in range(num_tokens):
        scores = logits[0].float().cpu() / temperature
        if not scores.isfinite().all():  # a model that has diverged has nothing to say, and its run ends by itself
            break
        scores[BOS] = -torch.inf
        scores[EOS + 1 :] = -torch.inf  # padding of the vocabulary
        token = int(torch.multinomial(scores.softmax(0), 1, generator=generator))
        if token == EOS:
            break
        drawn.append(token)
        logits, state = model.step_tokens(torch.tensor([token], device=device), state)
    return ByteVocabulary.decode(drawn)
