"""What a job will take, before anything runs: `python -m medscale.plan JOB`.

Memory is counted tensor by tensor: tables, optimizer, graph, a step's batch, ranking, and what the libraries
themselves take. A job whose parts do not fit is refused with the number that breaks it.
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from medscale.config import Job
from medscale.errors import CapacityError
from medscale.graph.census import take_census
from medscale.graph.reader import graph_exists, open_graph
from medscale.graph.synthetic import RELATIONS, kind_sizes
from medscale.jobfile import load_job
from medscale.location import Location
from medscale.logs import console
from medscale.model.layout import Layout, layout_of
from medscale.model.prefix import SLICE_NUMBERS
from medscale.options import job_parser, run_command
from medscale.sharding import placement_of
from medscale.split import CHUNK_BYTES

__all__ = ["GraphSize", "Plan", "main", "memory_limit", "plan", "require_fit", "size_of"]

MIB = 2**20
FLOAT, INT = 4, 8

#: resident memory of a process that has imported torch, TorchRec and FBGEMM, pyarrow and DuckDB (measured: 505-560)
_LIBRARIES = 560 * MIB


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


@dataclass(frozen=True)
class Plan:
    """A job's predicted needs; bytes unless named otherwise."""

    #: resident memory by what takes it; of several workers, the one that holds most
    memory: Mapping[str, int]
    #: several workers: how tables lie on them
    placement: str
    #: disk by what is written, checkpoints counted while one is being written
    disk: Mapping[str, int]
    #: parameters of each tier
    parameters: Mapping[str, int]
    steps_per_epoch: int
    total_steps: int
    #: exact unless queries still have to be counted
    steps_are_exact: bool


def plan(job: Job, size: GraphSize) -> Plan:
    """Predict what a job on a graph of this size will take."""
    layout = layout_of(job.model, size.num_entities, size.num_relations)
    tables = sum(block.width for block in layout.blocks) * layout.num_entities * FLOAT
    relations = layout.num_relation_rows * layout.num_relation_columns * FLOAT
    states = {
        "rowwise_adagrad": len(layout.blocks) * layout.num_entities * FLOAT,
        "adagrad": tables,
        "adam": 2 * tables,
    }
    dense_state = relations * (2 if job.optimizer.kind == "adam" else 1)
    checkpoint = tables + relations + states[job.optimizer.kind] + dense_state
    steps, exact = _steps_per_epoch(job, size)
    names = 40 * size.num_entities
    placement, part = _placement(job, layout)
    memory = {
        "libraries": _LIBRARIES,
        "entity tables": int(part * tables),
        "relations": relations,
        "optimizer state": int(part * states[job.optimizer.kind]) + dense_state,
        "graph": _graph_bytes(job, size),
        "batch": _batch_bytes(job, layout),
        "ranking": _ranking_bytes(job, size, layout),
        # a portion of rows, as read, as Parquet and as safetensors; the C library keeps what training has freed
        "exporting": min(3 * CHUNK_BYTES, tables),
    }
    if job.runtime.workers > 1 and job.train.validate_every and size.num_valid:
        memory["tables gathered to validate"] = tables
    return Plan(
        memory=memory,
        placement=placement,
        disk={
            "graph": 3 * INT * (size.num_train + size.num_valid + size.num_test) + names,
            "checkpoints": (job.checkpoint.keep + 2) * checkpoint,
            "export": sum(2 * FLOAT * layout.num_parameters(dim) + 2 * names for dim in job.model.tiers.values()),
        },
        parameters={tier: layout.num_parameters(dim) for tier, dim in job.model.tiers.items()},
        steps_per_epoch=steps,
        total_steps=steps * job.train.epochs,
        steps_are_exact=exact,
    )


def _placement(job: Job, layout: Layout) -> tuple[str, float]:
    """Return (how tables lie on the workers, the largest share of their numbers that one worker holds)."""
    workers, ranks = job.runtime.workers, placement_of(layout, job.runtime)
    if None in ranks.values():
        return f"row_wise: each of {len(ranks)} tables is spread by rows over {workers} workers", 1 / workers
    widths = Counter({ranks[block.name]: 0 for block in layout.blocks})
    for block in layout.blocks:
        widths[ranks[block.name]] += block.width
    share = max(widths.values()) / sum(widths.values())
    idle = workers - len(widths)
    words = f"table_wise: {len(ranks)} tables on {len(widths)} of {workers} workers"
    return words + (f"; model.block_units would cut some for the other {idle}" if idle else ""), share


