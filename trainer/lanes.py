"""Carried state of this rank's lanes, one piece a micro-batch, from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.data_pipeline.batch import Batch
from longspan.modeling import state as states
from longspan.modeling.state import State
from longspan.trainer.engine import Engine


class Lanes:
    """This rank's lanes in micro-batches of different lanes at the same time step.

    Attributes:
        start, stop: lanes of the global batch.
        carried: the state of each micro-batch's lanes, cut from the graph.
    """

    def __init__(self, engine: Engine, num_lanes: int, micro_batch_lanes: int) -> None:
        """Args: engine: model and mesh; num_lanes: of the global batch; micro_batch_lanes: of one micro-batch."""
        per_rank = num_lanes // engine.mesh.dp_size
        self.start = engine.mesh.dp_rank * per_rank
        self.stop = self.start + per_rank
        self._engine = engine
        self._size = micro_batch_lanes
        self._started: list[Tensor] = []
        self.carried = self._initial()

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """This rank's share of the rows of `batch` that each micro-batch runs, on the mesh's device."""
        count, mesh = len(self.carried), self._engine.mesh
        parts = [batch] if count == 1 else [batch.rows(i * self._size, (i + 1) * self._size) for i in range(count)]
        self._started = [part.reset.any(dim=1).to(mesh.device) for part in parts]
        if mesh.cp_size > 1:
            parts = [part.share(mesh.cp_rank, mesh.cp_size) for part in parts]
        return [part.to(mesh.device) for part in parts]

    def advance(self, new: Sequence[State]) -> None:
        """Carry on with the states that a step returned."""
        self.carried = list(new)

    def roll_back(self) -> None:
        """After a skipped step: every lane keeps the state it had before. Every rank must call this.

        Only a lane in which a document started goes to its initial state: what it carries belongs to a document that
        the data have left behind, and must not reach the next one.
        """
        # on every rank, whether or not a document starts there: at ZeRO 3 gathering the parameters takes all of them
        with self._engine.evaluating() as model:
            for index, started in enumerate(self._started):
                if bool(started.any()):
                    self.carried[index] = states.detach(model.reset_rows(self.carried[index], started))

    def packed(self) -> dict[str, Tensor]:
        """All of this rank's lanes as one flat dictionary, name -> [lanes, ...]."""
        pieces = [states.pack(state) for state in self.carried]
        if len(pieces) == 1:
            return pieces[0]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def restore(self, packed: dict[str, Tensor], rows: Sequence[int]) -> None:
        """Put back what `packed` returned, on any number of ranks and micro-batches. Every rank must call this.

        Caches are in the compute dtype, which may be another one now: every tensor takes the dtype of this model's.

        Args:
            packed: name -> [n, ...], of this rank's first n lanes.
            rows: those of them to put back; all other lanes go to their initial state.
        """
        self.carried = self._initial()
        typed = {name: tensor.clone() for name, tensor in self.packed().items()}
        chosen = torch.tensor(rows, dtype=torch.int64)
        for name, tensor in typed.items() if rows else ():
            tensor[chosen.to(tensor.device)] = packed[name][chosen].to(tensor.device, tensor.dtype)
        self.carried = [
            states.unpack({name: tensor[i * self._size : (i + 1) * self._size] for name, tensor in typed.items()})
            for i in range(len(self.carried))
        ]

    def _initial(self) -> list[State]:
        """Of every micro-batch, the state at the start of a document, as the weights are now."""
        engine = self._engine
        with engine.evaluating() as model:
            fresh = [model.init_state(self._size, engine.mesh.device) for _ in range(engine.num_micro_batches)]
        return [states.detach(state) for state in fresh]
