"""What the page of a run says: tiers, quality by dim, training, a map of entities; needs the extra `report`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medscale import figures
from medscale.config import Job
from medscale.errors import ConfigError, GraphError, MedscaleError
from medscale.evaluate import PROTOCOL
from medscale.figures import Curve
from medscale.graph.reader import Graph
from medscale.jobfile import dump_job
from medscale.markup import Image, Markup, document, folded, images, note, section, table, tiles
from medscale.places import Sample, places_of, sample_of
from medscale.results import Course, course_of, evaluation_of, export_report_of, summary_of
from medscale.runtime.precision import PRECISIONS
from medscale.runtime.tier import Tier
from medscale.tiers import Point, curve_of, in_bytes

__all__ = ["Compared", "ShownTier", "compared_runs", "page_of"]

#: lines of a figure at most: more cannot be told apart
_MOST_LINES = 6
_MOST_MAPS = 4
_PARTS = ("loss", "hard", "mutual", "regularizer")
_RETENTION = (
    "of the queries that some sub-model answers among its first ten, the share that every larger one answers too"
)


@dataclass(frozen=True, kw_only=True)
class ShownTier:
    """An exported tier, as its manifest and its files tell."""

    name: str
    units: int
    columns: int
    precision: str
    bytes_per_entity: int
    bytes: int


@dataclass(frozen=True)
class Compared:
    """Runs under one label: one that was trained with many dims and cropped, or several of one dim each."""

    label: str
    #: records by dim in units
    evaluation: Mapping[int, Mapping[str, Any]]
    #: of a run with several dims; None of several runs
    retention: float | None


def compared_runs(texts: Sequence[str], own: Mapping[int, Mapping[str, Any]]) -> list[Compared]:
    """Return what `LABEL=RUN_DIRECTORY` words name, in the order of their labels' first mention.

    Raises:
        ConfigError: a word has another form, or a label gets a dim twice.
        MedscaleError: a run is not evaluated, or on other queries than `own`.

    """
    evaluations: dict[str, dict[int, Mapping[str, Any]]] = {}
    runs: dict[str, list[Path]] = {}
    record = next(iter(own.values()))
    for text in texts:
        label, equals, directory = text.partition("=")
        if not (label.strip() and equals and directory):
            raise ConfigError([f"--compare: {text!r} is not LABEL=RUN_DIRECTORY, such as direct=runs/direct_10"])
        evaluation = evaluation_of(Path(directory))
        for dim, theirs in evaluation.items():
            if (theirs["split"], theirs["num_queries"]) != (record["split"], record["num_queries"]):
                raise MedscaleError(
                    f"--compare: {directory} was ranked on {theirs['num_queries']:,} queries of {theirs['split']}, "
                    f"this run on {record['num_queries']:,} of {record['split']}: evaluate both on the same"
                )
            if dim in evaluations.get(label, {}):
                raise ConfigError([f"--compare: {label!r} has dim {dim} twice: give {directory} another label"])
            evaluations.setdefault(label, {})[dim] = theirs
        runs.setdefault(label, []).append(Path(directory))
    return [
        Compared(label, dict(sorted(evaluation.items())), _retention(runs[label]))
        for label, evaluation in evaluations.items()
    ]


def _retention(directories: Sequence[Path]) -> float | None:
    if len(directories) > 1:
        return None
    return _retention_of(summary_of(directories[0]), evaluation_of(directories[0]))


def _retention_of(summary: Mapping[str, Any], evaluation: Mapping[int, Any]) -> float | None:
    """Return the ability retention ratio; None of a single dim, where it says nothing."""
    ratio = summary.get("ability_retention_ratio")
    return float(ratio) if isinstance(ratio, int | float) and len(evaluation) > 1 else None


def page_of(
    job: Job,
    run_directory: Path,
    tiers: Sequence[ShownTier],
    largest_tier: Tier,
    graph: Graph | GraphError,
    compared: Sequence[Compared],
    date: str,
) -> tuple[str, list[Image]]:
    """Return the page, and the images on it in order; equal runs give equal pages but for the date.

    `graph` may be the reason why it is missing: then sizes by dim and the map of entities are left out.

    Raises:
        MedscaleError: a file of the run is damaged, or the graph is not the run's.

    """
    story = _Story(job, run_directory, tiers, largest_tier, graph, compared)
    parts = [
        story.tiles(),
        *story.tiers_section(),
        *story.precision_section(),
        *story.quality_section(),
        *story.training_section(),
        *story.map_section(),
        section(
            "The job", note(f"How {job.name} was trained, every key spelled out."), folded("job.yaml", dump_job(job))
        ),
    ]
    footer = f"Ranks: {PROTOCOL}, both sides. Written {date} by medscale report. This page loads nothing."
    return document(job.name, story.subtitle(), parts, footer), story.shown


class _Story:
    """The sections of a page, and the images that they show."""

    def __init__(
        self, job: Job, run_directory: Path, tiers: Sequence[ShownTier], largest_tier: Tier,
        graph: Graph | GraphError, compared: Sequence[Compared],
    ) -> None:  # fmt: skip
        self.job, self.run_directory, self.tiers, self.largest_tier = job, run_directory, tiers, largest_tier
        self.graph, self.compared = graph, compared
        self.evaluation = evaluation_of(run_directory)
        self.summary = summary_of(run_directory)
        self.course: Course = course_of(run_directory)
        self.full = self.evaluation[max(self.evaluation)]["mrr"]
        self.units = {tier.name: tier.units for tier in tiers}
        #: images so far
        self.shown: list[Image] = []

    def subtitle(self) -> str:
        """Return a line on what was trained and ranked."""
        record = next(iter(self.evaluation.values()))
        facts = self.largest_tier.facts
        return (
            f"{self.job.model.scorer} on {self.job.graph_name}: {facts['num_entities']:,} entities, "
            f"{facts['num_relations']:,} relations; step {facts['step']:,}; ranked on {record['num_queries']:,} "
            f"queries of the {record['split']} split"
        )

    def tiles(self) -> Markup:
        """Return the few figures to remember."""
        smallest = self.tiers[0]
        kept = self.evaluation[smallest.units]["mrr"] / self.full
        largest = max(tier.bytes_per_entity for tier in self.tiers)
        facts = [
            (f"{self.full:.3f}", f"MRR of the full model, {max(self.evaluation):,} units"),
            (f"{kept:.1%}", f"of it kept by {smallest.name}, {smallest.units:,} units"),
            (
                in_bytes(smallest.bytes_per_entity),
                f"per entity in {smallest.name}; {in_bytes(largest)} in the largest tier",
            ),
        ]
        retention = _retention_of(self.summary, self.evaluation)
        if retention is not None:
            facts.append((f"{retention:.1%}", "ability retention: answers that larger sub-models keep"))
        return tiles(facts)

    # -- tiers ----------------------------------------------------------------------------------------------

    def tiers_section(self) -> list[Markup]:
        """Return the table of what ships."""
        # What decides comes first: a phone shows the first columns.
        headings = (
            "tier", "units", "MRR", "of full", "per entity", "all files", "precision", "Hits@1", "Hits@10", "columns",
        )  # fmt: skip
        rows = []
        for tier in self.tiers:
            record = self.evaluation[tier.units]
            rows.append((
                tier.name, f"{tier.units:,}", f"{record['mrr']:.3f}", f"{record['mrr'] / self.full:.1%}",
                in_bytes(tier.bytes_per_entity), in_bytes(tier.bytes), tier.precision, f"{record['hits@1']:.3f}",
                f"{record['hits@10']:.3f}", f"{tier.columns:,}",
            ))  # fmt: skip
        words = (
            "Each tier is the first columns of the next. MRR and Hits are those of the trained columns (float32); of "
            "full: of the largest sub-model's MRR. Per entity: vectors and scales; all files: with names, Parquet "
            "copies and manifest."
        )
        return [section("Tiers", table(headings, rows), note(words))]

    def precision_section(self) -> list[Markup]:
        """Return the table of what an export measured at other precisions, if it did."""
        records = export_report_of(self.run_directory)
        if not records:
            return []
        rows = [
            (
                f"{r['tier']}{' (!)' if r['marked'] else ''}", str(r["precision"]), f"{r['mrr']:.4f}",
                f"{r['share_of_float32']:.2%}", f"{r['hits@10']:.4f}", f"{r['bytes_per_entity']:,g}",
            )
            for r in records
        ]  # fmt: skip
        headings = ("tier", "precision", "MRR", "of float32", "Hits@10", "bytes per entity")
        marked = [bool(r["marked"]) for r in records]
        words = "Measured on the exported numbers, filtered, full test set."
        if any(marked):
            words += " (!) and tinted: more than 1% of the MRR is lost."
        return [section("Precision", table(headings, rows, marked), note(words))]

    # -- quality --------------------------------------------------------------------------------------------

    def quality_section(self) -> list[Markup]:
        """Return MRR and Hits@10 by dim, beside other runs, and every sub-model's figures and sizes."""
        pictures = []
        for key, what in (("mrr", "MRR"), ("hits@10", "Hits@10")):
            curves = [
                Curve(label, list(evaluation), [record[key] for record in evaluation.values()])
                for label, evaluation in [
                    (self.job.name, self.evaluation),
                    *((c.label, c.evaluation) for c in self.compared),
                ]
            ]
            name = f"{key.replace('@', '_at_')}_by_dim"
            alt = "; ".join(
                f"{c.label}: " + ", ".join(f"{y:.3f} at {x}" for x, y in zip(c.x, c.y, strict=True)) for c in curves
            )
            pictures.append(
                self._image(
                    name, figures.by_dim(f"{what} by dimension", what, curves, self.units), f"{what} by units. {alt}"
                )
            )
        parts = [images(pictures), *self._comparison(), *self._sizes(), note(f"Ability retention: {_RETENTION}.")]
        return [section("Quality by dimension", *parts)]

    def _comparison(self) -> list[Markup]:
        if not self.compared:
            return []
        own = Compared(self.job.name, self.evaluation, _retention_of(self.summary, self.evaluation))
        runs = [(each.label, each.evaluation, each.retention) for each in (own, *self.compared)]
        dims = sorted({dim for _, evaluation, _ in runs for dim in evaluation})
        dims = [dim for dim in dims if sum(dim in evaluation for _, evaluation, _ in runs) > 1] or dims
        dims = _some_of(dims, _MOST_LINES, self.units.values())
        rows = [
            (
                label,
                *(f"{evaluation[dim]['mrr']:.3f}" if dim in evaluation else "" for dim in dims),
                "" if retention is None else f"{retention:.1%}",
            )
            for label, evaluation, retention in runs
        ]
        headings = ("MRR", *(f"{dim:,} units" for dim in dims), "ability retention")
        return [table(headings, rows)]

    def _sizes(self) -> list[Markup]:
        if isinstance(self.graph, GraphError):
            return [note(f"Sizes by dimension are left out: {self.graph}")]
        points: list[Point] = curve_of(self.job, self.run_directory, self.graph)
        rows = [
            (
                f"{p.units:,}", f"{p.columns:,}", f"{p.mrr:.3f}", f"{p.share:.1%}", f"{p.hits_at_10:.3f}",
                *(f"{in_bytes(p.bytes[each])} ({p.bytes_per_entity[each]:,} B)" for each in PRECISIONS),
            )
            for p in points
        ]  # fmt: skip
        headings = ("units", "columns", "MRR", "of full", "Hits@10", *PRECISIONS)
        words = (
            "What a tier of each sub-model would take, and in brackets each entity of it: vectors, relations as "
            "float32, names; int8 with a float32 scale per row and cut. medscale tiers chooses among them."
        )
        return [table(headings, rows), note(words)]

    # -- training -------------------------------------------------------------------------------------------

    def training_section(self) -> list[Markup]:
        """Return losses, validation, and throughput by step."""
        train, valid = self.course.train, self.course.valid
        if not train and not valid:
            return [section("Training", note("metrics.jsonl of this run holds no record."))]
        pictures = [*self._losses(train), *self._validation(valid), *self._throughput(train)]
        parts = [images(pictures)] if pictures else []
        if len(train) > 300:
            parts.append(note("Long curves show means of consecutive records."))
        return [section("Training", *parts)]

    def _losses(self, train: Sequence[Mapping[str, Any]]) -> list[Image]:
        parts = [curve for name in _PARTS if (curve := _curve(train, name, name)) and any(curve.y)]
        pictures = []
        if parts:
            drawn = figures.over_steps("Loss and its parts", "loss", parts, logarithmic=True)
            pictures.append(self._image("loss", drawn, "The loss and its parts by step"))
        dims = sorted({int(dim) for record in train for dim in record.get("hard_by_dim", {})})
        curves = [
            curve for dim in _some_of(dims, _MOST_LINES, self.units.values())
            if (curve := _curve(train, "hard_by_dim", self._named(dim), str(dim)))
        ]  # fmt: skip
        if curves:
            drawn = figures.over_steps(
                "Loss on true labels, by sub-model", "loss", curves, logarithmic=True, ordered=True
            )
            pictures.append(self._image("loss_by_dim", drawn, "Each sub-model's loss on the true labels by step"))
        return pictures

    def _validation(self, valid: Sequence[Mapping[str, Any]]) -> list[Image]:
        dims = sorted({int(dim) for record in valid for dim in record.get("mrr", {})})
        curves = [
            curve for dim in _some_of(dims, _MOST_LINES, self.units.values())
            if (curve := _curve(valid, "mrr", self._named(dim), str(dim)))
        ]  # fmt: skip
        if not curves:
            return []
        step = self.largest_tier.facts["step"]
        drawn = figures.over_steps("Validation MRR", "MRR", curves, ordered=True, marked=step)
        return [self._image("validation_mrr", drawn, f"Validation MRR by step; step {step} was exported")]

    def _throughput(self, train: Sequence[Mapping[str, Any]]) -> list[Image]:
        pictures = []
        rate = _curve(train, "triples_per_s", "triples/s")
        if rate:
            drawn = figures.over_steps("Throughput", "triples/s", [rate], from_zero=True)
            pictures.append(self._image("throughput", drawn, "Training triples per second by step"))
        waits = _waits(train)
        if waits:
            drawn = figures.over_steps("Waiting for batches", "ms per step", waits, from_zero=True)
            pictures.append(
                self._image("batch_wait", drawn, "Milliseconds per step that workers waited for their batch")
            )
        return pictures

    # -- the map --------------------------------------------------------------------------------------------

    def map_section(self) -> list[Markup]:
        """Return where t-SNE puts a sample of entities at several dims."""
        title = "Entities by category"
        if isinstance(self.graph, GraphError):
            return [section(title, note(f"The map is left out: {self.graph}"))]
        sample = sample_of(self.graph)
        if sample is None:
            return [section(title, note("The map is left out: too few entities share a category."))]
        dims = self._map_dims()
        rows = self.largest_tier.vectors(sample.entity_N)
        per_unit = self.largest_tier.columns // self.largest_tier.dim
        places = places_of([rows[:, : dim * per_unit] for dim in dims])
        pictures = [
            self._image(f"entities_{dim}", figures.cloud(self._named(dim), at, sample.category_N, sample.names),
                        f"t-SNE of {len(rows)} entities at {dim} units, coloured by {sample.by}")
            for dim, at in zip(dims, places, strict=True)
        ]  # fmt: skip
        return [section(title, images(pictures, small=True), note(_map_words(sample)))]

    def _map_dims(self) -> list[int]:
        """Return the dims of tiers, or of a single tier the smallest, the middle and the largest sub-model."""
        dims = sorted(set(self.units.values()))
        if len(dims) == 1:
            dims = [dim for dim in self.evaluation if dim <= dims[0]]
        return _some_of(dims, _MOST_MAPS if len(dims) == _MOST_MAPS else 3, ())

    def _named(self, dim: int) -> str:
        names = [name for name, units in self.units.items() if units == dim]
        return f"{dim:,} units" + (f" ({', '.join(names)})" if names else "")

    def _image(self, name: str, png: bytes, alt: str) -> Image:
        self.shown.append(Image(name, png, alt))
        return self.shown[-1]