def _steps_per_epoch(job: Job, size: GraphSize) -> tuple[int, bool]:
    if job.loss.kind == "bce":
        return -(-size.num_train // job.train.batch_size), True
    # How many queries there are only the graph can tell; each triple asks twice, and groups answers.
    return -(-2 * size.num_train // job.train.batch_size), False


def _graph_bytes(job: Job, size: GraphSize) -> int:
    """Triples, the filter index of both sides, and the softmax's queries with the arrays that sort them."""
    triples = 3 * INT * size.num_train
    filter_index = 2 * 3 * INT * (size.num_train + size.num_valid + size.num_test)
    queries = 2 * 9 * INT * size.num_train if job.loss.kind == "softmax" else 0
    return triples + filter_index + queries


def _batch_bytes(job: Job, layout: Layout) -> int:
    """The largest tensors of a step, forward and backward.

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
        rows = min(layout.num_entities, 2 * batch_size + candidates)
        gathered = 8 * batch_size + (0 if fused else 2 * candidates)
        if fused:
            return FLOAT * ((3 * rows + gathered) * columns + 4 * len(layout.dims) * batch_size)
        return FLOAT * ((3 * rows + gathered) * columns + 6 * len(layout.dims) * pairs + 8 * SLICE_NUMBERS)
    own = 3 * train.batch_size
    candidates = layout.num_entities if negatives.kind == "all" else min(layout.num_entities, own + negatives.number)
    scored = min(len(layout.dims), job.med.sub_models_per_step or len(layout.dims))
    per_score = 5 if job.med.mutual != "off" or layout.scorer.is_distance else 3
    if fused and not layout.scorer.is_distance:
        per_score = 1
    return FLOAT * (per_score * scored * batch_size * candidates + 6 * candidates * columns)


def _ranking_bytes(job: Job, size: GraphSize, layout: Layout) -> int:
    """The ranks, and within the job's bound scores, or in the kernels the entities as tiles."""
    num_ranked = max(size.num_test, size.num_valid)
    working = 2 * job.evaluate.memory_mib * MIB
    if job.runtime.kernels == "auto":
        working = min(job.evaluate.memory_mib * MIB, 3 * FLOAT * layout.num_entities * layout.num_columns)
    return working + 4 * INT * num_ranked * len(job.model.dims)


def require_fit(job: Job, predicted: Plan, runs_directory: Path) -> None:
    """Refuse a job that this machine cannot hold.

    Raises:
        CapacityError: names what is needed, what there is, and the largest part of it.

    """
    limit = memory_limit(job)
    needed = sum(predicted.memory.values())
    if needed > limit:
        largest = max(predicted.memory, key=lambda part: predicted.memory[part])
        raise CapacityError(
            f"job {job.name} needs {_gib(needed)} GiB of memory{_each(job)} and may count on {_gib(limit)} GiB; the "
            f"largest part is the {largest} with {_gib(predicted.memory[largest])} GiB. "
            f"{_ADVICE.get(largest, _ADVICE['entity tables'])}"
        )
    free = shutil.disk_usage(_existing(runs_directory)).free
    written = sum(predicted.disk.values())
    if written > free:
        largest = max(predicted.disk, key=lambda part: predicted.disk[part])
        raise CapacityError(
            f"job {job.name} writes {_gib(written)} GiB, but {_existing(runs_directory)} has {_gib(free)} GiB free; "
            f"the largest part is {largest} with {_gib(predicted.disk[largest])} GiB. Free some, use --runs-dir,"
            " or lower checkpoint.keep"
        )


def _each(job: Job) -> str:
    return f" on each of {job.runtime.workers} workers" if job.runtime.workers > 1 else ""


_ADVICE = {
    "tables gathered to validate": "Set train.validate_every: 0, or more memory (runtime.memory_gib)",
    "batch": "Lower train.batch_size or negatives.number",
    "graph": "This graph needs a larger machine",
    "ranking": "Lower evaluate.memory_mib",
    "optimizer state": "Use optimizer.kind rowwise_adagrad, or smaller model.dims",
    "entity tables": "Use smaller model.dims, more workers, or more memory (runtime.memory_gib)",
}


def memory_limit(job: Job) -> int:
    """Return the bytes that a worker may count on: the job's word, or its part of what is free here, within limits."""
    if job.runtime.memory_gib is not None:
        return int(job.runtime.memory_gib * 2**30)
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return (min(free, int(text)) if text.isdigit() else free) // job.runtime.workers


def size_of(job: Job, graphs_directory: Location, data_root: Path) -> GraphSize:
    """Return the size of a job's graph: from its directory, the generator's numbers, or a count of its raw files.

    Raises:
        GraphError: a raw file is missing or wrong.

    """
    directory = graphs_directory / job.graph_name
    if graph_exists(directory):
        graph = open_graph(directory, verify=False)
        train, valid, test = (graph.num_triples[split] for split in ("train", "valid", "test"))
        return GraphSize(graph.num_entities, graph.num_relations, train, valid, test, f"counted in {directory}")
    synthetic = job.graph.synthetic
    if synthetic is None:
        census = take_census(job.graph, data_root)
        train, valid, test = (census.num_triples[split] for split in ("train", "valid", "test"))
        source = "counted in the raw files; duplicates counted in"
        return GraphSize(census.num_entities, census.num_relations, train, valid, test, source)
    total = synthetic.num_triples
    valid, test = int(total * job.graph.valid_fraction), int(total * job.graph.test_fraction)
    entities = sum(kind_sizes(synthetic).values())
    return GraphSize(
        entities, len(RELATIONS), total - valid - test, valid, test, "to be generated; duplicates counted in"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = job_parser(
        "plan",
        "Predict memory, parameters per tier, steps and files of a job before anything runs; refuse what cannot fit.",
    )
    size = parser.add_argument_group("graph size, to plan for a graph that does not exist yet (all three)")
    for name in ("entities", "relations", "triples"):
        size.add_argument(f"--num-{name}", type=int, metavar="N")
    arguments = parser.parse_args(argv)
    given = (arguments.num_entities, arguments.num_relations, arguments.num_triples)
    if any(number is not None and number < 1 for number in given) or 0 < given.count(None) < 3:
        parser.error("--num-entities, --num-relations and --num-triples go together, each at least 1")
    return run_command(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    job = load_job(arguments.job)
    given = (arguments.num_entities, arguments.num_relations, arguments.num_triples)
    if None not in given:
        size = GraphSize(*given, 0, 0, "given on the command line")
    else:
        size = size_of(job, arguments.graphs_dir, arguments.data_dir)
    predicted = plan(job, size)
    _print(job, size, predicted, arguments.runs_dir)
    require_fit(job, predicted, arguments.runs_dir)
    print(f"{job.name} fits.")
    return 0


def _print(job: Job, size: GraphSize, predicted: Plan, runs_directory: Path) -> None:
    out = console()
    out.print(
        f"graph {job.graph_name}: {size.num_entities:,} entities, {size.num_relations:,} relations, "
        f"{size.num_train:,} training triples ({size.source})"
    )
    about = "" if predicted.steps_are_exact else "at most "
    total = f"{about}{predicted.total_steps:,} steps in {job.train.epochs:,} epochs"
    out.print(f"{about}{predicted.steps_per_epoch:,} steps per epoch, {total}")
    if job.runtime.workers > 1:
        out.print(predicted.placement)
    title = "memory" if job.runtime.workers == 1 else f"memory of each of {job.runtime.workers} workers, at most"
    memory = Table(title=title, caption=f"of {_gib(memory_limit(job))} GiB that the job may count on")
    memory.add_column("what")
    memory.add_column("MiB", justify="right")
    for part, number in [*predicted.memory.items(), ("together", sum(predicted.memory.values()))]:
        memory.add_row(part, f"{number / MIB:,.1f}")
    out.print(memory)
    tiers = Table(title="tiers")
    for heading in ("tier", "units", "parameters", "MiB as float32"):
        tiers.add_column(heading, justify="left" if heading == "tier" else "right")
    for tier, parameters in predicted.parameters.items():
        tiers.add_row(tier, str(job.model.tiers[tier]), f"{parameters:,}", f"{parameters * FLOAT / MIB:,.1f}")
    out.print(tiers)
    run = runs_directory / job.name
    files = Table(title="files to be written", caption="checkpoints: kept ones, the best one, and one being written")
    files.add_column("where")
    files.add_column("MiB, at most", justify="right")
    places = {"graph": f"graphs: {job.graph_name}/", "checkpoints": f"{run}/checkpoints/", "export": f"{run}/export/"}
    for part, number in predicted.disk.items():
        files.add_row(places[part], f"{number / MIB:,.1f}")
    files.add_row(f"{run}/job.yaml, metrics.jsonl, tensorboard/, evaluation*.json", "a few")
    out.print(files)


def _gib(number: int) -> str:
    return f"{number / 2**30:,.2f}"


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)


if __name__ == "__main__":
    sys.exit(main())
