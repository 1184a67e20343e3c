"""The tables: entity blocks in one TorchRec EmbeddingBagCollection, relations as one dense parameter.

One collection holds blocks of different widths under one feature, with bags of one id: the pooled kernel is
the faster one and the only one that takes mixed widths. The optimizer of the blocks is fused into their
backward pass (FBGEMM). World size 1 runs through DistributedModelParallel like any other. Whole blocks lie on
workers, or their rows are spread. TorchRec could also spread a block's columns: then row-wise Adagrad's state would be
one per row and worker, so results and checkpoints would depend on the number of workers; blocks are cut by the job
instead.

On CUDA a worker's part may lie in the host's memory, with a cache on the GPU (FBGEMM's UVM caching; never run on a
GPU so far). FBGEMM's key-value tables on SSD are refused: its public builds lack them, and where they are, a table
is seen through a tensor that cannot be written (`PartiallyMaterializedTensor.copy_` does nothing), so neither the
job's seed nor a checkpoint could fill it.
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import BoundsCheckMode, CacheParams, EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from medscale.errors import UnsupportedError
from medscale.model.layout import Block, Layout
from medscale.seed import generator
from medscale.workers import ALONE, Workers

__all__ = [
    "EntityTable",
    "LookedUpRows",
    "Placement",
    "TableMemory",
    "TableRows",
    "initial_relations",
    "require_table_memory",
    "sharding_plan",
]

TableMemory = Literal["device", "uvm_caching", "ssd"]

# TorchRec's sharded modules ask torch.fx whether they are being traced, which warns at every first look-up.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
# It calls torch.distributed by names that torch 2.13 will retire.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)

_FEATURE = "entity"
#: rows drawn at once while a table is initialised; part of what a seed means
_INIT_ROWS = 65_536
#: what TorchRec calls the places of a table
_KERNELS: Mapping[TableMemory, str] = {
    "device": EmbeddingComputeKernel.FUSED.value,
    "uvm_caching": EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
    "ssd": EmbeddingComputeKernel.KEY_VALUE.value,
}


@dataclass(frozen=True)
class Placement:
    """Where the entity table lies."""

    #: by block: the worker that holds it whole, or None: its rows are spread over all
    ranks: Mapping[str, int | None]
    #: where a worker keeps its part
    memory: TableMemory = "device"
    #: share of a worker's rows that its GPU caches, unless they lie there anyway
    cache_fraction: float = 0.2

    @property
    def is_row_wise(self) -> bool:
        """Whether rows are spread over all workers."""
        return None in self.ranks.values()


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
        num_frozen: int = 0,
        tier_factors: Sequence[float] = (1.0,),
    ) -> None:
        """Make the tables, unfilled; rows below `num_frozen` are never updated.

        Learning rates are multiplied with one of `tier_factors` in all columns, or with one for each dim of the tiers.
        """
        super().__init__()
        if os.environ.get("FBGEMM_TBE_BOUNDS_CHECK_MODE"):
            raise UnsupportedError(
                "FBGEMM_TBE_BOUNDS_CHECK_MODE is set and would let ids out of range read row 0; unset it"
            )
        placement = placement or Placement(dict.fromkeys((block.name for block in layout.blocks), 0))
        require_table_memory(placement.memory, device.type)
        self.layout, self.workers, self.num_frozen = layout, workers, num_frozen
        # Each worker's loss is its share of the job's, so gradients add up; TorchRec would take their mean.
        set_gradient_division(False)
        collection = _collection(layout)
        factor_of_column = layout.of_columns(tier_factors, layout.scorer.unit_columns)
        for block in layout.blocks:
            weight = collection.embedding_bags[block.name].weight
            factor = factor_of_column[block.start]
            arguments = optimizer_arguments | {"lr": factor * optimizer_arguments["lr"]}
            apply_optimizer_in_backward(optimizer, [weight], arguments)
        sharder = _sharder()
        # Rows spread over workers come back by calls that want as many from each.
        self.equal_batches = workers.size > 1 and placement.is_row_wise
        plan = sharding_plan(collection, placement, device_type=device.type, num_workers=workers.size)
        self.sharded = DistributedModelParallel(
            collection,
            device=device,
            plan=ShardingPlan({"": plan}),
            sharders=[sharder],
            init_data_parallel=False,
        )
        # Blocks of one rate are updated together; FBGEMM tells their rate in single precision.
        self._factors = [
            min(tier_factors, key=lambda factor: abs(factor * optimizer_arguments["lr"] - group["lr"]))
            for group in self.sharded.fused_optimizer.param_groups
        ]
        self._require_fused_state()

    def rows(self, entities_U: Tensor) -> Tensor:
        """Look up rows [U, C] of distinct ids [U]; the gradient that flows back is applied at once.

        Collective: every worker asks for its own rows, maybe for none.
        """
        if not self.num_frozen:
            return self.look_up(entities_U)
        # Looked up apart and without gradient, frozen rows are not in the update at all, whatever the optimizer
        # would make of a gradient of zero.
        moves_U = entities_U >= self.num_frozen
        moving_MC = self.look_up(entities_U[moves_U])
        with torch.no_grad():
            frozen_FC = self.look_up(entities_U[~moves_U])
        order_U = torch.cat([moves_U.nonzero(), (~moves_U).nonzero()]).squeeze(1).argsort()
        return torch.cat([moving_MC, frozen_FC]).index_select(0, order_U)

    def look_up(self, entities_U: Tensor) -> Tensor:
        """Look up rows as `rows` does, frozen or not."""
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
        """Give the fused optimizer its learning rate, times the tiers' factors, for the next backward pass."""
        for factor, group in zip(self._factors, self.sharded.fused_optimizer.param_groups, strict=True):
            group["lr"] = factor * rate
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

    def fill(self, first_column: int, columns: Callable[[int, int, int], NDArray[np.float32]]) -> None:
        """Set the columns from one on; `columns(start, stop, number)` gives the first so many of rows [start, stop)."""
        number = self.layout.num_columns - first_column
        for block, first, weight in self._local_weights():
            begin, end = max(block.start, first_column), min(block.start + block.width, self.layout.num_columns)
            if begin >= end:
                continue
            for start in range(0, len(weight), _INIT_ROWS):
                stop = min(start + _INIT_ROWS, len(weight))
                given = torch.from_numpy(columns(first + start, first + stop, number))
                weight[start:stop, begin - block.start : end - block.start] = given[
                    :, begin - first_column : end - first_column
                ]

    def fill_state(self, first_column: int, state_of: Callable[[int], Tensor]) -> None:
        """Set row-wise Adagrad's state of blocks from a column on; `state_of(column)` gives all rows' [E] there."""
        state = {key.split(".")[0]: value for key, value in self.optimizer_state().items()}
        for block, first, weight in self._local_weights():
            if block.start >= first_column:
                of_rows = state_of(block.start - first_column)[first : first + len(weight)]
                for shard in state[block.name].local_shards():
                    shard.tensor.copy_(of_rows.view_as(shard.tensor))

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

    def sha256(self, num_rows: int) -> str:
        """Return a hash of this worker's part of the first rows."""
        digest = hashlib.sha256()
        for block, first, rows in self._local_weights():
            digest.update(f"{block.name} {first}".encode())
            for start in range(0, max(0, min(len(rows), num_rows - first)), _INIT_ROWS):
                stop = min(start + _INIT_ROWS, num_rows - first)
                digest.update(rows[start:stop].cpu().contiguous().numpy().data)
        return digest.hexdigest()

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


