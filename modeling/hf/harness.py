"""Exported models in lm-eval (EleutherAI's harness): `python -m longspan.modeling.hf.harness run --model longspan ...`.

Takes the harness's own options; `--model_args pretrained=FOLDER` names the export. Texts of any length are read whole,
in parts, the state carried from part to part: no window slides, and no text is cut. Needs `pip install
'longspan[lm-eval]'`, and no network where the tasks' files are local.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor
from transformers import AutoTokenizer

from longspan.modeling.hf.configuration_longspan import UNLIMITED
from longspan.modeling.hf.modeling_longspan import LongspanForCausalLM

NEW_TOKENS = 256


@register_model("longspan")
class LongspanHarness(TemplateLM):
    """An exported folder as the harness wants it."""

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 1,
        part_tokens: int = 4096,
        **ignored: Any,
    ) -> None:
        """Load the model by this package's code.

        Args:
            pretrained: exported folder.
            device: the first GPU, or the CPU, if None.
            dtype: of the weights, as torch names it.
            batch_size: texts that are read at once.
            part_tokens: of each text in one forward pass; changes speed and memory alone.
            ignored: options of the harness that other models have (max_batch_size).
        """
        super().__init__()
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model: Any = LongspanForCausalLM.from_pretrained(pretrained, dtype=getattr(torch, dtype), local_files_only=True)
        self.model = model.to(self._device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False, local_files_only=True)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 1
        self._part = int(part_tokens)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @property
    def eot_token_id(self) -> int:
        """End of a document."""
        return int(self.model.config.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Begin of a document, which stands before every text."""
        return int(self.model.config.bos_token_id)

    @property
    def max_length(self) -> int:
        """Longest text: there is no limit, and this number stands for it."""
        return UNLIMITED

    @property
    def max_gen_toks(self) -> int:
        """Most new tokens where a task does not say."""
        return NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """Ids of a text, bos in front unless told otherwise."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens is not False)["input_ids"]
        return ids

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text after bos, the state carried through all of it."""
        rows = [self.tok_encode(request.args[0]) for request in requests]
        return [nats for nats, _ in self._scores(rows, [1] * len(rows))]

    def _loglikelihood_tokens(self, requests: list[Any], **ignored: Any) -> list[tuple[float, bool]]:
        """(nats of the continuation, whether it is the greedy one) of each (texts, context ids, continuation ids)."""
        rows = [context + continuation for _, context, continuation in requests]
        return self._scores(rows, [len(context) for _, context, _ in requests])

    def _scores(self, rows: list[list[int]], firsts: list[int]) -> list[tuple[float, bool]]:
        """Log-likelihood of `row[first:]` of each row, and whether greedy decoding would have given it."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))  # of like length together
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            scores = self._batch_scores([rows[index] for index in batch], [firsts[index] for index in batch])
            for index, score in zip(batch, scores, strict=True):
                found[index] = score
        return found

    @torch.inference_mode()
    def _batch_scores(self, rows: list[list[int]], firsts: list[int]) -> list[tuple[float, bool]]:
        width = max(map(len, rows))
        pad = self.model.config.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self._device)
        lengths, first = (torch.tensor(x, device=self._device)[:, None] for x in (list(map(len, rows)), firsts))
        nats = torch.zeros(len(rows), dtype=torch.float64, device=self._device)
        greedy = torch.ones(len(rows), dtype=torch.bool, device=self._device)
        cache = None
        for begin in range(0, width - 1, self._part):
            stop = min(begin + self._part, width - 1)
            columns = torch.arange(begin, stop, device=self._device)
            mask = (columns < lengths - 1).long()  # a row's last token predicts nothing that is asked for
            output = self.model(ids[:, begin:stop], attention_mask=mask, past_key_values=cache)
            cache = output.past_key_values
            targets: Tensor = ids[:, begin + 1 : stop + 1]
            scored = (columns + 1 >= first) & (columns + 1 < lengths)
            values = output.logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
            nats += values.double().masked_fill(~scored, 0).sum(1)
            greedy &= ((output.logits.argmax(-1) == targets) | ~scored).all(1)
        return list(zip(nats.tolist(), greedy.tolist(), strict=True))

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each text up to the first of its stop strings, which is left out."""
        return [self._continuation(*request.args) for request in requests]

    def _continuation(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        ids = torch.tensor([self.tok_encode(context)], device=self._device)
        temperature = options.get("temperature") or 0.0
        draw = {"do_sample": True, "temperature": temperature} if options.get("do_sample") and temperature else {}
        stops = {"stop_strings": until, "tokenizer": self.tokenizer} if until else {}
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=int(options.get("max_gen_toks") or NEW_TOKENS),
            **(draw or {"do_sample": False}),
            **stops,
        )
        text = str(self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        for stop in until:
            text = text.split(stop)[0]
        return text


def main() -> None:
    """The harness's own command line, which knows `--model longspan` now."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
