"""The workers of a run as seen by one of them: its share of the work, and sums over all.

A worker alone is a group of one whose sums are its own numbers: one code path for any number of workers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medscale.errors import WorkerError

__all__ = ["ALONE", "Workers"]


@dataclass(frozen=True)
class Workers:
    """All workers of a run. Every method but `share` is collective: each worker calls it, in the same order.

    Raises:
        WorkerError: another worker died, or did not come in time.

    """

    #: this one's number, from 0
    rank: int
    size: int
    #: tensors of collective calls lie there
    device: torch.device = torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return which of `count` things are this worker's: contiguous, all things together, maybe none."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all workers, in place."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """Take the largest of each number over all workers, in place."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def where(self, *, flag: bool) -> list[int]:
        """Return the ranks on which the flag is set."""
        flags_W = torch.zeros(self.size, device=self.device)
        flags_W[self.rank] = float(flag)
        return [int(rank) for rank in self.sum(flags_W).nonzero().flatten()]

    def told(self, value: Any = None) -> Any:
        """Return the leader's value, which JSON can carry."""
        return self.all_of(value if self.leads else None)[0]

    def all_of(self, value: Any) -> list[Any]:
        """Return every worker's value, by rank; JSON must be able to carry it."""
        if self.size == 1:
            return [value]
        # JSON rather than torch's own exchange of objects, which pickles them
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths_W = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        lengths_W[self.rank] = len(text)
        lengths = self.sum(lengths_W).tolist()
        texts = [torch.zeros(max(lengths), dtype=torch.uint8, device=self.device) for _ in lengths]
        padded = torch.nn.functional.pad(text, (0, max(lengths) - len(text)))
        self._together(lambda: dist.all_gather(texts, padded))
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def wait(self) -> None:
        """Wait until every worker is here."""
        self.sum(torch.zeros(1, device=self.device))

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            self._together(lambda: dist.all_reduce(tensor, operation))
        return tensor

    def _together(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except RuntimeError as cause:
            raise WorkerError(
                f"worker {self.rank} of {self.size} waited in vain for another one, which died or hangs ({cause}); "
                "run the same command again to go on from the last checkpoint"
            ) from cause


#: the only worker of a run
ALONE = Workers(0, 1)
