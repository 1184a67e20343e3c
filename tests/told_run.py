"""A run directory as training, evaluation and export leave it, written in a moment: real files, invented numbers."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from small_tables import small_tables

from medscale.config import GraphSection, Job
from medscale.graph.ingest import ingest
from medscale.graph.reader import Graph
from medscale.jobfile import dump_job, load_job
from medscale.model.layout import layout_of
from medscale.split import ModelFacts, write_export

#: a name that runs if a page takes it for HTML, and breaks if a figure takes it for mathematics
NASTY = "<script>document.title='ran'</script><img src=x onerror=document.title='ran'> $\\frac$ \"'&amp;"
DIMS = (2, 4, 8, 16)
MRR = {2: 0.2, 4: 0.29, 8: 0.31, 16: 0.3}

JOB = """
name: told
graph: {train: [train.tsv], test: [test.tsv], entity_types: types.tsv}
model: {scorer: SCORER, reciprocal: true, dims: [2, 4, 8, 16], damping: [0.5], tiers: {phone: 2, server: 16}}
train: {epochs: 4}
"""


@dataclass(frozen=True)
class ToldRun:
    """Where everything lies, and what it was made of."""

    place: Path
    job_path: Path
    job: Job
    graph: Graph
    directory: Path

    def options(self) -> list[str]:
        return [f"--runs-dir={self.place / 'runs'}", f"--graphs-dir={self.place / 'graphs'}"]


def write_told_run(place: Path, scorer: str = "complex", *, types: bool = True) -> ToldRun:
    """Write graph, job, export, evaluation and metrics below `place`."""
    names = [f"{kind}/{number}" for kind in "abc" for number in range(20)]
    triples = [f"{names[i]}\t{('likes', NASTY)[i % 2]}\t{names[(7 * i + 3) % 60]}\n" for i in range(60)]
    (place / "train.tsv").write_text("".join(triples), encoding="utf-8")
    (place / "test.tsv").write_text(triples[0].replace("likes", NASTY), encoding="utf-8")
    kinds = {"a": NASTY, "b": "_hidden", "c": "plain"}
    (place / "types.tsv").write_text("".join(f"{name}\t{kinds[name[0]]}\n" for name in names), encoding="utf-8")
    text = JOB.replace("SCORER", scorer)
    if not types:
        text = text.replace(", entity_types: types.tsv", "")
    job_path = place / "told.yaml"
    job_path.write_text(text, encoding="utf-8")
    job = load_job(job_path)
    section: GraphSection = job.graph
    graph = ingest(section, name=job.graph_name, seed=0, data_root=place, directory=place / "graphs" / job.graph_name)
    run = place / "runs" / job.name
    run.mkdir(parents=True)
    (run / "job.yaml").write_text(dump_job(job), encoding="utf-8")
    _export(run, job, graph)
    _evaluate(run, job, graph)
    _train(run)
    return ToldRun(place, job_path, job, graph, run)


def _export(run: Path, job: Job, graph: Graph) -> None:
    facts = ModelFacts(
        run=job.name, step=40, graph=graph.name, graph_sha256=graph.sha256, scorer=job.model.scorer,
        norm=job.model.norm, damping=(0.5, 0.5, 0.5), dims=DIMS, reciprocal=True,
    )  # fmt: skip
    tables = small_tables(facts, graph.num_entities, graph.num_relations)
    write_export(tables, graph.entity_names(), graph.relation_names(), facts, job.model.tiers, run / "export")


def _evaluate(run: Path, job: Job, graph: Graph) -> None:
    (run / "evaluation.json").write_text(json.dumps(records_of(MRR)))
    layout = layout_of(job.model, graph.num_entities, graph.num_relations)
    millions = {dim: layout.num_parameters(dim) / 1e6 for dim in DIMS}
    summary = {"parameters_million": millions, "ability_retention_ratio": 0.875}
    (run / "evaluation_summary.json").write_text(json.dumps(summary))


def records_of(mrr: dict[int, float], *, num_queries: int = 20) -> list[dict[str, object]]:
    """Return records as `medscale evaluate` writes them."""
    return [
        {
            "dim": dim, "split": "test", "protocol": protocol, "side": side, "mrr": value, "hits@1": value / 2,
            "hits@3": value, "hits@10": 1.5 * value, "mean_rank": 9.0, "num_queries": num_queries,
        }
        for dim, value in mrr.items()
        for protocol, side in (("field", "both"), ("field", "head"), ("paper", "both"))
    ]  # fmt: skip


def _train(run: Path) -> None:
    draw = np.random.default_rng(0)
    lines = []
    for step in range(10, 4010, 10):
        loss = 5 / np.sqrt(step) + draw.uniform(0, 0.1)
        lines.append({
            "kind": "train", "step": step, "epoch": 1, "loss": 1.3 * loss, "hard": loss, "mutual": loss / 9,
            "regularizer": 0.0, "hard_by_dim": {str(dim): loss / dim for dim in DIMS}, "triples_per_s": 9e4 * loss,
            "batch_wait_s": {"0": loss / 100, "1": loss / 200},
        })  # fmt: skip
        if step % 1000 == 0:
            mrr = {str(dim): value * step / 4000 for dim, value in MRR.items()}
            lines.append({"kind": "valid", "step": step, "epoch": 1, "mrr": mrr, "seconds": 1.0})
    # A run that goes on has a last line that is not whole.
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "tra', encoding="utf-8")
