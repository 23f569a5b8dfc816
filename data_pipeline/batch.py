"""One step's rows of the global batch, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from longspan.data_pipeline.vocabulary import NO_LABEL


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
        """The contiguous share of every row that rank `rank` of `size` holds, with its own counts.

        Labels were made before: that of a share's last token is the first token of the next share.
        """
        cut = {}
        for name, tensor in self._tensors().items():
            length = tensor.shape[1] // size if tensor.dim() > 1 else 0
            cut[name] = tensor[:, rank * length : (rank + 1) * length] if length else tensor
        num_valid = int((cut["labels"] != NO_LABEL).sum())
        return Batch(**cut, num_valid=num_valid, num_bytes=int(cut["target_bytes"].sum()))

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
