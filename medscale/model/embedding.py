"""The tables: entity blocks in one TorchRec EmbeddingBagCollection, relations as one dense parameter.

One collection holds blocks of different widths under one feature, with bags of one id: the pooled kernel is
the faster one and the only one that takes mixed widths. The optimizer of the blocks is fused into their
backward pass (FBGEMM). World size 1 runs through DistributedModelParallel like any other. Whole blocks lie on
workers, or their rows are spread. TorchRec could also spread a block's columns: then row-wise Adagrad's state would be
one per row and worker, so results and checkpoints would depend on the number of workers; blocks are cut by the job
instead.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import BoundsCheckMode, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from medscale.errors import UnsupportedError
from medscale.model.layout import Block, Layout
from medscale.seed import generator
from medscale.workers import ALONE, Workers

__all__ = ["EntityTable", "LookedUpRows", "Placement", "TableRows", "initial_relations"]

#: by block: the worker that holds it, or None: its rows are spread over all
Placement = dict[str, int | None]

# TorchRec's sharded modules ask torch.fx whether they are being traced, which warns at every first look-up.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
# It calls torch.distributed by names that torch 2.13 will retire.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)

_FEATURE = "entity"
#: rows drawn at once while a table is initialised; part of what a seed means
_INIT_ROWS = 65_536


class EntityTable(nn.Module):
    """All entities' columns, sharded by block, updated inside the backward pass of `rows`."""

    def __init__(
        self,
        layout: Layout,
        optimizer: type[torch.optim.Optimizer],
        optimizer_arguments: dict[str, Any],
        *,
        device: torch.device,
        workers: Workers = ALONE,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        if os.environ.get("FBGEMM_TBE_BOUNDS_CHECK_MODE"):
            raise UnsupportedError(
                "FBGEMM_TBE_BOUNDS_CHECK_MODE is set and would let ids out of range read row 0; unset it"
            )
        self.layout, self.workers = layout, workers
        # Each worker's loss is its share of the job's, so gradients add up; TorchRec would take their mean.
        set_gradient_division(False)
        collection = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=block.name,
                    embedding_dim=block.width,
                    num_embeddings=layout.num_entities,
                    feature_names=[_FEATURE],
                )
                for block in layout.blocks
            ],
            device=torch.device("meta"),
        )
        apply_optimizer_in_backward(optimizer, collection.parameters(), optimizer_arguments)
        sharder = EmbeddingBagCollectionSharder(fused_params={"bounds_check_mode": BoundsCheckMode.FATAL})
        ranks = placement or dict.fromkeys((block.name for block in layout.blocks), 0)
        # Rows spread over workers come back by calls that want as many from each.
        self.equal_batches = workers.size > 1 and None in ranks.values()
        # A plan without compute_kernel="fused" falls to a kernel that never updates.
        shardings = {
            name: row_wise(compute_kernel="fused") if rank is None else table_wise(rank, compute_kernel="fused")
            for name, rank in ranks.items()
        }
        local_size = workers.size if device.type == "cpu" else min(workers.size, torch.cuda.device_count())
        plan = construct_module_sharding_plan(
            collection, shardings, sharder, local_size=local_size, world_size=workers.size, device_type=device.type
        )
        self.sharded = DistributedModelParallel(
            collection,
            device=device,
            plan=ShardingPlan({"": plan}),
            sharders=[sharder],
            init_data_parallel=False,
        )
        self._require_fused_state()

    def rows(self, entities_U: Tensor) -> Tensor:
        """Look up rows [U, C] of distinct ids [U]; the gradient that flows back is applied at once.

        Collective: every worker asks for its own rows, maybe for none.
        """
        lengths_B = torch.ones_like(entities_U)
        if self.equal_batches:
            longest = int(self.workers.largest(torch.tensor(len(entities_U), device=entities_U.device)))
            lengths_B = nn.functional.pad(lengths_B, (0, longest - len(entities_U)))
        pooled = self.sharded(KeyedJaggedTensor(keys=[_FEATURE], values=entities_U, lengths=lengths_B))
        names = [f"{_FEATURE}@{block.name}" for block in self.layout.blocks]
        # Columns come worker by worker; where that is not their order they are put side by side anew.
        if len(names) == 1 or pooled.keys() == names:
            rows_BC = cast(Tensor, pooled.values())
        else:
            rows_BC = torch.cat([pooled[name] for name in names], 1)
        return rows_BC[: len(entities_U), : self.layout.num_columns]

    def set_learning_rate(self, rate: float) -> None:
        """Give the fused optimizer its learning rate for the next backward pass."""
        for group in self.sharded.fused_optimizer.param_groups:
            group["lr"] = rate
        self.sharded.fused_optimizer.step()

    def set_optimizer_step(self, step: int) -> None:
        """Tell a fused optimizer with bias correction (Adam) how many steps it has done; its state does not say."""
        self.sharded.fused_optimizer.set_optimizer_step(step)

    def initialise(self, seed: int, scale: float) -> None:
        """Draw the initial columns: uniform in +-scale for distances, normal with that deviation for products."""
        for block, first, weight in self._local_weights():
            last = first + len(weight)
            for start in range(first - first % _INIT_ROWS, last, _INIT_ROWS):
                stop = min(start + _INIT_ROWS, self.layout.num_entities)
                draws = generator(seed, "entities", block.name, start)
                drawn = _draw(draws, (stop - start, block.width), scale, uniform=self.layout.scorer.is_distance)
                a, b = max(start, first), min(stop, last)
                weight[a - first : b - first] = drawn[a - start : b - start]

    def weights(self) -> dict[str, ShardedTensor]:
        """Return each block's sharded weight by name, sharing memory with the table."""
        return {name.split(".")[-2]: weight for name, weight in self.sharded.state_dict().items()}

    def optimizer_state(self) -> dict[str, Any]:
        """Return each block's fused optimizer state by `block.state`, sharing memory where FBGEMM does."""
        states = self.sharded.fused_optimizer.state_dict()["state"]
        return {key: value for block in states.values() for key, value in block.items()}

    def all_rows(self) -> "TableRows":
        """Return the whole table of a worker alone, sharing memory with it."""
        assert self.workers.size == 1, "several workers look rows up"
        return TableRows([weight for _, _, weight in self._local_weights()], self.layout.num_columns)

    def rows_to_rank(self) -> "TableRows | LookedUpRows":
        """Return the whole table for ranking: in memory, or looked up portion by portion by all workers together."""
        return self.all_rows() if self.workers.size == 1 else LookedUpRows(self)

    def _local_weights(self) -> Iterator[tuple[Block, int, Tensor]]:
        """Yield (block, first row, rows) of what this worker holds."""
        weights = self.weights()
        for block in self.layout.blocks:
            for shard in weights[block.name].local_shards():
                yield block, shard.metadata.shard_offsets[0], shard.tensor

    def _require_fused_state(self) -> None:
        here = {block.name for block, _, _ in self._local_weights()}
        missing = here - {key.split(".")[0] for key in self.optimizer_state()}
        assert not missing, f"blocks {sorted(missing)} have no fused optimizer state and would never be updated"


