"""What using a tier costs: opening, look-ups, top-10 among a million rows, answers in bulk, and cascades.

usage: python tools/bench/runtime.py [--rows N] [--run RUN] [--queries N] [--quick] [--json]

Open, look-ups and top-10 are of random tiers (numbers do not change what a scan costs) of 10 and 100 columns, at
float32 and int8, against exact search by faiss (`IndexFlat`) and usearch (`search(..., exact=True)`) on the same rows,
threads and k, where they are installed and know the metric. A record of `top_10` has the median and the 99th
percentile of single queries; one of `bulk` 256 queries that share a scan. Cascades are measured on the tiers of a run,
`--run`, or else of one that jobs/skg.yaml trains on a generated graph of about `--entities` entities for `--epochs`
epochs: random rows have nothing that their first columns could tell of the others. They are asked for the tails of
heads and relations of validation triples; some are sized (`Cascade.shortlist_for`) on others of these. `recall` is the
share of the ten best of the largest tier that the cascade finds, `speedup` the median time of that tier's own top-10
over the cascade's (of `bulk`: over that of single queries), `mrr` that of the run's own evaluation by tier, on as many
test triples as its job says. Each measurement has as many cores as threads.
"""

import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import in_own_process
from records import Record, options, parse, publish
from skg_scale import job_of

from medscale.errors import MedscaleError
from medscale.graph.reader import open_graph
from medscale.jobfile import dump_job, load_job
from medscale.logs import log
from medscale.runtime import Cascade, Tier
from medscale.runtime import precision as coded
from medscale.runtime.scan import best_of_each

K = 10
#: scorer, norm: what is measured of it is the scan of its geometry
SCORERS = (("distmult", "l1"), ("transe", "l1"), ("transe", "l2"), ("rotate", "l1"))
TIERS = {"phone": 10, "pc": 100}
BULK = 256
LOOKUPS = 20_000
#: queries that cascades are sized on, apart from those measured
SAMPLES = 200


