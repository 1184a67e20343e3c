"""What a job will take, before anything runs: `python -m medscale.plan JOB`.

Memory (`memory`), bytes over the network (`traffic`) and, on GPUs, expected time (`pace`) are counted from the job
and the graph's size. A job whose parts do not fit is refused with the number that breaks it, and the placement and
the number of workers that would do are searched for by the same counts.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from medscale import memory as memory_module
from medscale import pace as pace_module
from medscale import traffic as traffic_module
from medscale.capacity import Limits, advice_on, in_gib, limits_of, on_cuda, require_memory
from medscale.config import DISTANCES, MOST_WORKERS, Job, conflicts
from medscale.errors import CapacityError, ConfigError
from medscale.graph.census import take_census
from medscale.graph.growth import files_of_new_triples, others_wanted
from medscale.graph.reader import graph_exists, open_graph
from medscale.graph.schema import GROWTH
from medscale.graph.synthetic import RELATIONS, kind_sizes
from medscale.jobfile import load_job
from medscale.location import Location
from medscale.logs import console
from medscale.memory import MIB, GraphSize, Memory, beside_workers, memory_of, state_numbers, step_size
from medscale.model.embedding import Placement
from medscale.model.layout import Layout, layout_of
from medscale.options import job_parser, run_command
from medscale.pace import Speeds, step_seconds
from medscale.prepare import extended_graph
from medscale.sharding import FLOAT, placement_of
from medscale.traffic import INT, Traffic, bytes_per_step

__all__ = [
    "GraphSize",
    "Plan",
    "formulas",
    "main",
    "plan",
    "require_fit",
    "size_of",
]


@dataclass(frozen=True)
class Plan:
    """A job's predicted needs; bytes unless named otherwise."""

    #: what a worker holds; of several workers, the one that holds most
    memory: Memory
    #: several workers: how tables lie on them
    placement: str
    #: what the worker that sends most sends in a step
    traffic: Traffic
    #: on GPUs: expected seconds of a step by what takes them
    step_seconds: Mapping[str, float]
    #: disk by what is written, checkpoints counted while one is being written
    disk: Mapping[str, int]
    #: parameters of each tier
    parameters: Mapping[str, int]
    steps_per_epoch: int
    total_steps: int
    #: exact unless queries still have to be counted
    steps_are_exact: bool


def plan(job: Job, size: GraphSize, speeds: Speeds | None = None) -> Plan:
    """Predict what a job on a graph of this size will take."""
    layout, workers = layout_of(job.model, size.num_entities, size.num_relations), job.runtime.workers
    placement, step = placement_of(layout, job.runtime), step_size(job, layout)
    columns = sum(block.width for block in layout.blocks)
    relations = layout.num_relation_rows * layout.num_relation_columns * (3 if job.optimizer.kind == "adam" else 2)
    row = columns + state_numbers(job, columns, len(layout.blocks))
    steps, exact = _steps_per_epoch(job, size)
    names = 40 * size.num_entities
    return Plan(
        memory=memory_of(job, size, layout, placement, on_cuda=on_cuda(job)),
        placement=_placement_in_words(layout, placement, workers),
        traffic=max(bytes_per_step(layout, placement, [step.rows] * workers), key=lambda traffic: traffic.total),
        step_seconds=step_seconds(layout, placement, workers, step, speeds or Speeds()) if on_cuda(job) else {},
        disk={
            "graph": 3 * INT * (size.num_train + size.num_valid + size.num_test) + names,
            "checkpoints": (job.checkpoint.keep + 2) * FLOAT * (row * layout.num_entities + relations),
            "export": _export_bytes(job, layout, names),
        },
        parameters={tier: layout.num_parameters(dim) for tier, dim in job.model.tiers.items()},
        steps_per_epoch=steps,
        total_steps=steps * job.train.epochs,
        steps_are_exact=exact,
    )


