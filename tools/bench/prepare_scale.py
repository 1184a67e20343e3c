"""Time and memory of preparing a large graph with string names, by number of tasks.

usage: python tools/bench/prepare_scale.py [--triples N] [--tasks N ...] [--memory-mib N] [--quick] [--json]

The raw files are generated first (Parquet, a million triples each, and types of all entities; 7 users for 50
triples, as in jobs/skg.yaml) and not timed. `seconds` is all of `python -m medscale.prepare`: interpreter, where there
is more than one task a Ray cluster of this machine's own, reading, to the last byte on disk. `peak_mib` is the most
memory that all its processes, Ray's own too, held at one time, with pages that several share counted once (PSS);
`peak_rss_mib` counts them in each. All runs must give the same graph, bit for bit.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from measure import cores_for
from records import Record, options, parse, publish

from medscale.config import GraphSection, Job, ModelSection, SyntheticSection, TrainSection
from medscale.graph.reader import open_graph
from medscale.graph.synthetic import write_raw
from medscale.jobfile import dump_job
from medscale.logs import log, progress
from medscale.storage import retire_directory, sha256_of

#: seconds between two looks at memory
INTERVAL = 0.25


def descendants(process: int) -> Iterator[int]:
    """Yield a process and all that it started, directly or not."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    yield from found


def memory_of(process: int) -> tuple[float, float]:
    """Return MiB (PSS, RSS) of a process and all that it started."""
    proportional = resident = 0
    for one in descendants(process):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        proportional += sizes["Pss"]
        resident += sizes["Rss"]
    return proportional / 1024, resident / 1024


def record_of(tasks: int, threads: int, memory_mib: int, triples: int, data: Path, graphs: Path) -> tuple[Record, str]:
    """Prepare once; return the record, and the graph's identity."""
    section = GraphSection(
        train=("train/*.parquet",), entity_types="entity_types/*.parquet", valid_fraction=0.001, test_fraction=0.001,
        tasks=tasks, memory_mib=memory_mib,
    )  # fmt: skip
    model = ModelSection(scorer="transe", dims=(10,), tiers={"phone": 10})
    job = graphs.parent / f"tasks-{tasks}.yaml"
    job.write_text(dump_job(Job(name=job.stem, graph=section, model=model, train=TrainSection(epochs=1))))
    command = ["-m", "medscale.prepare", str(job), "--data-dir", str(data), "--graphs-dir", str(graphs)]
    peaks = [0.0, 0.0]
    ended = threading.Event()
    with cores_for(threads):
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], env={**os.environ, "RAY_ADDRESS": "local"})

    def watch() -> None:
        while not ended.wait(INTERVAL):
            peaks[:] = map(max, peaks, memory_of(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    if code:
        raise SystemExit(f"preparing with {tasks} tasks ended with exit code {code}")
    graph = open_graph(graphs / job.stem)
    record = {
        "triples": triples, "entities": graph.num_entities, "tasks": tasks, "threads": threads,
        "memory_mib": memory_mib, "seconds": round(seconds, 1), "triples_per_s": round(triples / seconds),
        "peak_mib": round(peaks[0], 1), "peak_rss_mib": round(peaks[1], 1),
    }  # fmt: skip
    # All but the manifest, which also tells the graph's name.
    files = sorted((graphs / job.stem).rglob("*.parquet"))
    return record, " ".join(sha256_of(path) for path in files)


def main() -> None:
    parser = options(__doc__, threads=(2,))
    parser.add_argument("--triples", type=int, default=50_000_000)
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 2], help="numbers of tasks; above 1 on Ray")
    parser.add_argument("--memory-mib", type=int, default=2048, help="graph.memory_mib")
    arguments = parse(parser, triples=300_000, memory_mib=256)
    size = arguments.triples
    records, identities = [], set()
    with tempfile.TemporaryDirectory(prefix="medscale-prepare-") as folder:
        data, graphs = Path(folder) / "data", Path(folder) / "graphs"
        section = SyntheticSection(num_users=size * 7 // 50, num_triples=size, part_triples=min(1_000_000, size // 3))
        with progress("generating", size, "triples") as advance:
            write_raw(section, 0, data, advance)
        for threads in arguments.threads:
            for tasks in arguments.tasks:
                log(f"{tasks} tasks, {threads} cores")
                record, identity = record_of(tasks, threads, arguments.memory_mib, size, data, graphs)
                records.append(record)
                identities.add(identity)
                retire_directory(graphs / f"tasks-{tasks}")
    if len(identities) > 1:
        raise SystemExit("the graphs differ")
    publish(arguments, records, ("duckdb", "ray"))


if __name__ == "__main__":
    main()