def write_random_tiers(directory: Path, scorer: str, norm: str, precision: str, rows: int) -> None:
    """Write tiers of 10 and 100 columns with the plain writer of the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    writer = importlib.import_module("tier_writer")
    # Value by value a million rows would take an hour; tests compare the two.
    writer.encode = coded.encode
    unit, relation_unit = len(writer.ENTITY_UNIT[scorer]), len(writer.RELATION_UNIT[scorer])
    draw = np.random.default_rng(0)
    dims = {name: columns // unit for name, columns in TIERS.items()}
    model = writer.Model(
        draw.standard_normal((rows, 100), dtype=np.float32),
        draw.standard_normal((4, dims["pc"] * relation_unit), dtype=np.float32),
        [f"entity/{i}" for i in range(rows)], ["a", "b", "c", "d"], scorer, norm, tuple(dims.values()), (1.0,),
    )  # fmt: skip
    for name, dim in dims.items():
        writer.write_tiers(directory, model, {name: dim}, writer.Format(precision=precision))


def percentiles(ask: Callable[[int], object], number: int) -> dict[str, float]:
    """Return the median and the 99th percentile of the milliseconds of some calls, after one to warm up."""
    ask(0)
    times = []
    for i in range(number):
        start = time.perf_counter()
        ask(i)
        times.append(1000 * (time.perf_counter() - start))
    return {"p50_ms": round(float(np.percentile(times, 50)), 3), "p99_ms": round(float(np.percentile(times, 99)), 3)}


def measure_tiers(directory: Path, scorer: str, norm: str, precision: str, queries: int, threads: int) -> list[Record]:
    """Measure tiers that lie in a directory."""
    records = []
    for name in TIERS:
        common = {
            "scorer": scorer, "norm": norm, "precision": precision, "tier": name, "threads": threads,
            "rows": 0, "columns": TIERS[name],
        }  # fmt: skip
        for verify in ("always", "never"):
            start = time.perf_counter()
            tier = Tier.open(directory / name, verify, threads=threads)
            seconds = time.perf_counter() - start
            common["rows"] = tier.num_entities
            records.append(
                {"system": "medscale", "what": f"open, verify {verify}", **common, "seconds": round(seconds, 4)}
            )
        lookups = min(LOOKUPS, tier.num_entities // 10)
        names = [f"entity/{i}" for i in np.random.default_rng(1).integers(0, tier.num_entities, lookups)]
        start = time.perf_counter()
        for one in names:
            tier.vector(one)
        seconds = time.perf_counter() - start
        records.append(
            {"system": "medscale", "what": "look-ups by name", **common, "seconds": round(seconds, 4),
             "lookups_per_s": round(lookups / seconds)}
        )  # fmt: skip
        figures = percentiles(lambda i, tier=tier: tier.top_k(i, i % 4, K), queries)  # type: ignore[misc]
        records.append({"system": "medscale", "what": "top_10", **common, **figures})
        asked = [tier.query(i, i % 4, "tail") for i in range(BULK)]
        start = time.perf_counter()
        best_of_each(asked, tier.rows, K, threads=threads, length=tier.length(asked[0]))
        seconds = time.perf_counter() - start
        records.append(
            {"system": "medscale", "what": "bulk", **common, "seconds": round(seconds, 3),
             "p50_ms": round(1000 * seconds / BULK, 3), "speedup": round(figures["p50_ms"] * BULK / seconds / 1000, 2)}
        )  # fmt: skip
        if precision == "float32":
            records += [{**common, **record} for record in measure_peers(tier, scorer, norm, queries, threads)]
    return records


def measure_peers(tier: Tier, scorer: str, norm: str, queries: int, threads: int) -> list[Record]:
    """Measure exact search by other libraries among the same rows, for the same queries, folded into a vector."""
    geometry = {"distmult": "product", "rotate": "modulus"}.get(scorer, norm)
    rows = tier.vectors(np.arange(tier.num_entities))
    folded = [tier.query(i, i % 4, "tail").vector.astype(np.float32) for i in range(queries)]
    records = []
    if importlib.util.find_spec("faiss") and geometry != "modulus":
        faiss = importlib.import_module("faiss")
        faiss.omp_set_num_threads(threads)
        metric = {"product": faiss.METRIC_INNER_PRODUCT, "l1": faiss.METRIC_L1, "l2": faiss.METRIC_L2}[geometry]
        index = faiss.IndexFlat(rows.shape[1], metric)
        index.add(rows)
        figures = percentiles(lambda i: index.search(folded[i][None], K), queries)
        records.append({"system": "faiss", "what": "top_10", **figures})
    if importlib.util.find_spec("usearch") and geometry in ("product", "l2"):
        usearch = importlib.import_module("usearch.index")
        metric = usearch.MetricKind.IP if geometry == "product" else usearch.MetricKind.L2sq
        figures = percentiles(
            lambda i: usearch.search(rows, folded[i], K, metric, exact=True, threads=threads), queries
        )
        records.append({"system": "usearch", "what": "top_10", **figures})
    return records


def measure_cascade(run: Path, graphs: Path, queries: int, threads: int) -> list[Record]:
    """Measure cascades of a run's tiers, and the largest tier alone."""
    job = load_job(run / "job.yaml")
    chain = [Tier.open(run / "export" / name, threads=threads) for name in job.model.tiers]
    largest, cascade = chain[-1], Cascade(chain)
    triples = open_graph(graphs / job.graph_name).triples("valid")
    number = queries + SAMPLES
    drawn = np.random.default_rng(2).choice(triples, number, replace=len(triples) < number).tolist()
    asked = [(head, relation) for head, relation, _ in drawn[:queries]]
    samples = [(head, relation, None) for head, relation, _ in drawn[queries:]]
    evaluated = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    mrr = {r["dim"]: round(r["mrr"], 4) for r in evaluated if (r["protocol"], r["side"]) == ("field", "both")}
    common = {
        "scorer": largest.scorer, "norm": largest.facts["norm"], "precision": largest.checked_facts.precision,
        "tier": " > ".join(tier.name for tier in chain), "threads": threads, "rows": largest.num_entities,
        "columns": largest.columns, "mrr": {tier.name: mrr[tier.facts["dim"]] for tier in chain},
    }  # fmt: skip
    plain = percentiles(lambda i: largest.top_k(*asked[i], K), queries)
    records: list[Record] = [
        {"system": "medscale", "what": "largest tier alone", **common, **plain, "recall": 1.0, "speedup": 1.0}
    ]
    best = [set(largest.top_k(*one, K)[0]) for one in asked]
    rows = largest.num_entities
    shares = ((rows * share // 100, rows * share // 1000) for share in (1, 5, 20))
    cases: list[tuple[str, dict[str, Any]]] = [
        ("cascade, exact", {}),
        ("cascade", {"exact": False}),
        *(("cascade", {"exact": False, "shortlist": sizes}) for sizes in shares),
        *(
            (f"cascade, sized for recall {r}", {"exact": False, "shortlist": cascade.shortlist_for(samples, K, r)})
            for r in (0.95, 0.97, 0.99)
        ),
    ]
    for what, how in cases:
        try:
            figures = percentiles(lambda i, how=how: cascade.top_k(*asked[i], K, **how), queries)  # type: ignore[misc]
        except MedscaleError as cause:
            log(f"{what}: {cause}")
            continue
        answers = [cascade.top_k(*one, K, **how) for one in asked]
        recall = float(np.mean([len(b & set(a.names)) / K for a, b in zip(answers, best, strict=True)]))
        pruned = np.mean([a.pruned for a in answers], axis=0).round(4).tolist()
        records.append({
            "system": "medscale", "what": what, **common, **figures, "recall": round(recall, 4),
            "speedup": round(plain["p50_ms"] / figures["p50_ms"], 2), "pruned": pruned,
        })  # fmt: skip
    return records


def trained(entities: int, epochs: int, directory: Path) -> Path:
    """Train jobs/skg.yaml on a graph of about as many entities, under `directory`, and return the run."""
    job = job_of(entities, None)
    training = dataclasses.replace(job.train, epochs=epochs, validate_every=epochs)
    path = directory / "chain.yaml"
    path.write_text(dump_job(dataclasses.replace(job, name="chain", train=training)), encoding="utf-8")
    command = [sys.executable, "-m", "medscale.train", str(path), "--runs-dir", str(directory)]
    subprocess.run([*command, "--graphs-dir", str(directory)], check=True, stdout=sys.stderr)
    return directory / "chain"


def measured(rows: int, precisions: Sequence[str], queries: int, threads: int) -> list[Record]:
    """Write and measure random tiers of every scorer."""
    records = []
    for scorer, norm in SCORERS:
        for precision in precisions:
            log(f"{scorer} {norm} {precision}, {threads} threads")
            with tempfile.TemporaryDirectory() as directory:
                write_random_tiers(Path(directory), scorer, norm, precision, rows)
                records += in_own_process(
                    threads, measure_tiers, Path(directory), scorer, norm, precision, queries, threads
                )
    return records


def main() -> None:
    """Measure what the options ask for."""
    parser = options(__doc__ or "", threads=[2])
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="rows of random tiers")
    parser.add_argument("--queries", type=int, default=50, metavar="N", help="queries timed one by one")
    parser.add_argument("--precisions", nargs="+", choices=coded.PRECISIONS, default=["float32", "int8"])
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run whose tiers are the chain, such as runs/NAME")
    parser.add_argument("--graphs-dir", type=Path, default="graphs", metavar="DIR", help="holds that run's graph")
    parser.add_argument("--entities", type=int, default=300_000, metavar="N", help="of the graph to train on else")
    parser.add_argument("--epochs", type=int, default=8, metavar="N")
    arguments = parse(parser, rows=4_000, queries=3, entities=3_000, epochs=1, precisions=["float32"])
    records = []
    for threads in arguments.threads:
        records += measured(arguments.rows, arguments.precisions, arguments.queries, threads)
    with tempfile.TemporaryDirectory() as directory:
        run, graphs = arguments.run, arguments.graphs_dir
        if run is None:
            run, graphs = trained(arguments.entities, arguments.epochs, Path(directory)), Path(directory)
        for threads in arguments.threads:
            records += in_own_process(threads, measure_cascade, run, graphs, arguments.queries, threads)
    publish(arguments, records, ("faiss-cpu", "usearch"))


if __name__ == "__main__":
    main()
