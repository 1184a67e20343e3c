"""jobs/skg.yaml on one machine: prepared, trained for some steps, saved, evaluated and exported, stage by stage.

usage: python tools/bench/skg_run.py [--entities N] [--steps N] [--directory DIR] [--quick] [--json]

Every stage is the verb that users run, in a process of its own; training gets a SIGTERM once it has told of the asked
number of steps, saves and ends. The job is the shipped one but for how often steps are told, how many triples the
evaluation ranks (500, so 1,000 queries, each among all entities), and the check that four checkpoints and two exports
fit on the disk, which is passed by. `seconds` and `peak_mib` (largest resident set) are of the stage. Training's
`triples_per_s` is the median over its records, `slowest_per_s` the slowest record but for the first, `grown_mib` what
its resident memory grew by from a tenth of the way to its last step; `checkpoint_s` is the time from the signal to the
end. `mrr` is of the largest sub-model, filtered, both sides, mean ranks for ties, all entities as candidates: after a
third of an epoch it shows that the run works, no more. The directory (default: a temporary one) needs about 75 GB.
"""

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from records import Record, options, parse, publish
from skg_scale import ENTITIES, job_of

from medscale.config import Job
from medscale.jobfile import dump_job, load_job
from medscale.logs import log

_VERB = """
import resource, sys
from pathlib import Path
from medscale import evaluate, export, plan, prepare, train
plan.require_fit = train.require_fit = lambda *arguments: None
code = {"prepare": prepare, "train": train, "evaluate": evaluate, "export": export}[sys.argv[1]].main(sys.argv[2:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
sys.exit(code)
"""


def begun(verb: str, job: Path, directory: Path) -> subprocess.Popen[str]:
    """Start a verb on a job in a process of its own."""
    places = [f"--{kind}-dir={directory / kind}" for kind in ("data", "graphs", "runs")]
    command = [sys.executable, "-c", _VERB, verb, str(job), *places]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def told(run_directory: Path) -> list[dict[str, Any]]:
    """Return the training records so far; half a line at the end does not count."""
    path = run_directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [r for r in (json.loads(line) for line in lines if line.endswith("\n")) if r["kind"] == "train"]


def ended(verb: str, process: subprocess.Popen[str], start: float, code: int = 0) -> Record:
    """Wait for a verb; return its seconds and memory."""
    out, _ = process.communicate()
    assert process.returncode == code, f"{verb} ended with {process.returncode}"
    peak = float(out.rpartition("peak ")[2])
    return {"stage": verb, "seconds": round(time.perf_counter() - start, 1), "peak_mib": round(peak, 1)}


def trained(job_path: Path, directory: Path, run_directory: Path, steps: int) -> Record:
    """Train until so many steps are told, then ask to stop; return the record of it."""
    start, process = time.perf_counter(), begun("train", job_path, directory)
    while not (records := told(run_directory)) or records[-1]["step"] < steps:
        assert process.poll() is None, "training ended too early"
        time.sleep(1)
    asked = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    record = ended("train", process, start, 128 + signal.SIGTERM)
    records = told(run_directory)
    early = next(r for r in records if r["step"] >= steps / 10)
    rates = [r["triples_per_s"] for r in records[1:]]
    return record | {
        "steps": records[-1]["step"], "triples_per_s": round(statistics.median(rates), 1),
        "slowest_per_s": min(rates), "checkpoint_s": round(start + record["seconds"] - asked, 1),
        "grown_mib": round(records[-1]["memory_mib"]["0"] - early["memory_mib"]["0"], 1),
        "loss": [early["loss"], records[-1]["loss"]],
    }  # fmt: skip


def stages(job: Job, job_path: Path, directory: Path, steps: int) -> list[Record]:
    """Run all verbs."""
    run_directory = directory / "runs" / job.name
    records = []
    for verb in ("prepare", "train", "evaluate", "export"):
        log(verb)
        if verb == "train":
            records.append(trained(job_path, directory, run_directory, steps))
        else:
            start = time.perf_counter()
            records.append(ended(verb, begun(verb, job_path, directory), start))
        if verb == "evaluate":
            ranked = json.loads((run_directory / "evaluation.json").read_text(encoding="utf-8"))
            field = [r for r in ranked if r["side"] == "both" and r["protocol"] == "field"]
            records[-1] |= {"mrr": field[-1]["mrr"], "queries": field[-1]["num_queries"]}
    files = [path for path in (run_directory / "export").resolve().rglob("*") if path.is_file()]
    records[-1]["gb"] = round(sum(path.stat().st_size for path in files) / 1e9, 3)
    return records


def main() -> None:
    """Measure what the options ask for."""
    parser = options(__doc__ or "", threads=[2])
    parser.add_argument("--entities", type=int, default=ENTITIES[-1], metavar="N")
    parser.add_argument("--steps", type=int, default=2000, metavar="N")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where all is written")
    arguments = parse(parser, entities=7_000, steps=20)
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(exist_ok=True)
        job_path = directory / "skg.yaml"
        shipped = job_of(
            arguments.entities, load_job(Path(__file__).parents[2] / "jobs" / "skg.yaml").model.block_units
        )
        job_path.write_text(dump_job(shipped), encoding="utf-8")
        text = job_path.read_text(encoding="utf-8").replace("max_triples: 2000", "max_triples: 500")
        job_path.write_text(
            text.replace("log_every: 50", f"log_every: {max(1, arguments.steps // 40)}"), encoding="utf-8"
        )
        job = load_job(job_path)
        assert job.evaluate.max_triples == 500
        records = stages(job, job_path, directory, arguments.steps)
    common = {
        "scorer": job.model.scorer, "system": "medscale", "sub_models": len(job.model.dims),
        "threads": arguments.threads[0], "batch": job.train.batch_size, "negatives": job.negatives.number,
        "units": job.model.dims[-1], "workers": 1, "entities": arguments.entities,
    }  # fmt: skip
    publish(arguments, [common | record for record in records])


if __name__ == "__main__":
    main()
