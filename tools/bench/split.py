"""Cutting a checkpoint into tiers: MB/s written, and memory, from 70 thousand to 7 million rows of 500 columns.

usage: python tools/bench/split.py [--rows ...] [--forms ...] [--directory DIR] [--threads N] [--quick] [--json]

The job is jobs/skg.yaml: TransE, tiers of 10, 100 and 500 units. The checkpoint is written by the real save, its tables
being random numbers that repeat after a while, so that saving needs no 14 GB of memory; the graph has the names of its
entities, and no triples. Each export is `export_run` as the verb calls it, in a process of its own, from opening the
checkpoint to the published link. `verify_s` is what hashing the checkpoint takes before anything is read, `seconds` is
all the rest, reading the graph's names and making all files durable included, loading libraries not; `mb_per_s` is
bytes written over that. `peak_mib` is the process's most memory, libraries included, and `memory_mib` what it held
before. `disk_mb_per_s` is what the same disk takes of plain bytes, as fast as they can be made, 32 MiB at a time, made
durable at the end. The directory (default: a temporary one) needs room for 49 GB with the largest table, and is empty
again afterwards.
"""

import dataclasses
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from measure import in_own_process, peak_mib, reset_peak, resident_mib
from records import Record, options, parse, publish
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata

from medscale import export
from medscale.checkpoint import layout_facts, save
from medscale.config import Job
from medscale.distributed import process_group
from medscale.graph.reader import open_graph
from medscale.graph.schema import (
    ENTITIES,
    GRAPH_FORMAT,
    GRAPH_KIND,
    NAMES_SCHEMA,
    RELATIONS,
    PartWriter,
    open_writer,
)
from medscale.jobfile import load_job
from medscale.logs import log
from medscale.manifest import write_manifest
from medscale.model.layout import layout_of

JOB = Path(__file__).resolve().parents[2] / "jobs" / "skg.yaml"
ROWS = (70_000, 700_000, 7_000_000)
#: rows of random numbers that a table repeats
DRAWN = 350_000
#: by name: what the keys of `export` say
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "delta": {"layout": "delta"},
    "int8": {"precision": "int8"},
    "core": {"formats": ()},
    "hash": {"sharding": "hash"},
}
#: by rows, where not all are measured
SOME_FORMS = {70_000: ["full"], 7_000_000: ["full", "hash"]}


def write_graph(directory: Path, rows: int) -> None:
    """Write a graph of so many entities without triples."""
    directory.mkdir(parents=True)
    with PartWriter(directory / ENTITIES, NAMES_SCHEMA) as writer:
        for start in range(0, rows, 1 << 20):
            ids = pa.array(np.arange(start, min(start + (1 << 20), rows)))
            writer.append({"id": ids, "name": pc.binary_join_element_wise("user", ids.cast(pa.string()), "/")})
    with open_writer(directory / RELATIONS, NAMES_SCHEMA) as writer:
        writer.write_table(pa.table([np.arange(12), [f"relation/{i}" for i in range(12)]], schema=NAMES_SCHEMA))
    facts = {
        "name": directory.name, "num_entities": rows, "num_relations": 12,
        "num_triples": {"train": 0, "valid": 0, "test": 0},
    }  # fmt: skip
    write_manifest(directory, GRAPH_KIND, GRAPH_FORMAT, facts)


def repeated(rows: int, width: int) -> ShardedTensor:
    """Return a table of random rows that share their memory with those `DRAWN` before them."""
    drawn = torch.randn(min(rows, DRAWN), width)
    shards = []
    for start in range(0, rows, DRAWN):
        size = min(DRAWN, rows - start)
        shards.append(Shard(drawn[:size], ShardMetadata([start, 0], [size, width], placement="rank:0/cpu")))
    return ShardedTensor._init_from_local_shards(shards, rows, width)