def _export_bytes(job: Job, layout: Layout, names: int) -> int:
    """Return the bytes of one export; another one takes as much, until `export.keep` are there."""
    number = {"float32": FLOAT, "float16": FLOAT / 2, "int8": 1, "int4": 0.5}[job.export.precision]
    copy = {"float16": FLOAT / 2}.get(job.export.precision, FLOAT) if "parquet" in job.export.formats else 0
    copies = 2 if copy else 1
    scales, norms = job.export.precision in ("int8", "int4"), job.model.scorer not in DISTANCES
    written, below = 0.0, 0
    for cuts, dim in enumerate(sorted(job.model.tiers.values()), 1):
        numbers = (dim - below) * layout.scorer.unit_columns * layout.num_entities
        relations = (dim - below) * layout.scorer.relation_unit_columns * layout.num_relation_rows
        # A scale per row and cut, and a norm.
        margins = (scales + norms) * FLOAT * layout.num_entities * (1 if below else cuts)
        written += (number + copy) * numbers + copies * FLOAT * relations + margins + (0 if below else copies * names)
        below = dim if job.export.layout == "delta" else 0
    return math.ceil(written)


def _placement_in_words(layout: Layout, placement: Placement, workers: int) -> str:
    ranks = placement.ranks
    where = "" if placement.memory == "device" else f"; in {placement.memory}, {placement.cache_fraction:.0%} cached"
    if placement.is_row_wise:
        return f"row_wise: each of {len(ranks)} tables is spread by rows over {workers} workers{where}"
    holders = set(ranks.values())
    words = f"table_wise: {len(ranks)} tables on {len(holders)} of {workers} workers{where}"
    idle = workers - len(holders)
    return words + (f"; model.block_units would cut some for the other {idle}" if idle else "")


