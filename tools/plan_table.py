"""Write the tables and formulas of k8s/README.md from what `medscale plan` counts.

usage: python tools/plan_table.py [--check]

With --check nothing is written; the exit code is 1 where the file is out of date.
"""

import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from medscale.capacity import Limits, fitting, smallest_fitting
from medscale.config import Job
from medscale.jobfile import load_job
from medscale.memory import GraphSize
from medscale.pace import Speeds
from medscale.plan import formulas, plan

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "k8s" / "README.md"
START = "<!-- plans: written by tools/plan_table.py -->"
END = "<!-- end of plans -->"

GRAPHS = (
    GraphSize(10**8, 100, 10**9, 0, 0, "given"),
    GraphSize(10**9, 100, 10**10, 0, 0, "given"),
)
#: (GPUs, what they are called, GiB that a job may count on, GB/s of their memory by the data sheet)
CLUSTERS = ((8, "80 GB", 78, 3350.0), (32, "80 GB", 78, 3350.0), (8, "141 GB", 139, 4800.0))
BATCHES = (8_192, 262_144)
GIB, MIB = 2**30, 2**20


def written() -> str:
    """Return what stands between the marks."""
    return "\n".join([*_table(), "", *_speeds(), "", "```text", "\n".join(formulas()).rstrip(), "```"])


def _table() -> Iterator[str]:
    yield (
        "| entities | triples | GPUs | batch | `placement`, `table_memory` | GiB of a GPU | GiB of its host "
        "| MiB sent per step | ms per step | h per epoch | fewest GPUs with tables on them |"
    )
    yield "|---:|---:|---|---:|---|---:|---:|---:|---:|---:|---:|"
    job = load_job(ROOT / "k8s" / "overlays" / "gpu-nodes" / "job.yaml")
    for size in GRAPHS:
        for gpus, kind, gib, bandwidth in CLUSTERS:
            for batch in BATCHES:
                yield _row(_on(job, gpus, gib, batch), size, f"{gpus} x {kind}", Speeds(memory_gb_s=bandwidth))


def _on(job: Job, gpus: int, gib: int, batch: int) -> Job:
    runtime = replace(job.runtime, workers=gpus, device="cuda", memory_gib=float(gib))
    return replace(job, runtime=runtime, train=replace(job.train, batch_size=batch))


def _row(job: Job, size: GraphSize, cluster: str, speeds: Speeds) -> str:
    assert job.runtime.memory_gib is not None
    limits = Limits(host=None, device=int(job.runtime.memory_gib * GIB))
    fit, fewest = fitting(job, size, limits), smallest_fitting(job, size, limits, ["device"])
    cells = [f"{size.num_entities:,}", f"{size.num_train:,}", cluster, f"{job.train.batch_size:,}"]
    if fit is None:
        cells += ["none fits", *["-"] * 5]
    else:
        predicted, runtime = plan(fit.job, size, speeds), fit.job.runtime
        seconds = sum(predicted.step_seconds.values())
        cached = "" if runtime.cache_fraction is None else f", `cache_fraction` {runtime.cache_fraction:g}"
        cells += [
            f"`{runtime.placement}`, `{runtime.table_memory}`{cached}",
            f"{sum(fit.memory.device.values()) / GIB:.1f}",
            f"{sum(fit.memory.host.values()) / GIB:.0f}",
            f"{predicted.traffic.total / MIB:.1f}",
            f"{seconds * 1e3:.1f}",
            f"{seconds * predicted.steps_per_epoch / 3600:.2f}",
        ]
    return "| " + " | ".join([*cells, "-" if fewest is None else str(fewest.job.runtime.workers)]) + " |"


def _speeds() -> Iterator[str]:
    assumed = ", ".join(f"`{field.name}` {getattr(Speeds(), field.name):g}" for field in fields(Speeds))
    yield f"Assumed for each worker: {assumed}; `memory_gb_s` 4800 for the GPUs of 141 GB. The formulas:"


def outputs() -> dict[Path, str]:
    """Return what each written file must hold."""
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    return {README: f"{before}{START}\n{written()}\n{END}{rest.partition(END)[2]}"}


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.exit(__doc__)
    ((path, text),) = outputs().items()
    if path.read_text(encoding="utf-8") == text:
        return 0
    if arguments:
        print(f"{path} is out of date: run python tools/plan_table.py", file=sys.stderr)
        return 1
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