def write_run(job: Job, directory: Path, rows: int) -> None:
    """Write a graph, and a checkpoint of a run on it."""
    write_graph(directory / "graphs" / job.graph_name, rows)
    graph = open_graph(directory / "graphs" / job.graph_name)
    layout = layout_of(job.model, rows, graph.num_relations)
    with process_group(torch.device("cpu")):
        entities = {block.name: repeated(rows, block.width) for block in layout.blocks}
        relations = torch.randn(layout.num_relation_rows, layout.num_relation_columns)
        facts = {"step": 1, "graph_sha256": graph.sha256, **layout_facts(layout, job.model.norm)}
        save(directory / "runs" / job.name, {"entities": entities, "dense": {"relations": relations}}, facts)


def exported(job: Job, directory: Path) -> Record:
    """Export once; return its figures."""
    opened, open_tables = [], export.open_tables

    def timed(step: Path) -> Any:
        start = time.perf_counter()
        tables = open_tables(step)
        opened.append(time.perf_counter() - start)
        return tables

    export.open_tables = timed
    pa.array(np.zeros(1))  # here pyarrow loads pandas, where it is installed
    reset_peak()
    before, start = resident_mib(), time.perf_counter()
    written = export.export_run(job, directory / "runs" / job.name, graphs_dir=directory / "graphs")
    seconds = time.perf_counter() - start - opened[0]
    number = sum(tier.bytes for tier in written)
    return {
        "seconds": round(seconds, 2), "verify_s": round(opened[0], 2), "mb_per_s": round(number / 1e6 / seconds, 1),
        "peak_mib": round(peak_mib(), 1), "memory_mib": round(before, 1), "gb": round(number / 1e9, 3),
        "files": sum(tier.files for tier in written),
    }  # fmt: skip


def disk_speed(directory: Path, size: int) -> float:
    """Return MB/s of plain bytes that are made durable."""
    data, start = np.random.default_rng(0).bytes(32 << 20), time.perf_counter()
    path = directory / "plain"
    with path.open("wb", buffering=0) as file:
        for _ in range(max(1, size // len(data))):
            file.write(data)
        os.fsync(file.fileno())
    rate = max(1, size // len(data)) * len(data) / 1e6 / (time.perf_counter() - start)
    path.unlink()
    return round(rate, 1)


def records_of(rows: int, forms: list[str], threads: int, directory: Path) -> list[Record]:
    """Measure exports of a table; `directory` is empty afterwards."""
    job, records = load_job(JOB), []
    job = dataclasses.replace(job, graph=dataclasses.replace(job.graph, name=f"names-{rows}"))
    log(f"{rows:,} rows: checkpoint")
    try:
        in_own_process(threads, write_run, job, directory, rows)
        for form in forms:
            log(f"{rows:,} rows: {form}")
            section = dataclasses.replace(job.export, **FORMS[form])
            measured = in_own_process(threads, exported, dataclasses.replace(job, export=section), directory)
            shutil.rmtree(directory / "runs" / job.name / "export-versions")
            (directory / "runs" / job.name / "export").unlink()
            speed = disk_speed(directory, min(int(measured["gb"] * 1e9), 4 << 30))
            records.append({
                "scorer": job.model.scorer, "system": form, "tier": "phone, pc, server", "rows": rows,
                "sub_models": len(job.model.dims), "threads": threads, "batch": 0, "negatives": 0,
                "units": job.model.dims[-1], **measured, "disk_mb_per_s": speed,
            })  # fmt: skip
    finally:
        for kind in ("graphs", "runs"):
            shutil.rmtree(directory / kind, ignore_errors=True)
    return records


def main() -> None:
    """Measure what the options ask for."""
    parser = options(__doc__ or "", threads=[2])
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="N")
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="default: all, some of 70,000 and 7,000,000 rows")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where all is written")
    arguments = parse(parser, rows=[20_000], forms=["full", "delta"])
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        records = []
        for threads in arguments.threads:
            for rows in arguments.rows:
                forms = arguments.forms or SOME_FORMS.get(rows, list(FORMS))
                records += records_of(rows, forms, threads, directory)
    publish(arguments, records)


if __name__ == "__main__":
    main()