@dataclass(frozen=True)
class TableRows:
    """An entity table at rest: its blocks side by side, read by rows."""

    blocks: Sequence[Tensor]
    num_columns: int

    @property
    def num_entities(self) -> int:
        """Rows of the table."""
        return self.blocks[0].shape[0]

    @property
    def candidates(self) -> range:
        """All entities."""
        return range(self.num_entities)

    def gather(self, entities: Tensor) -> Tensor:
        """Return rows [U, C] by id [U]."""
        return torch.cat([block[entities] for block in self.blocks], 1)[:, : self.num_columns]

    def slice(self, start: int, stop: int) -> Tensor:
        """Return rows [stop - start, C]."""
        return torch.cat([block[start:stop] for block in self.blocks], 1)[:, : self.num_columns]


@dataclass(frozen=True)
class LookedUpRows:
    """The entity table of several workers. Every call is collective: each worker asks for rows, and gets them whole."""

    table: EntityTable

    @property
    def candidates(self) -> range:
        """All entities."""
        return range(self.table.layout.num_entities)

    @torch.no_grad()
    def gather(self, entities: Tensor) -> Tensor:
        """Return rows [U, C] by id [U]."""
        return self.table.rows(entities)

    def slice(self, start: int, stop: int) -> Tensor:
        """Return rows [stop - start, C]."""
        return self.gather(torch.arange(start, stop, device=self.table.workers.device))


def initial_relations(layout: Layout, seed: int, scale: float) -> Tensor:
    """Draw the relation table [rows, R]: phases in +-pi, PairRE's factors around 1, else like the entities'."""
    draws = generator(seed, "relations")
    shape = (layout.num_relation_rows, layout.num_relation_columns)
    match layout.scorer.name:
        case "rotate":
            return _draw(draws, shape, float(np.pi), uniform=True)
        case "pairre":
            return 1 + _draw(draws, shape, 0.5, uniform=True)
        case _:
            return _draw(draws, shape, scale, uniform=layout.scorer.is_distance)


def _draw(draws: np.random.Generator, shape: tuple[int, int], scale: float, *, uniform: bool) -> Tensor:
    if uniform:
        return torch.from_numpy(draws.random(shape, dtype=np.float32)).mul_(2 * scale).sub_(scale)
    return torch.from_numpy(draws.standard_normal(shape, dtype=np.float32)).mul_(scale)
