"""What a run has written about itself: its evaluation, and the course of its training."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medscale.errors import MedscaleError
from medscale.manifest import parse_json

__all__ = ["Course", "course_of", "evaluation_of", "export_report_of", "summary_of"]

_FIGURES = ("mrr", "hits@1", "hits@3", "hits@10")
_EXPORT_FIGURES = ("mrr", "hits@10", "bytes_per_entity", "share_of_float32")


def evaluation_of(run_directory: Path) -> dict[int, Mapping[str, Any]]:
    """Return the records of a run's evaluation by dim in units, smallest first: the field's protocol, both sides.

    Raises:
        MedscaleError: the run is not evaluated, or the file is damaged.

    """
    path = run_directory / "evaluation.json"
    try:
        records = parse_json(path.read_text(encoding="utf-8"))
        chosen = {int(r["dim"]): r for r in records if r["protocol"] == "field" and r["side"] == "both"}
        for record in chosen.values():
            if not all(0 <= record[name] <= 1 for name in _FIGURES) or not record["mrr"]:
                raise ValueError(f"dim {record['dim']} has figures out of range")
            str(record["split"]), int(record["num_queries"])
        if not chosen:
            raise ValueError("it holds no record")
    except FileNotFoundError:
        raise MedscaleError(f"{path} does not exist: run medscale evaluate first") from None
    except (ValueError, TypeError, KeyError) as cause:
        raise MedscaleError(f"{path} is damaged ({cause!r}): run medscale evaluate again") from None
    return dict(sorted(chosen.items()))


def summary_of(run_directory: Path) -> Mapping[str, Any]:
    """Return what an evaluation says beside its records; empty where it said nothing.

    Raises:
        MedscaleError: the file is damaged.

    """
    path = run_directory / "evaluation_summary.json"
    try:
        summary = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as cause:
        raise MedscaleError(f"{path} is damaged ({cause}): run medscale evaluate again") from None
    if not isinstance(summary, dict):
        raise MedscaleError(f"{path} is damaged (it is no mapping): run medscale evaluate again")
    return summary


def export_report_of(run_directory: Path) -> list[Mapping[str, Any]]:
    """Return what was measured per tier and precision; nothing where nothing was: see `fidelity.write_report`.

    A record is {"tier", "precision", "mrr", "hits@10", "bytes_per_entity", "share_of_float32", "marked"}.

    Raises:
        MedscaleError: the file is damaged.

    """
    path = run_directory / "export_report.json"
    try:
        records = parse_json(path.read_text(encoding="utf-8"))["precisions"]
        for record in records:
            str(record["tier"]), str(record["precision"]), bool(record["marked"])
            if not all(isinstance(record[name], int | float) for name in _EXPORT_FIGURES):
                raise ValueError(f"a figure of {record['tier']} is no number")
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as cause:
        raise MedscaleError(f"{path} is damaged ({cause!r}): export with a report again") from None
    return list(records)


@dataclass(frozen=True)
class Course:
    """The records of metrics.jsonl, in the order of their steps."""

    #: {"step", "loss", "hard", ..., "hard_by_dim": {dim: loss}, "triples_per_s", "batch_wait_s": {rank: seconds}}
    train: list[Mapping[str, Any]]
    #: {"step", "mrr": {dim: MRR}}
    valid: list[Mapping[str, Any]]


def course_of(run_directory: Path) -> Course:
    """Return the course of a run's training; a line that a killed or running process has not finished is left out."""
    path = run_directory / "metrics.jsonl"
    by_kind: dict[str, list[Mapping[str, Any]]] = {"train": [], "valid": []}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            by_kind[record["kind"]].append({**record, "step": int(record["step"])})
        except (ValueError, TypeError, KeyError):
            continue
    train, valid = (sorted(records, key=lambda record: record["step"]) for records in by_kind.values())
    return Course(train, valid)
