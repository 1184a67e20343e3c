"""Every fault that medscale promises to survive, injected for real, one after the other; prints a table.

usage: python tools/chaos.py [FAULT ...] [--json]

Runs the tests that kill, stop, cut off and damage (tests/, those marked slow included) and tells, for each fault,
how many trials there were, how many ended as promised, and how long they took. All of them take about half an hour on
two cores; name some faults (parts of their names do) to run fewer. Exit code 1: some trial failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]

#: fault: the tests that inject it
FAULTS = {
    "kill -9 at a random step": ["test_trainer.py::test_killed_anywhere", "test_trainer.py::test_twenty_random_kills"],
    "kill -9 in a search": ["test_search.py::test_a_killed_search"],
    "kill -9 inside a save": ["test_trainer.py::test_killed_anywhere"],
    "another number of workers": [
        "test_workers.py::test_a_run_goes_on_with_another", "test_workers.py::test_each_triple_is_trained",
    ],
    "SIGTERM": [
        "test_trainer.py::test_signals_save", "test_workers.py::test_a_signal_to_one",
        "test_launch.py::test_a_killed_driver",
    ],
    "Ray worker killed": ["test_launch.py::test_a_worker_that_dies"],
    "driver or cluster killed, submitted again": [
        "test_launch.py::test_a_killed_driver", "test_launch.py::test_a_cluster_that_dies",
    ],
    "reader or task of preparing killed": ["test_ray_actors.py::test_a_reader_that_dies", "test_cluster.py"],
    "worker hangs or dies": ["test_workers.py::test_a_worker_that_hangs"],
    "out of memory": ["test_commands.py::test_predicted_memory", "test_commands.py::test_plan_tells"],
    "disk full while saving": ["test_checkpoint.py::test_a_full_disk"],
    "disk full while preparing or exporting": ["test_ingest.py::test_full_disk", "test_split.py::test_a_full_disk"],
    "bit flips": [
        "test_checkpoint.py::test_flipped_bits", "test_reader.py::test_every_single",
        "test_runtime.py::test_every_flipped",
    ],
    "files cut, lost, added, swapped": ["test_checkpoint.py::test_truncated", "test_runtime.py::test_missing_extra"],
    "damaged steps": ["test_checkpoint.py::test_a_damaged_newest", "test_checkpoint.py::test_all_steps_damaged"],
    "two writers": ["test_checkpoint.py::test_a_second_writer", "test_split.py::test_one_export"],
    "changed job": ["test_checkpoint.py::test_a_changed_job", "test_checkpoint.py::test_every_key"],
    "power loss": ["test_checkpoint.py::test_files_are_synced"],
    "damaged Parquet": [
        "test_ingest.py::test_damaged_parquet", "test_ingest.py::test_parquet_bomb",
        "test_ray_actors.py::test_a_damaged_file", "test_remote_graph.py",
    ],
    "wrong schemas and ids": [
        "test_ingest.py::test_wrong_schemas", "test_ingest.py::test_bad_parquet",
        "test_reader.py::test_ids_out",
    ],
    "worker without rows or triples": ["test_workers.py::test_workers_with_shares"],
    "NaN on one worker": ["test_workers.py::test_a_broken_number", "test_trainer.py::test_a_non_finite"],
    "hostile YAML": [
        "test_jobfile.py::test_many_mutated", "test_jobfile.py::test_alias_bomb",
        "test_jobfile.py::test_tags",
    ],
    "export interrupted": ["test_split.py::test_exports_killed", "test_split.py::test_a_polling_reader"],
    "names that lead outside": ["test_runtime.py::test_names_that_lead"],
    "weak manifests": ["test_k8s.py"],
    "no token": ["test_launch.py::test_a_job_submitted", "test_launch.py::test_a_cluster_that_others"],
}  # fmt: skip


def trials(tests: list[str]) -> dict[str, list[dict[str, object]]]:
    """Run the tests whose names begin so; return by that beginning their trials: name, passed, skipped, seconds."""
    named = [test for test in tests if "::" in test]
    cases = [case for some in (named, [test for test in tests if test not in named]) for case in _cases(some)]
    return {
        test: [
            {
                "trial": case.get("name"),
                "passed": not any(case.find(kind) is not None for kind in ("failure", "error", "skipped")),
                "skipped": case.find("skipped") is not None,
                "seconds": round(float(case.get("time", 0)), 1),
            }
            for case in cases
            if f"{str(case.get('classname')).rpartition('.')[2]}.py::{case.get('name')}".startswith(test)
        ]
        for test in tests
    }


def _cases(tests: list[str]) -> list[ElementTree.Element]:
    """Run tests, all of whole files or all of others, and return what pytest reports of each."""
    if not tests:
        return []
    files = sorted({f"tests/{test.split('::')[0]}" for test in tests})
    names = [test.split("::")[1] for test in tests if "::" in test]
    choice = ["-k", " or ".join(names)] if names else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", *files, *choice, f"--junitxml={report}"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            print(done.stdout[-8000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
        return list(ElementTree.parse(report).getroot().iter("testcase"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "faults:\n" + "\n".join(f"  {fault}" for fault in FAULTS)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="parts of faults' names; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    wanted = [fault for fault in FAULTS if not arguments.faults or any(part in fault for part in arguments.faults)]
    if not wanted:
        parser.error(f"no fault is named so; there are: {'; '.join(FAULTS)}")
    results, known = {}, dict[str, list[dict[str, object]]]()
    for fault in wanted:
        print(f"{fault} ...", file=sys.stderr, flush=True)
        # Some tests inject several faults: they need not run for each.
        if new := [test for test in FAULTS[fault] if test not in known]:
            known |= trials(new)
        results[fault] = [case for test in FAULTS[fault] for case in known[test]]
    failed = [fault for fault, cases in results.items() if not all(c["passed"] or c["skipped"] for c in cases)]
    failed += [fault for fault, cases in results.items() if not cases]
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        table = Table(title="faults injected")
        for heading in ("fault", "trials", "as promised", "skipped", "seconds"):
            table.add_column(heading, justify="left" if heading == "fault" else "right")
        for fault, cases in results.items():
            numbers = (len(cases), sum(bool(c["passed"]) for c in cases), sum(bool(c["skipped"]) for c in cases))
            seconds = sum(float(str(c["seconds"])) for c in cases)
            table.add_row(fault, *map(str, numbers), f"{seconds:.0f}")
        Console().print(table)
    for fault in failed:
        print(f"not as promised: {fault}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
