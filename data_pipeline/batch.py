"""One step's rows of the global batch, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from longspan.data_pipeline.vocabulary import NO_LABEL
from longspan.errors import UsageError


@dataclass(frozen=True)
class Batch:
    """B lanes, T tokens, quanta of Q tokens.

    Attributes:
        tokens: int64 [B, T]; pad where there is no document.
        labels: int64 [B, T]; the document's next token, -100 where there is none to predict.
        reset: bool [B, T/Q]; a document starts at this quantum, the state before it goes back to its initial value.
        doc_ids: int64 [B, T/Q]; index into the manifest's documents, -1 for padding and quarantined documents.
        target_bytes: int32 [B, T]; bytes of each label, 0 for eos and for no label.
        lane_ids: int64 [B]; place of each row in the global batch.
        num_valid: labels that are scored. num_bytes: sum of target_bytes.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    reset: torch.Tensor
    doc_ids: torch.Tensor
    target_bytes: torch.Tensor
    lane_ids: torch.Tensor
    num_valid: int
    num_bytes: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def rows(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`, with their own counts; waits for the device if the tensors are on one."""
        cut = {name: tensor[start:stop] for name, tensor in self._tensors().items()}
        num_valid = int((cut["labels"] != NO_LABEL).sum())
        return Batch(**cut, num_valid=num_valid, num_bytes=int(cut["target_bytes"].sum()))

    def share(self, rank: int, size: int) -> Batch:
        """The contiguous share of every row that context-parallel rank `rank` of `size` holds, with its own counts.

        Labels were made before: that of a share's last token is the first token of the next share. So the shares of
        all ranks concatenate back to the batch, tokens and labels alike, and their counts add up.

        Raises:
            UsageError: shares would not be whole quanta, on which resets are counted, or there is no such rank.
        """
        if not 0 <= rank < size:
            raise UsageError(f"context-parallel rank {rank} of {size}: ranks count from 0 to {size - 1}.")
        length, quanta = self.tokens.shape[1], self.reset.shape[1]
        if quanta % size:
            raise UsageError(
                f"data.segment_tokens = {length} is {quanta} blocks of {length // quanta} tokens, which {size} "
                f"context-parallel ranks cannot share evenly: make it a multiple of {size * (length // quanta)}."
            )

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            count = tensor.shape[1] // size if tensor.dim() > 1 else 0
            return tensor[:, rank * count : (rank + 1) * count] if count else tensor

        shares = {name: cut(tensor) for name, tensor in self._tensors().items()}
        num_valid = int((shares["labels"] != NO_LABEL).sum())
        return Batch(**shares, num_valid=num_valid, num_bytes=int(shares["target_bytes"].sum()))

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
