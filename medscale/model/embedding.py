"""The tables: entity blocks in one TorchRec EmbeddingBagCollection, relations as one dense parameter.

One collection holds blocks of different widths under one feature, with bags of one id: the pooled kernel is
the faster one and the only one that takes mixed widths. The optimizer of the blocks is fused into their
backward pass (FBGEMM). World size 1 runs through DistributedModelParallel like any other.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import BoundsCheckMode, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from medscale.errors import UnsupportedError
from medscale.model.layout import Block, Layout
from medscale.seed import generator

__all__ = ["EntityTable", "TableRows", "initial_relations"]

# TorchRec's sharded modules ask torch.fx whether they are being traced, which warns at every first look-up.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

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
    ) -> None:
        super().__init__()
        if os.environ.get("FBGEMM_TBE_BOUNDS_CHECK_MODE"):
            raise UnsupportedError(
                "FBGEMM_TBE_BOUNDS_CHECK_MODE is set and would let ids out of range read row 0; unset it"
            )
        self.layout = layout
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
        # A plan without compute_kernel="fused" falls to a kernel that never updates.
        placement = {block.name: table_wise(rank=0, compute_kernel="fused") for block in layout.blocks}
        plan = construct_module_sharding_plan(
            collection, placement, sharder, local_size=1, world_size=1, device_type=device.type
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
        """Look up rows [U, C] of distinct ids [U]; the gradient that flows back is applied at once."""
        lengths_U = torch.ones_like(entities_U)
        pooled = self.sharded(KeyedJaggedTensor(keys=[_FEATURE], values=entities_U, lengths=lengths_U))
        return cast(Tensor, pooled.values())[:, : self.layout.num_columns]

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
        for block, weight in self._local_weights():
            for start in range(0, self.layout.num_entities, _INIT_ROWS):
                stop = min(start + _INIT_ROWS, self.layout.num_entities)
                draws = generator(seed, "entities", block.name, start)
                shape = (stop - start, block.width)
                weight[start:stop] = _draw(draws, shape, scale, uniform=self.layout.scorer.is_distance)

    def weights(self) -> dict[str, ShardedTensor]:
        """Return each block's sharded weight by name, sharing memory with the table."""
        return {name.split(".")[-2]: weight for name, weight in self.sharded.state_dict().items()}

    def optimizer_state(self) -> dict[str, Any]:
        """Return each block's fused optimizer state by `block.state`, sharing memory where FBGEMM does."""
        states = self.sharded.fused_optimizer.state_dict()["state"]
        return {key: value for block in states.values() for key, value in block.items()}

    def local_rows(self) -> "TableRows":
        """Return this process's view of the whole table, for ranking; needs every block to be here."""
        return TableRows([weight for _, weight in self._local_weights()], self.layout.num_columns)

    def _local_weights(self) -> Iterator[tuple[Block, Tensor]]:
        weights = self.weights()
        for block in self.layout.blocks:
            for shard in weights[block.name].local_shards():
                yield block, shard.tensor

    def _require_fused_state(self) -> None:
        missing = {block.name for block in self.layout.blocks} - {key.split(".")[0] for key in self.optimizer_state()}
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

    def gather(self, entities: Tensor) -> Tensor:
        """Return rows [U, C] by id [U]."""
        return torch.cat([block[entities] for block in self.blocks], 1)[:, : self.num_columns]

    def slice(self, start: int, stop: int) -> Tensor:
        """Return rows [stop - start, C]."""
        return torch.cat([block[start:stop] for block in self.blocks], 1)[:, : self.num_columns]


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
