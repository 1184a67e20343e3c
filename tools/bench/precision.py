"""What precisions and formats of exported tiers cost: quality against float32, bytes, opening, a top-10 query.

usage: python tools/bench/precision.py [--jobs JOB ...] [--runs-dir DIR] [--graphs-dir DIR] [--data-dir DIR]

Trains each job that has no export in the run directories yet, and then ranks its tiers at every precision (`medscale
fidelity`), adds an ONNX model and a search index to a copy of its tiers, and measures every format there. Queries of
formats ask for tails, twenty of them, each a test triple's; the median counts.
"""

import dataclasses
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import in_own_process
from records import Record, options, parse, publish
from workload import add_data_option

from medscale.config import Job
from medscale.errors import ExportError
from medscale.evaluate import tables_and_triples
from medscale.fidelity import precision_records
from medscale.formats import format_records
from medscale.graph.reader import Graph, open_graph
from medscale.jobfile import load_job
from medscale.logs import log
from medscale.manifest import read_manifest, write_manifest
from medscale.onnx_model import TOP_K_FILE, write_onnx
from medscale.runtime.tier import TIER_FORMAT, TIER_KIND, Tier
from medscale.search_index import INDEX_FILE, write_index

JOBS = Path(__file__).resolve().parents[2] / "jobs"
EXTRAS = {"onnx": (TOP_K_FILE, write_onnx), "index": (INDEX_FILE, write_index)}


def records_of(job: Job, threads: int, runs: Path, graphs: Path, triples: int | None) -> list[Record]:
    """Measure a finished run."""
    if triples is not None:
        job = dataclasses.replace(job, evaluate=dataclasses.replace(job.evaluate, max_triples=triples))
    graph = open_graph(graphs / job.graph_name, verify=False)
    same = {"job": job.name, "scorer": job.model.scorer, "threads": threads, "entities": graph.num_entities}
    found = [*_precisions(job, graph, runs / job.name), *_formats(job, graph, runs / job.name)]
    return [{**same, **record} for record in found]


def _precisions(job: Job, graph: Graph, run: Path) -> list[Record]:
    tables, ranked = tables_and_triples(job, graph, run, split="test", step=None)
    start = time.perf_counter()
    records = precision_records(job, graph, tables, job.model.tiers, ranked)
    log(f"{job.name}: every precision ranked in {time.perf_counter() - start:.1f} s")
    return [{"system": "precision", "triples": len(ranked), **record} for record in records]


def _formats(job: Job, graph: Graph, run: Path) -> list[Record]:
    seconds: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory(dir=run) as scratch:
        export = Path(scratch) / "export"
        shutil.copytree((run / "export").resolve(), export)
        for directory in export.iterdir():
            tier = Tier.open(directory, verify="never")
            for name, (_, write) in EXTRAS.items():
                start = time.perf_counter()
                write(tier, directory)
                seconds[tier.name, name] = round(time.perf_counter() - start, 3)
            sealed = read_manifest(directory, TIER_KIND, TIER_FORMAT, ExportError)
            write_manifest(directory, sealed.kind, sealed.format, sealed.facts)
        records = format_records(export, graph.triples("test"))
    return [
        {
            "system": "format",
            **r,
            **({"write_s": s} if (s := seconds.get((r["tier"], r["format"]))) is not None else {}),
        }
        for r in records
    ]


def main() -> None:
    parser = options(__doc__, threads=(1,))
    add_data_option(parser)
    default = [JOBS / "umls.yaml", JOBS / "quickstart.yaml"]
    parser.add_argument("--jobs", nargs="+", type=Path, default=default, metavar="JOB")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="runs there are, and new ones")
    parser.add_argument("--graphs-dir", type=Path, default=Path("graphs"))
    parser.add_argument("--triples", type=int, help="rank a sample of this many; default: all")
    arguments = parse(parser, jobs=default[:1], triples=200)
    records = []
    for path in arguments.jobs:
        job = load_job(path)
        if not (arguments.runs_dir / job.name / "export").exists():
            places = ["--runs-dir", arguments.runs_dir, "--graphs-dir", arguments.graphs_dir]
            command = [sys.executable, "-m", "medscale.train", path, "--data-dir", arguments.data_dir, *places]
            subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
        for threads in arguments.threads:
            places = (arguments.runs_dir, arguments.graphs_dir)
            records += in_own_process(threads, records_of, job, threads, *places, arguments.triples)
    publish(arguments, records, ("onnx", "onnxruntime", "faiss-cpu", "duckdb"))


if __name__ == "__main__":
    main()
