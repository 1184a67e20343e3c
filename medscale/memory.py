"""Bytes that a worker holds, counted tensor by tensor; of several workers, the one that holds most.

Worker w holds E_w rows of T_w blocks with C_w columns; it looks up U of E entities per step, of C columns: as many as
its draws are expected to meet if all entities are alike (fewer where they are not). It trains on b of the batch's
positives or queries. Numbers are float32 (4 bytes), ids int64 (8 bytes).

    entity tables               4 E_w C_w
    optimizer state             4 E_w T_w (rowwise_adagrad), 4 E_w C_w (adagrad), 8 E_w C_w (adam)
    relations                   4 R for R numbers, their gradient, and as much or twice as much state
    graph                       104 per triple of a partition (2^20 at most) with binary losses: two at hand, one being
                                shuffled; 168 per training triple with softmax; 72 per known triple that is filtered
                                out of negatives or ranks
    batch                       4 (3 U + 8 b) C with the fused kernels, and the scores that a loss keeps
    rows sent and received      48 W U C_w: what a worker looks up for all W, and the gradients of that, in the six
                                copies that were measured over gloo
    saving and exporting        four copies of 64 MiB of a table, or of what it has

On a GPU with uvm_caching, tables and state lie in the host's memory; the GPU holds f E_w T_w rows as wide as the
widest block, f the share that is cached, with 16 bytes for each, and 4 E_w T_w bytes that say where rows are. With
ssd the tables lie on the disk, the state on the GPU. Assumed, not measured: 2 GiB for CUDA and NCCL themselves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medscale.checkpoint import PIECE_BYTES
from medscale.config import Job
from medscale.graph.schema import PART_ROWS
from medscale.model.embedding import Placement
from medscale.model.layout import Layout
from medscale.model.prefix import SLICE_NUMBERS
from medscale.sharding import FLOAT, shares_of
from medscale.traffic import INT

__all__ = ["MIB", "GraphSize", "Memory", "StepSize", "beside_workers", "memory_of", "state_numbers", "step_size"]

MIB = 2**20
#: resident memory of a process that has imported torch, TorchRec and FBGEMM, pyarrow and DuckDB (measured: 505-560)
_LIBRARIES = 560 * MIB
#: what a process of Ray Train has beside that
_RAY = 200 * MIB
#: of rows on their way between workers: TorchRec's, autograd's and the process group's, measured over gloo
_COPIES = 6
#: what CUDA and NCCL take of a GPU: assumed
_CUDA = 2048 * MIB


@dataclass(frozen=True)
class GraphSize:
    """What a plan needs to know of a graph."""

    num_entities: int
    num_relations: int
    num_train: int
    num_valid: int
    num_test: int
    #: where the numbers come from
    source: str
    #: of a graph that grew: of the training triples, those that vectors of new names alone learn from
    num_growth: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes by what takes them."""

    host: Mapping[str, int]
    #: of a worker's GPU; empty on a CPU
    device: Mapping[str, int]


@dataclass(frozen=True)
class StepSize:
    """What a worker's step touches."""

    #: distinct rows looked up
    rows: int
    #: (query, candidate) pairs of the largest sub-model
    scores: int
    #: of the largest tensors, forward and backward
    num_bytes: int


def memory_of(job: Job, size: GraphSize, layout: Layout, placement: Placement, *, on_cuda: bool) -> Memory:
    """Return what a worker of a job on a graph of this size will hold."""
    workers = job.runtime.workers
    share = max(shares_of(layout, placement, workers), key=lambda share: share.table_bytes)
    step = step_size(job, layout)
    validates = bool(job.train.validate_every and size.num_valid)
    relations = FLOAT * layout.num_relation_rows * layout.num_relation_columns
    tables = {
        "entity tables": share.table_bytes,
        "optimizer state": FLOAT * share.rows * state_numbers(job, share.columns, share.blocks),
    }
    computing = {
        "relations": relations * (4 if job.optimizer.kind == "adam" else 3),
        "batch": step.num_bytes,
        "ranking": min(workers, 2) * _ranking_bytes(job, size, layout) if workers == 1 or validates else 0,
    }
    if workers > 1:
        computing["rows sent and received"] = 2 * _COPIES * FLOAT * workers * step.rows * share.columns
    host = {
        "libraries": _LIBRARIES + (_RAY if workers > 1 else 0),
        "graph": _graph_bytes(job, size, ranks=workers == 1 or validates),
        # copies of pieces on their way to a checkpoint; more than exporting's portions of rows
        "saving and exporting": min(4 * PIECE_BYTES, share.table_bytes),
    }
    if not on_cuda:
        return Memory(_taken(host | tables | computing), {})
    device, slots = {"CUDA and NCCL (assumed)": _CUDA} | computing, share.rows * share.blocks
    if placement.memory == "device":
        return Memory(_taken(host), _taken(device | tables))
    widest = max(block.width for block in layout.blocks)
    device["cached rows"] = int(placement.cache_fraction * slots * (FLOAT * widest + 16)) + FLOAT * slots
    if placement.memory == "ssd":
        device["optimizer state"] = tables["optimizer state"]
    else:
        host |= tables
    return Memory(_taken(host), _taken(device))