def _map_words(sample: Sample) -> str:
    return (
        f"t-SNE of {len(sample.entity_N):,} entities, at most 150 of each {sample.by}. Each map starts from the one "
        "before, the first from principal components; so places can be followed from map to map, and distances "
        "between groups mean little."
    )


def _curve(records: Sequence[Mapping[str, Any]], key: str, label: str, inner: str | None = None) -> Curve | None:
    """Return the curve of a key of the records that have it, or of a key within it."""
    found = [(r["step"], r[key] if inner is None else r[key].get(inner)) for r in records if key in r]
    found = [(step, value) for step, value in found if isinstance(value, int | float)]
    return Curve(label, [step for step, _ in found], [value for _, value in found]) if found else None


def _waits(train: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Return the milliseconds that a step waited for its batch on each worker, or the mean and most of many."""
    waits: dict[str, list[tuple[int, float]]] = {}
    before = 0
    for record in train:
        steps, before = max(1, record["step"] - before), record["step"]
        for rank, seconds in record.get("batch_wait_s", {}).items():
            waits.setdefault(rank, []).append((record["step"], seconds * 1000 / steps))
    ranks = sorted(waits, key=int)[:_MOST_LINES]
    return [Curve(f"worker {rank}", *map(list, zip(*waits[rank], strict=True))) for rank in ranks]


def _some_of(dims: Sequence[int], most: int, wanted: Any) -> list[int]:
    """Return at most so many dims: the wanted ones first, then evenly from the smallest to the largest."""
    if len(dims) <= most:
        return list(dims)
    chosen = [dim for dim in dims if dim in set(wanted)][:most]
    even = [dims[round(i * (len(dims) - 1) / (most - 1))] for i in range(most)]
    for dim in even:
        if len(chosen) < most and dim not in chosen:
            chosen.append(dim)
    return sorted(chosen)
