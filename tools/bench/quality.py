"""Quality of a job at every dim, with the time it took: trains it and writes one JSON file.

usage: python tools/bench/quality.py JOB [--data-dir DIR] [--cores N] [--minutes M] [--out DIR] [--json]

Runs `medscale train JOB` in a process of its own on N cores (all by default) and measures its wall time, which
holds preparing, training, ranking the full split and exporting. With `--minutes` the run gets SIGTERM after that
long, saves its step, and is then evaluated as it is: for jobs that are longer than anyone waits. The result goes to
tools/bench/results/quality/NAME.json; `--json` prints it instead.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from environment import environment

from medscale.jobfile import load_job

RESULTS = Path(__file__).parent / "results" / "quality"


def run(command: list[str], cores: list[int], minutes: float | None) -> float:
    """Run a medscale command on some cores, interrupt it after some minutes, and return its wall seconds."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "medscale.cli", *command], preexec_fn=lambda: os.sched_setaffinity(0, cores)
    )
    try:
        process.wait(None if minutes is None else 60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
    if process.returncode not in (0, 128 + signal.SIGTERM):
        sys.exit(process.returncode)
    return time.monotonic() - start


def result(run_directory: Path, seconds: float) -> dict[str, Any]:
    """Collect what a run wrote."""
    metrics = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if m["kind"] == "train"]
    summary = json.loads((run_directory / "evaluation_summary.json").read_text())
    return {
        "job": (run_directory / "job.yaml").read_text(),
        "wall_seconds": round(seconds, 1),
        "epochs_trained": steps[-1]["epoch"],
        "triples_per_s": sorted(m["triples_per_s"] for m in steps)[len(steps) // 2],
        "summary": summary,
        "curve": [{k: m[k] for k in ("epoch", "step", "mrr")} for m in metrics if m["kind"] == "valid"],
        "evaluation": json.loads((run_directory / "evaluation.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("MEDSCALE_DATA_DIR") or "data"))
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--graphs-dir", default="graphs", help="directory or URI")
    parser.add_argument("--cores", help="which CPU cores, such as 0 or 0,1; default: all")
    parser.add_argument("--minutes", type=float, help="interrupt training after this long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print the result instead of writing it")
    arguments = parser.parse_args()
    cores = [int(c) for c in arguments.cores.split(",")] if arguments.cores else sorted(os.sched_getaffinity(0))
    places = [
        str(arguments.job), "--data-dir", str(arguments.data_dir), "--runs-dir", str(arguments.runs_dir),
        "--graphs-dir", arguments.graphs_dir,
    ]  # fmt: skip
    seconds = run(["train", *places], cores, arguments.minutes)
    if arguments.minutes is not None:
        seconds += run(["evaluate", *places], cores, None)
    name = load_job(arguments.job).name
    facts = environment(f"medscale train {arguments.job}", len(cores))
    written = {"environment": facts, **result(arguments.runs_dir / name, seconds)}
    text = json.dumps(written, indent=1) + "\n"
    if arguments.json:
        print(text)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