def beside_workers(job: Job, layout: Layout) -> Mapping[str, int]:
    """Return what each reader and each evaluator holds, wherever it runs.

    A reader has a few partitions, some shared with those that asked for them; an evaluator its part of the entities.
    """
    runtime, row = job.runtime, FLOAT * layout.num_entities
    held = {}
    if runtime.readers:
        held["a reader"] = _LIBRARIES // 2 + (2 * 3 + 7) * INT * PART_ROWS
    if runtime.evaluators:
        columns = sum(block.width for block in layout.blocks)
        held["an evaluator"] = _LIBRARIES + row * columns // runtime.evaluators
    return held


def state_numbers(job: Job, columns: int, blocks: int) -> int:
    """Return how many numbers the optimizer keeps for a row of so many columns in so many blocks."""
    return {"rowwise_adagrad": blocks, "adagrad": columns, "adam": 2 * columns}[job.optimizer.kind]


def step_size(job: Job, layout: Layout) -> StepSize:
    """Return what a worker's step touches.

    Binary losses hold the looked-up rows with their gradients, and every positive's query; the kernels hold a few
    tiles beside them, plain torch the candidates of every chunk and the scores of all sub-models about six times
    over. Softmax holds [queries, candidates] per sub-model: once in the kernels, in plain torch several times.
    """
    train, negatives = job.train, job.negatives
    # a worker's share of the positives or queries
    batch_size = -(-train.batch_size // job.runtime.workers)
    columns, fused = layout.num_columns, job.runtime.kernels == "auto"
    if job.loss.kind == "bce":
        size = 1 if negatives.kind == "per_positive" else negatives.chunk_size
        number = negatives.chunk_size if negatives.kind == "in_batch" else negatives.number
        pairs = batch_size * number
        candidates = pairs // size
        rows = _distinct(2 * batch_size + candidates, layout.num_entities)
        gathered = 8 * batch_size + (0 if fused else 2 * candidates)
        kept = 4 * len(layout.dims) * batch_size if fused else 6 * len(layout.dims) * pairs + 8 * SLICE_NUMBERS
        return StepSize(rows, pairs, FLOAT * ((3 * rows + gathered) * columns + kept))
    own = 3 * train.batch_size
    candidates = layout.num_entities
    if negatives.kind != "all":
        candidates = _distinct(own + negatives.number, layout.num_entities)
    scored = min(len(layout.dims), job.med.sub_models_per_step or len(layout.dims))
    per_score = 5 if job.med.mutual != "off" or layout.scorer.is_distance else 3
    if fused and not layout.scorer.is_distance:
        per_score = 1
    scores = batch_size * candidates
    return StepSize(candidates, scores, FLOAT * (per_score * scored * scores + 6 * candidates * columns))


def _distinct(draws: int, num_entities: int) -> int:
    """Return how many entities that many draws are expected to meet: n - n (1 - 1/n)^draws of n alike, else fewer."""
    return math.ceil(-num_entities * math.expm1(draws * math.log1p(-1 / num_entities))) if num_entities > 1 else 1


def _graph_bytes(job: Job, size: GraphSize, *, ranks: bool) -> int:
    """Training triples as batches hold them, and the largest index of known triples with the arrays that sort it."""
    held = (3 + 2 * 9) * INT * size.num_train
    if job.loss.kind == "bce":
        held = (2 * 3 + 7) * INT * min(size.num_train, PART_ROWS)
    total = size.num_train + size.num_valid + size.num_test
    indexed = size.num_train if job.negatives.filter_known else 0
    if ranks:
        valid = min(size.num_valid, job.train.valid_triples or size.num_valid)
        test = min(size.num_test, job.evaluate.max_triples or size.num_test)
        # What shares head and relation, or relation and tail, with ranked triples: 3 to 22% of generated graphs of up
        # to 7M entities for some thousand triples, and nearly all for whole splits.
        few = max(valid, test) < size.num_train / 100
        indexed = max(indexed, total // 4 if few else total)
    return held + 3 * 3 * INT * indexed


def _ranking_bytes(job: Job, size: GraphSize, layout: Layout) -> int:
    """The ranks, and within the job's bound scores, or in the kernels the entities as tiles."""
    num_ranked = max(size.num_test, size.num_valid)
    working = 2 * job.evaluate.memory_mib * MIB
    if job.runtime.kernels == "auto":
        working = min(job.evaluate.memory_mib * MIB, 3 * FLOAT * layout.num_entities * layout.num_columns)
    return working + 4 * INT * num_ranked * len(job.model.dims)


def _taken(parts: Mapping[str, Any]) -> Mapping[str, int]:
    return {name: number for name, number in parts.items() if number}
