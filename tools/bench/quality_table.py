"""Write the table of committed quality results into README.md, between its two marks.

usage: python tools/bench/quality_table.py [--check]
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from readme import write_section

RESULTS = Path(__file__).parent / "results" / "quality"
#: rows of Table 11 of the paper: FB15K237, MED
PAPER = Path(__file__).with_name("paper_link_prediction.csv")


def lines(result: dict[str, Any], shown: int = 6) -> Iterator[str]:
    """Yield a table row per dim of one result; of many dims only some, the smallest and the largest included."""
    summary, environment = result["summary"], result["environment"]
    both = {r["dim"]: r for r in result["evaluation"] if (r["protocol"], r["side"]) == ("field", "both")}
    dims = sorted(both)
    if len(dims) > shown:
        dims = [d for d in dims if d in (10, 40, 160) or d == dims[-1]]
    ranked = f"{summary['triples_ranked']:,}"
    if summary["triples_ranked"] < summary["triples_in_split"]:
        ranked += f" of {summary['triples_in_split']:,}"
    cores = f"{environment['cores']} core" + ("s" if environment["cores"] > 1 else "")
    # the best step by validation is ranked, which need not be the last
    steps = f"to epoch {result['epochs_trained']}, step {summary['step']:,} ranked"
    run = f"{steps}, {result['wall_seconds'] / 60:.1f} min, {cores}"
    paper = paper_mrr(summary["job"])
    for number, dim in enumerate(dims):
        r = both[dim]
        head = [f"`{summary['job']}`", run, ranked] if number == 0 else ["", "", ""]
        figures = [f"{r[k]:.3f}" for k in ("mrr", "hits@1", "hits@3", "hits@10")]
        yield "| " + " | ".join([*head, str(dim), *figures, paper.get(dim, "")]) + " |"


def paper_mrr(job: str) -> dict[int, str]:
    """Return the paper's MRR by dim (MED, after up to 3000 epochs) for a job that trains by its letter."""
    if not job.endswith("_paper"):
        return {}
    scorer = job.split("_")[-2]
    with PAPER.open() as file:
        return {int(r["dim"]): r["value"] for r in csv.DictReader(file) if r["model"].lower() == scorer}


def table() -> str:
    """Return the section of the README."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    dates = sorted({r["environment"]["date"] for r in results})
    cpus = sorted({r["environment"]["cpu"] for r in results})
    rows = ["| job | training and all else | test triples | dim | MRR | Hits@1 | Hits@3 | Hits@10 | MRR in the paper |"]
    rows += ["|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for result in results:
        rows += lines(result)
    protocol = results[0]["summary"]["protocol"]
    note = (
        f"One run each, {', '.join(dates)}, {', '.join(cpus)}, no GPU. Test split, both sides, {protocol}. "
        "Minutes are wall time of the whole job: preparing, training, ranking, exporting. "
        "All but `umls` and `quickstart` shared the machine with other work. "
        "In `fb15k237`, `wn18rr`, `umls` and `quickstart` the sub-models learn by softmax, damped nesting and mutual "
        "learning; evolutionary improvement and dynamic loss weight are off there. "
        "The `_paper` jobs follow the letter of the paper (`preset: paper`) and were cut off after the minutes shown, "
        "a small part of the 3000 epochs that the paper allows; its figures stand beside them. "
        "Every figure is in `tools/bench/results/quality/`, and `python tools/bench/quality.py JOB` measures it anew."
    )
    return "\n".join([*rows, "", note])


if __name__ == "__main__":
    write_section("quality_table.py", table())