def _steps_per_epoch(job: Job, size: GraphSize) -> tuple[int, bool]:
    number = size.num_growth if job.freezes else size.num_train
    if job.loss.kind == "bce":
        return -(-number // job.train.batch_size), True
    # How many queries there are only the graph can tell; each triple asks twice, and groups answers.
    return -(-2 * number // job.train.batch_size), False


def require_fit(job: Job, predicted: Plan, runs_directory: Path, limits: Limits | None = None) -> None:
    """Refuse a job that its workers, or this machine's disk, cannot hold.

    Raises:
        CapacityError: names what is needed, what there is, and the largest part of it.

    """
    require_memory(job, predicted.memory, limits or limits_of(job))
    free = shutil.disk_usage(_existing(runs_directory)).free
    written = sum(predicted.disk.values())
    if written > free:
        largest = max(predicted.disk, key=lambda part: predicted.disk[part])
        raise CapacityError(
            f"job {job.name} writes {in_gib(written)} GiB, but {_existing(runs_directory)} has {in_gib(free)} free; "
            f"the largest part is {largest} with {in_gib(predicted.disk[largest])} GiB. Free some, use --runs-dir,"
            " or lower checkpoint.keep"
        )


def size_of(job: Job, graphs_directory: Location, data_root: Path) -> GraphSize:
    """Return the size of a job's graph: from its directory, the generator's numbers, or a count of its raw files.

    Raises:
        GraphError: a raw file is missing or wrong.

    """
    directory = graphs_directory / job.graph_name
    if graph_exists(directory):
        graph = open_graph(directory, verify=False)
        train, valid, test = (graph.num_triples[split] for split in ("train", "valid", "test"))
        growth = graph.num_triples.get(GROWTH, 0)
        return GraphSize(graph.num_entities, graph.num_relations, train, valid, test, f"counted in {directory}", growth)
    if job.extend.run is not None:
        return _grown_size(job, graphs_directory, data_root)
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


def _grown_size(job: Job, graphs_directory: Location, data_root: Path) -> GraphSize:
    old, triples = extended_graph(job, graphs_directory, verify=False), job.extend.triples
    files_of_new_triples(job.graph, triples, data_root)  # in whose errors the job's key is the right one
    read_alone = replace(
        job.graph, train=triples, valid=(), test=(), entity_types=None, synthetic=None, valid_fraction=0.0,
        test_fraction=0.0,
    )  # fmt: skip
    new = take_census(read_alone, data_root)
    others = others_wanted(new.num_triples["train"], job.extend.others)
    return GraphSize(
        old.num_entities + new.num_entities, old.num_relations + new.num_relations,
        old.num_triples["train"] + new.num_triples["train"], old.num_triples["valid"], old.num_triples["test"],
        f"counted in {old.directory} and the files of new triples; what both hold counted twice",
        new.num_triples["train"] + min(others, old.num_triples["train"]),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = job_parser(
        "plan",
        "Predict memory, bytes over the network, parameters per tier, steps and files of a job before anything runs; "
        "refuse what cannot fit, and say what would.",
    )
    size = parser.add_argument_group("graph size, to plan for a graph that does not exist yet (all three)")
    for name in ("entities", "relations", "triples"):
        size.add_argument(f"--num-{name}", type=int, metavar="N")
    machines = parser.add_argument_group("machines, instead of the job's")
    machines.add_argument("--workers", type=int, metavar="K")
    machines.add_argument("--device", choices=("cpu", "cuda"))
    machines.add_argument("--memory-gib", type=float, metavar="M", help="of each worker, on cuda of its GPU")
    machines.add_argument("--host-memory-gib", type=float, metavar="M", help="on cuda: of each worker's host")
    machines.add_argument("--batch-size", type=int, metavar="N")
    assumed = parser.add_argument_group("speeds of each worker's machine, on cuda; data sheets, not measured")
    for field in fields(Speeds):
        option = f"--{field.name.replace('_', '-')}"
        assumed.add_argument(option, type=float, default=field.default, metavar="X", help=f"default: {field.default:g}")
    parser.add_argument("--formulas", action=_Formulas, help="print by which formulas all this is counted, and end")
    arguments = parser.parse_args(argv)
    given = (arguments.num_entities, arguments.num_relations, arguments.num_triples)
    if any(number is not None and number < 1 for number in given) or 0 < given.count(None) < 3:
        parser.error("--num-entities, --num-relations and --num-triples go together, each at least 1")
    positive = ("workers", "memory_gib", "host_memory_gib", "batch_size", *(f.name for f in fields(Speeds)))
    for name in positive:
        if (value := getattr(arguments, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0, and finite")
    if arguments.workers is not None and arguments.workers > MOST_WORKERS:
        parser.error(f"--workers {arguments.workers} is more than a job may have: at most {MOST_WORKERS}")
    if arguments.reached > 1:
        parser.error("--reached is a share: at most 1")
    return run_command(lambda: _main(arguments))


class _Formulas(argparse.Action):
    """Prints the formulas and ends, as `--help` does: no job is needed."""

    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **keywords)

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        print("\n".join(formulas()))
        parser.exit()


def _main(arguments: argparse.Namespace) -> int:
    job = _with_machines(load_job(arguments.job), arguments)
    given = (arguments.num_entities, arguments.num_relations, arguments.num_triples)
    if None not in given:
        size = GraphSize(*given, 0, 0, "given on the command line")
    else:
        size = size_of(job, arguments.graphs_dir, arguments.data_dir)
    speeds = Speeds(**{field.name: getattr(arguments, field.name) for field in fields(Speeds)})
    predicted, limits = plan(job, size, speeds), limits_of(job)
    if arguments.host_memory_gib is not None:
        if not on_cuda(job):
            raise ConfigError(["--host-memory-gib is for workers on cuda; on cpu --memory-gib says it all"])
        limits = replace(limits, host=int(arguments.host_memory_gib * 2**30))
    _print(job, size, predicted, arguments.runs_dir, limits)
    if predicted.step_seconds:
        _print_pace(predicted, speeds)
    advice = advice_on(job, size, limits)
    try:
        require_memory(job, predicted.memory, limits)
    except CapacityError as error:
        raise CapacityError(f"{error}. What would fit: {advice}" if advice else str(error)) from None
    # What is planned for machines elsewhere is not measured against this one's disk.
    if arguments.workers is None and arguments.device is None:
        require_fit(job, predicted, arguments.runs_dir, limits)
    if on_cuda(job) and limits.device is None:
        print(f"{job.name} fits if its GPUs do; there is none here to ask: --memory-gib says how much memory each has.")
    else:
        print(f"{job.name} fits{f': {advice}' if advice else ''}.")
    if job.runtime.table_memory == "ssd":
        print(
            "Training refuses runtime.table_memory ssd, which is counted only: public builds of FBGEMM lack its tables."
        )
    return 0


def formulas() -> Iterator[str]:
    """Yield the lines of the formulas by which plans are counted."""
    for module in (memory_module, traffic_module, pace_module):
        assert module.__doc__ is not None
        yield from module.__doc__.strip().splitlines()
        yield ""


def _with_machines(job: Job, arguments: argparse.Namespace) -> Job:
    """Return the job on the machines of the command line.

    Raises:
        ConfigError: they do not go with the job's other keys.

    """
    asked = {name: getattr(arguments, name) for name in ("workers", "device", "memory_gib")}
    runtime = replace(job.runtime, **{name: value for name, value in asked.items() if value is not None})
    train = replace(job.train, batch_size=arguments.batch_size or job.train.batch_size)
    job = replace(job, runtime=runtime, train=train)
    if problems := [f"{arguments.job}: {key}: {problem}" for key, problem in conflicts(job)]:
        raise ConfigError(problems)
    return job


def _print_pace(predicted: Plan, speeds: Speeds) -> None:
    assumed = ", ".join(f"{field.name} {getattr(speeds, field.name):g}" for field in fields(speeds))
    table = Table(title="expected time, not measured", caption=f"assumed: {assumed}")
    table.add_column("what")
    table.add_column("ms per step", justify="right")
    total = sum(predicted.step_seconds.values())
    for part, seconds in [*predicted.step_seconds.items(), ("together", total)]:
        table.add_row(part, f"{seconds * 1e3:,.3f}")
    table.add_row("an epoch", f"{total * predicted.steps_per_epoch / 3600:,.2f} h")
    console().print(table)


def _print(job: Job, size: GraphSize, predicted: Plan, runs_directory: Path, limits: Limits) -> None:
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
    each = "" if job.runtime.workers == 1 else f" of each of {job.runtime.workers} workers, at most"
    if predicted.memory.device:
        out.print(_memory_table(f"GPU memory{each}", predicted.memory.device, limits.device))
    out.print(_memory_table(f"memory{each}", predicted.memory.host, limits.host))
    for who, held in beside_workers(job, layout_of(job.model, size.num_entities, size.num_relations)).items():
        out.print(f"beside the workers, {who} holds about {held / MIB:,.0f} MiB wherever Ray starts it")
    if job.runtime.workers > 1:
        sent = Table(title="sent over the network by the worker that sends most")
        sent.add_column("what")
        sent.add_column("KiB per step", justify="right")
        for field in fields(predicted.traffic):
            sent.add_row(field.name, f"{getattr(predicted.traffic, field.name) / 1024:,.1f}")
        sent.add_row("together", f"{predicted.traffic.total / 1024:,.1f}")
        out.print(sent)
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


def _memory_table(title: str, parts: Mapping[str, int], limit: int | None) -> Table:
    known = (
        f"of {in_gib(limit)} GiB that the job may count on" if limit is not None else "how much there is is not known"
    )
    table = Table(title=title, caption=known)
    table.add_column("what")
    table.add_column("MiB", justify="right")
    for part, number in [*parts.items(), ("together", sum(parts.values()))]:
        table.add_row(part, f"{number / MIB:,.1f}")
    return table


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)


if __name__ == "__main__":
    sys.exit(main())