def sharding_plan(
    collection: EmbeddingBagCollection, placement: Placement, *, device_type: str, num_workers: int
) -> EmbeddingModuleShardingPlan:
    """Return TorchRec's plan of a placement: for each block its workers, its kernel, and the GPU's cache."""
    # A plan without a kernel falls to one that never updates.
    kernel = _KERNELS[placement.memory]
    shardings = {
        name: row_wise(compute_kernel=kernel) if rank is None else table_wise(rank, compute_kernel=kernel)
        for name, rank in placement.ranks.items()
    }
    local_size = num_workers if device_type == "cpu" else max(1, min(num_workers, torch.cuda.device_count()))
    plan = construct_module_sharding_plan(
        collection, shardings, _sharder(), local_size=local_size, world_size=num_workers, device_type=device_type
    )
    for name, parameter in plan.items():
        assert parameter.compute_kernel == kernel, f"block {name} would be trained by {parameter.compute_kernel}"
        if placement.memory != "device":
            parameter.cache_params = CacheParams(load_factor=placement.cache_fraction)
    return plan


def _collection(layout: Layout) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(
            name=block.name, embedding_dim=block.width, num_embeddings=layout.num_entities, feature_names=[_FEATURE]
        )
        for block in layout.blocks
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


def _sharder() -> EmbeddingBagCollectionSharder:
    return EmbeddingBagCollectionSharder(fused_params={"bounds_check_mode": BoundsCheckMode.FATAL})


def require_table_memory(memory: TableMemory, device_type: str) -> None:
    """Refuse a place of the tables that this device or this build of FBGEMM does not offer.

    Raises:
        UnsupportedError: names what is missing.

    """
    if memory == "device":
        return
    if device_type != "cuda":
        raise UnsupportedError(
            f"runtime.table_memory {memory} spares the memory of a GPU, and this job runs on the CPU; use device"
        )
    if memory == "ssd":
        missing = (
            "FBGEMM's key-value tables cannot be written, so that no checkpoint could be loaded into them"
            if _has_key_value_tables()
            else "this build of FBGEMM lacks its key-value tables (EmbeddingRocksDBWrapper), as all public ones do"
        )
        raise UnsupportedError(f"runtime.table_memory ssd: {missing}; use uvm_caching, or more workers")


def _has_key_value_tables() -> bool:
    try:
        return torch.classes.fbgemm.EmbeddingRocksDBWrapper is not None
    except RuntimeError:  # how torch says that nobody registered the class
        return False


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
        return self.table.look_up(entities)

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
