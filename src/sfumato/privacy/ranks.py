"""DP-SGD over several processes: who holds which units, one sum, noise added once.

Every process of an initialised `torch.distributed` group opens the same protected images and takes the
units whose index is its rank modulo the number of ranks. Each Poisson-samples its own share from its own
stream, so the union is a Poisson sample of all units. Exact sums travel to rank 0 only, inside the trusted
group; rank 0 alone writes the ledger and files, draws the noise, takes the optimiser step and sends the new
weights (released values) back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sfumato.errors import SfumatoError
from sfumato.privacy.clipping import ClippedSum


class Ranks:
    """This process's place in the group; a group of one when `torch.distributed` is not initialised."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.first = self.rank == 0
        self.device = "cuda" if together and dist.get_backend() == "nccl" else "cpu"

    def share(self, num_units: int) -> np.ndarray:
        """Indices of the units this process samples from, int64 (disjoint shares that cover all)."""
        return np.arange(self.rank, num_units, self.size, dtype=np.int64)

    def on_first(self, action: Callable[[], int | None]) -> int:
        """Run `action` on rank 0 and return its number everywhere; if it fails there, every rank raises."""
        answer, failure = torch.zeros(2, dtype=torch.int64, device=self.device), None
        if self.first:
            try:
                answer[1] = action() or 0
            except BaseException as error:
                answer[0], failure = 1, error
        if self.size > 1:
            dist.broadcast(answer, 0)
        if failure is not None:
            raise failure
        if answer[0]:
            raise SfumatoError("rank 0 stopped; its message says why and what to do next")
        return int(answer[1])

    def sum_to_first(self, part: ClippedSum) -> ClippedSum:
        """The sum over all ranks' units, on rank 0; the other ranks keep nothing of use."""
        if self.size > 1:
            for value in part._values.values():
                dist.reduce(value, 0)
        return part

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` with rank 0's."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor.data, 0)
