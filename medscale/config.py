"""A job: everything one run depends on, as frozen typed sections. The words of a job file, explained once.

Each key carries its help and its limits; the reader of job files (`jobfile`), the JSON Schema for editors and
the reference in `jobs/README.md` all come from here. Combinations that cannot work are found by `conflicts`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

__all__ = [
    "MOST_WORKERS",
    "PRESETS",
    "CheckpointSection",
    "DistillSection",
    "EncoderSection",
    "EvaluateSection",
    "ExportSection",
    "ExtendSection",
    "GraphSection",
    "Job",
    "LossSection",
    "MedSection",
    "ModelSection",
    "NegativesSection",
    "OptimizerSection",
    "RuntimeSection",
    "SyntheticSection",
    "TrainSection",
    "conflicts",
    "uses_neighbours",
]

T = TypeVar("T")
REQUIRED: Any = dataclasses.MISSING

#: no job has more worker processes; nor is a plan made for more
MOST_WORKERS = 1024

#: scorers whose score is minus a distance; the others are products
DISTANCES = ("transe", "rotate", "pairre")


def key(
    default: T,
    text: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    pattern: str | None = None,
    refused: Mapping[str, str] | None = None,
) -> T:
    """Declare a key: its default (`REQUIRED` for none), its help, and the values that it takes.

    `refused` gives the reason for each value that one could expect and that is not among the choices.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "pattern": pattern, "refused": refused}
    metadata = {"help": text} | {name: value for name, value in limits.items() if value is not None}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class SyntheticSection:
    """A generated SKG-like graph (users, products, shops, tags, ...) instead of files."""

    num_users: int = key(REQUIRED, "users; the other kinds of entities follow in fixed proportions", minimum=10)
    num_triples: int = key(REQUIRED, "triples drawn, before duplicates are dropped", minimum=100)
    num_communities: int = key(16, "planted communities = class labels of the users", minimum=2, maximum=10_000)
    part_triples: int = key(1_000_000, "triples per generated Parquet part: bounds the memory", minimum=100)


@dataclass(frozen=True, kw_only=True)
class GraphSection:
    """Where the triples come from, and how they become a graph directory."""

    name: str | None = key(
        None,
        "name of the graph directory, so that jobs can share one; default: the job's name",
        pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    )
    train: tuple[str, ...] = key((), "training files, relative to the data root; globs allowed")
    valid: tuple[str, ...] = key((), "validation files; none: split off `train` by `valid_fraction`")
    test: tuple[str, ...] = key((), "test files; none: split off `train` by `test_fraction`")
    format: Literal["auto", "tsv", "csv", "parquet", "ntriples"] = key(
        "auto",
        "format of the files; `auto` goes by the suffix (.tsv .txt .csv .parquet .nt, then .gz or .zst)",
    )
    header: bool = key(False, "TSV and CSV: the first line names the columns")
    columns: tuple[str, ...] = key(
        ("head", "relation", "tail"), "TSV and CSV without a header: names of the columns in file order"
    )
    head_column: str = key("head", "the column that holds heads")
    relation_column: str = key("relation", "the column that holds relations")
    tail_column: str = key("tail", "the column that holds tails")
    literals: Literal["drop", "keep"] = key(
        "drop", "N-Triples: triples whose object is a literal are dropped and counted, or kept as entities"
    )
    head_type_column: str | None = key(None, "column of the triple files that holds the head's type; optional")
    tail_type_column: str | None = key(None, "column of the triple files that holds the tail's type; optional")
    entity_types: str | None = key(None, "file of (entity, type) rows, in the same formats; optional")
    valid_fraction: float = key(0.0, "share of triples split off for validation", minimum=0, maximum=0.5)
    test_fraction: float = key(0.0, "share of triples split off for testing", minimum=0, maximum=0.5)
    drop_unseen: bool = key(
        False,
        "drop validation and test triples with an entity or relation unseen in train. "
        "Results are then not comparable with those of the field, and say so",
    )
    synthetic: SyntheticSection | None = key(None, "generate the graph instead of reading files")
    memory_mib: int = key(
        2048, "memory that preparing may take, all tasks together, beside the libraries' own", minimum=128
    )
    tasks: int = key(
        1,
        "tasks that prepare the graph together, which changes no byte of it; more than one are run by Ray, each on a "
        "core of a node that sees the raw files and the directory of graphs",
        minimum=1,
    )


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The scorer, the sub-models and the tiers cut from them."""

    scorer: Literal["transe", "rotate", "simple", "pairre", "complex", "distmult"] = key(REQUIRED, "score function")
    norm: Literal["l1", "l2"] = key("l1", "TransE: norm of the distance")
    dims: tuple[int, ...] = key(REQUIRED, "units of each sub-model, increasing; the last is the whole model", minimum=1)
    tiers: Mapping[str, int] = key(
        REQUIRED,
        "name: dim of what is shipped; each dim is one of `dims`",
        pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*",
        minimum=1,
    )
    reciprocal: bool = key(
        False,
        "a second vector per relation for its inverse: tails are predicted with the relation, heads with the "
        "inverse, and a triple's score is the mean of both",
    )
    damping: tuple[float, ...] = key(
        (1.0,),
        "kappa: a sub-model's score = its own level's + kappa x the score of the one below; one for all levels, or one "
        "per level above the first; below 1 needs at most 8 sub-models; 0: the level is a model of its own beside "
        "them, as distillation needs",
        minimum=0,
        maximum=1,
    )
    block_units: int | None = key(
        None,
        "columns between tiers are cut further, into tables of about this many units at most, which can lie on "
        "several workers; default: one table per tier",
        minimum=1,
    )
    init_scale: float | None = key(
        None,
        "initial columns: half-width of the uniform (distances), standard deviation (products); default: "
        "(margin + 2) / largest dim, or 0.001 with softmax over products, or (largest dim)^(-1/6)",
        above=0,
    )


@dataclass(frozen=True, kw_only=True)
class EncoderSection:
    """Entities composed of parts that they share, instead of a row each (parameter-efficient baselines)."""

    kind: Literal["none", "nodepiece", "earl"] = key(
        "none", "a row for each entity; or NodePiece: anchors and relations; or EARL: reserved entities and neighbours"
    )
    reserved: int = key(500, "NodePiece's anchors, EARL's reserved entities: these alone have vectors", minimum=1)
    nearest: int = key(10, "of them, how many an entity is composed of", minimum=1)
    relations: int = key(6, "NodePiece: relations at an entity that it is composed of, at most", minimum=1)
    neighbours: int = key(8, "EARL: neighbours of an entity that it is composed of", minimum=1)
    lr: float = key(0.02, "learning rate of all parts and of the network that joins them, by Adagrad", above=0)


@dataclass(frozen=True, kw_only=True)
class NegativesSection:
    """What positives are compared with."""

    kind: Literal["per_positive", "chunk", "in_batch", "shared", "all"] = key(
        "chunk",
        "bce: `per_positive` draws fresh negatives for each positive, `chunk` shares them within chunks of "
        "positives, `in_batch` takes the entities of the chunk's other positives. "
        "softmax: `shared` = the batch's own entities and `number` uniform ones, bias-corrected; `all` entities",
    )
    number: int = key(
        64,
        "bce: negatives per positive in total (`in_batch`: follows from chunk_size); softmax `shared`: "
        "uniform candidates per step beside the batch's own entities",
        minimum=1,
    )
    chunk_size: int = key(32, "positives that share negatives; divides batch_size", minimum=1)
    corrupt: Literal["head", "tail", "both"] = key(
        "both",
        "which side is replaced; `both` alternates (halves of a positive's negatives, or whole chunks)",
    )
    filter_known: bool = key(False, "bce: negatives that are known training triples do not count")


@dataclass(frozen=True, kw_only=True)
class LossSection:
    """The loss of one sub-model."""

    kind: Literal["bce", "softmax"] = key(
        "bce",
        "binary cross-entropy on logits a_i (gamma_i + s_i), or cross-entropy over candidates",
    )
    margin: float = key(9.0, "gamma of the largest sub-model (distances; products have none)", minimum=0)
    margin_scaling: Literal["sqrt", "linear", "equal"] = key(
        "sqrt", "gamma_i = margin x sqrt(d_i / d_n), or margin x d_i / d_n, or the same for all"
    )
    temperature: Literal["sqrt", "linear", "one"] = key(
        "sqrt", "distances: a_i = sqrt(d_n / d_i), or d_n / d_i, or 1 for all; products always use 1"
    )
    regularizer: Literal["none", "n3", "l2"] = key(
        "none", "N3 (sum of cubed moduli) or L2 (sum of squares) of the batch's vectors, each column once"
    )
    regularizer_weights: tuple[float, ...] = key(
        (0.0,), "strength of the regularizer: one for all levels, or one per level", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class MedSection:
    """How the sub-models' losses work together (MED)."""

    mutual: Literal["off", "one_way", "both"] = key(
        "one_way",
        "mutual learning between neighbours: off; the larger teaches the smaller, detached; or both learn",
    )
    mutual_weight: float = key(1.0, "factor of the mutual learning loss (paper: 1)", minimum=0)
    mutual_warmup_steps: int = key(0, "steps over which that factor rises from 0", minimum=0)
    mutual_loss: Literal["huber", "kl"] = key(
        "huber",
        "what neighbours compare, with loss.kind bce: logits by Huber's loss (paper), or probabilities of truth by "
        "their KL divergence; softmax losses always compare distributions",
    )
    labels: Literal["even", "evaluated"] = key(
        "even",
        "bce: how a triple's label weighs beside what the larger neighbour teaches of it; `evaluated`: the likelier "
        "the larger is right, the more the smaller learns from it and the less from the label (DualDE)",
    )
    evolution: Literal["off", "previous", "own"] = key(
        "own",
        "evolutionary improvement: off (equal weights); weights from the previous sub-model's scores (paper); "
        "or from a sub-model's own scores",
    )
    form: Literal["bounded", "paper"] = key(
        "bounded",
        "weights of positives: softmax(w1 (1 - sigmoid(z))), any scorer; or exp(w1 / s), distances only. "
        "`paper` also takes negatives' weights from raw scores s instead of logits z",
    )
    normalize: Literal["positive", "batch"] = key(
        "positive", "negatives' weights sum to 1 for each positive, or over the batch (paper)"
    )
    dynamic_weight: bool = key(True, "dynamic loss weight exp(w3 d_i / d_n); false: 1 for every sub-model")
    balance: float | None = key(
        None,
        "all losses of sub-model i count (d_1 / d_i)^balance, so that the many larger sub-models do not outweigh the "
        "smaller ones on the columns they share; default: 2 for products with loss.kind bce, else 0",
        minimum=0,
    )
    reach: float = key(
        1.0,
        "what a sub-model's loss counts in the columns of the level below its own, its square in those below that, and "
        "so on: 1: as much as in its own (paper); 0: larger sub-models build on the columns of smaller ones and do not "
        "move them; below 1 with loss.kind bce alone, and without kernels of its own on a GPU",
        minimum=0, maximum=1,
    )  # fmt: skip
    w1: float = key(1.0, "sharpness of the positives' weights", above=0)
    w2: float = key(1.0, "sharpness of the negatives' weights", above=0)
    w3: float = key(1.0, "growth of the dynamic loss weight", above=0)
    weights: Literal["fixed", "learnable"] = key(
        "fixed", "w1, w2, w3 as given, or trained from there with a log-barrier that keeps them positive"
    )
    weights_lr: float = key(1e-4, "learnable: learning rate of w1, w2, w3", above=0)
    weights_barrier: float = key(0.1, "learnable: strength of the log-barrier", minimum=0)
    sub_models_per_step: int | None = key(
        None,
        "train a sample of sub-models per step, always with the smallest and the largest; default: all",
        minimum=2,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """How columns move."""

    kind: Literal["rowwise_adagrad", "adagrad", "adam"] = key(
        "rowwise_adagrad",
        "entity tables, fused into the backward pass: one Adagrad state per row and block, one per element, "
        "or Adam (CUDA only)",
    )
    lr: float = key(0.1, "learning rate of the entity tables", above=0)
    relation_lr: float | None = key(None, "learning rate of the relations; default: lr", above=0)
    tier_factors: tuple[float, ...] = key(
        (1.0,),
        "what both are multiplied with in each tier's own columns, from the smallest tier on (entities': rounded up to "
        "4 columns, and those beyond the largest tier like its own): one for all, or one per dim of the tiers",
        above=0,
    )
    schedule: Literal["constant", "linear"] = key("constant", "`linear` decays to 0 at the last step")
    warmup_steps: int = key(0, "steps over which the learning rates rise from 0", minimum=0)


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How long, in what portions, and when to stop."""

    epochs: int = key(REQUIRED, "passes over the training triples", minimum=1)
    batch_size: int = key(1024, "bce: positives per step; softmax: queries (head, relation) per step", minimum=1)
    max_tails: int = key(16, "softmax: answers that one query carries; more make another query", minimum=1)
    validate_every: int = key(1, "epochs between validations; 0: never", minimum=0)
    valid_triples: int | None = key(None, "validate on a seeded sample of this many triples; default: all", minimum=1)
    patience: int | None = key(None, "stop after this many validations without a better MRR; default: never", minimum=1)
    validation_lag: int = key(
        0,
        "steps after a validation at which its result counts (best step, patience), the next validation at the latest; "
        "training goes on until then, which runtime.evaluators use to rank meanwhile",
        minimum=0,
    )
    watch_dim: int | None = key(None, "dim whose validation MRR decides; default: the mean over all", minimum=1)
    log_every: int = key(
        50, "steps between lines of metrics.jsonl; binary losses of negatives may be left out in between", minimum=1
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """When the run is saved and how it goes on."""

    every_steps: int | None = key(None, "steps between checkpoints; default: at each epoch's end", minimum=1)
    keep: int = key(2, "committed checkpoints kept, beside the best one", minimum=2)
    resume: Literal["auto", "previous", "never"] = key(
        "auto",
        "`auto` goes on from the newest checkpoint, `previous` from the one before it (a damaged newest "
        "one is set aside), `never` refuses a run directory that already holds any",
    )


@dataclass(frozen=True, kw_only=True)
class ExtendSection:
    """Growing out of another run: `train JOB --extend FILES` fills it in; `rows` may be said beforehand."""

    run: str | None = key(
        None,
        "the run that is extended, in the same directory of runs; its model is this job's. Old entities and relations "
        "keep their ids and start from its vectors; valid and test are its graph's; default: the job extends none",
        pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    )
    graph: str | None = key(
        None,
        "name of the graph that it was trained on; default: its own name",
        pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    )
    step: int | None = key(None, "its checkpoint to start from; default: its best, else its newest", minimum=0)
    triples: tuple[str, ...] = key(
        (), "files of new training triples, relative to the data root and of the form of graph.train; globs allowed"
    )
    rows: Literal["frozen", "trained"] = key(
        "frozen",
        "old entities and relations: `frozen` keeps their vectors bit for bit, and trains those of new names on the "
        "triples that mention one and on `others`, without validating; `trained` goes on with all rows and all triples",
    )
    others: int = key(
        4,
        "frozen: for each triple that mentions a new name so many that do not, drawn evenly, are trained on, 10,000 at "
        "least unless 0: among their answers new vectors learn where they do not belong; more guard old answers "
        "better, and take longer",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class DistillSection:
    """Learning from another run's model, which lies beside the smaller one as the last level, with damping 0."""

    teacher: str | None = key(
        None,
        "a run in the same directory of runs, on the same graph; the last level of this job's model begins as its "
        "first columns; default: nobody teaches but neighbours",
        pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    )
    dim: int | None = key(None, "its sub-model that teaches; default: its largest", minimum=1)
    step: int | None = key(None, "its checkpoint; default: its best, else its newest", minimum=0)
    learns_after: int | None = key(
        None,
        "steps after which the teacher is trained too, with med.mutual both by what the student tells it; default: "
        "never, its columns stay as they are, bit for bit",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    """Filtered ranking of a split at every sub-model."""

    split: Literal["test", "valid"] = key("test", "split ranked after training")
    max_triples: int | None = key(None, "rank a seeded sample only; results say so; default: all", minimum=1)
    memory_mib: int = key(512, "memory for scores while ranking", minimum=16)


@dataclass(frozen=True, kw_only=True)
class ExportSection:
    """The tiers as files to ship."""

    layout: Literal["full", "delta"] = key(
        "full",
        "`full`: each tier complete; `delta`: the smallest complete, each larger one only the columns that the one "
        "below it lacks, so that an upgrade downloads no column twice",
    )
    precision: Literal["float32", "float16", "int8", "int4"] = key(
        "float32",
        "of the entities' numbers; int8 and int4 have a scale per row and per tier's own columns; relations stay "
        "float32",
    )
    sharding: Literal["range", "hash"] = key(
        "range", "which entities lie in a file together: ids that follow each other, or names with the same hash"
    )
    shard_rows: int = key(262_144, "entities per file, on average with sharding hash", minimum=1)
    formats: tuple[Literal["parquet", "onnx", "index"], ...] = key(
        ("parquet",),
        "what is written beside the numeric core for other programs; may be empty. `onnx`: models that answer queries "
        "and score triples (needs the extra `onnx`); `index`: an approximate search index (the extra `index`); neither "
        "is for tiers of layout delta, but for the smallest",
    )
    tasks: int = key(
        1,
        "tasks that write files together, which changes no byte of them; more than one are run by Ray, each on a core "
        "of a node that sees the checkpoint and the run directory; one uses all cores of this machine",
        minimum=1,
    )
    keep: int = key(2, "exports kept, so that medscale export --rollback has one to return to", minimum=2)


@dataclass(frozen=True, kw_only=True)
class RuntimeSection:
    """The machines."""

    workers: int = key(
        1, "worker processes that train together; more than one are run by Ray, each with a GPU of its own on `cuda`",
        minimum=1, maximum=MOST_WORKERS,
    )  # fmt: skip
    placement: Literal["auto", "table_wise", "row_wise"] = key(
        "auto",
        "several workers: whole tables on workers, balanced by width; or the rows of each table spread over all; "
        "`auto`: table_wise where every worker's tables fit in its memory",
        refused={
            "column_wise": "row-wise Adagrad would keep one state per row and worker, so that results and checkpoints "
            "depended on the number of workers; cut the columns into tables of the job's own with model.block_units"
        },
    )
    table_memory: Literal["device", "uvm_caching", "ssd"] = key(
        "device",
        "where a worker's tables lie: in the memory of its device; on `cuda` also `uvm_caching`: in the host's, with "
        "a cache on the GPU; or `ssd`: FBGEMM's key-value tables, which `plan` counts and training refuses, since no "
        "public build of FBGEMM has them",
    )
    cache_fraction: float | None = key(
        None, "uvm_caching and ssd: share of a worker's rows that its GPU caches; default: 0.2", above=0, maximum=1
    )
    readers: int = key(
        0,
        "processes that read and shuffle training triples for all workers, run by Ray (binary losses); 0: each worker "
        "reads for itself",
        minimum=0,
    )
    evaluators: int = key(
        0,
        "processes that validate with committed checkpoints, run by Ray, each with a part of the entities; 0: the "
        "workers validate",
        minimum=0,
    )
    timeout_s: int = key(600, "several workers: seconds to wait for one that does not come", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "`auto`: CUDA where there is a GPU")
    threads: int | None = key(None, "CPU threads; default: all cores", minimum=1)
    kernels: Literal["auto", "torch"] = key(
        "auto",
        "scores, losses and ranks: `auto` by fused kernels (C++ on a CPU, Triton on a GPU), which are many times "
        "faster; `torch` by plain torch, which needs no C++ compiler",
    )
    memory_gib: float | None = key(
        None,
        "memory that each worker may count on, on `cuda` that of its GPU; default: what is free on the machine that "
        "starts the run, in equal parts, so a cluster of several machines without GPUs needs it said",
        above=0,
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. `job.yaml` in the run directory is one with every key spelled out."""

    name: str = key(REQUIRED, "names the run directory", pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*")
    seed: int = key(0, "the only source of randomness", minimum=0)
    preset: Literal["default", "paper"] = key(
        "default",
        "where keys that the file does not give take their values from; `paper` = the letter of the paper",
    )
    graph: GraphSection = key(REQUIRED, "the triples")
    model: ModelSection = key(REQUIRED, "scorer, sub-models, tiers")
    encoder: EncoderSection = key(EncoderSection(), "entities composed of shared parts")
    negatives: NegativesSection = key(NegativesSection(), "negatives and candidates")
    loss: LossSection = key(LossSection(), "the loss of one sub-model")
    med: MedSection = key(MedSection(), "how the sub-models' losses work together")
    optimizer: OptimizerSection = key(OptimizerSection(), "how columns move")
    train: TrainSection = key(REQUIRED, "how long, in what portions")
    checkpoint: CheckpointSection = key(CheckpointSection(), "saving and resuming")
    extend: ExtendSection = key(ExtendSection(), "growing out of another run")
    distill: DistillSection = key(DistillSection(), "learning from another run's model")
    evaluate: EvaluateSection = key(EvaluateSection(), "ranking")
    export: ExportSection = key(ExportSection(), "the tiers as files")
    runtime: RuntimeSection = key(RuntimeSection(), "the machine")

    @property
    def graph_name(self) -> str:
        """The name of the graph directory."""
        return self.graph.name or self.name

    @property
    def balance(self) -> float:
        """How fast losses of larger sub-models lose weight: what `med.balance` says, or suits the loss."""
        if self.med.balance is not None:
            return self.med.balance
        return 2.0 if self.loss.kind == "bce" and self.model.scorer not in DISTANCES else 0.0

    @property
    def freezes(self) -> bool:
        """Whether the rows of the run that this one grows out of stay as they are."""
        return self.extend.run is not None and self.extend.rows == "frozen"

    def keeps_teacher(self, step: int) -> bool:
        """Whether the columns of another run's model, which teaches, stay as they are in a step (0-based)."""
        distill = self.distill
        return distill.teacher is not None and (distill.learns_after is None or step < distill.learns_after)

    @property
    def trained_split(self) -> str:
        """The triples that are trained on: all, or what rows that move learn from."""
        return "growth" if self.freezes else "train"


#: What a preset says for keys that the file leaves open. `paper` is the letter of the paper wherever that is
#: defined and finite; jobs/README.md lists what remains different and why.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {
        "negatives": {"kind": "per_positive", "number": 64, "corrupt": "both"},
        "loss": {
            "kind": "bce", "margin": 0.0, "margin_scaling": "equal", "temperature": "one", "regularizer": "none",
        },
        "med": {
            "mutual": "both", "evolution": "previous", "form": "paper", "normalize": "batch",
            "dynamic_weight": True, "balance": 0.0, "weights": "learnable",
        },
        "optimizer": {"schedule": "linear"},
        "train": {"batch_size": 1024},
    },
}  # fmt: skip


def uses_neighbours(med: MedSection) -> bool:
    """Whether a sub-model learns from, or is weighted by, the one next to it."""
    return med.mutual != "off" or med.evolution == "previous"


def conflicts(job: Job) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong and what to do) for every impossible combination of keys."""
    yield from _graph_conflicts(job.graph)
    yield from _model_conflicts(job.model, job.export)
    yield from _optimizer_conflicts(job)
    yield from _loss_conflicts(job)
    yield from _extend_conflicts(job)
    yield from _distill_conflicts(job)
    if job.encoder.kind != "none":
        yield from _encoder_conflicts(job)
    if job.train.watch_dim is not None and job.train.watch_dim not in job.model.dims:
        yield "train.watch_dim", f"{job.train.watch_dim} is not one of model.dims"
    if job.train.patience is not None and job.train.validate_every == 0:
        yield "train.patience", "needs validations: set train.validate_every to 1 or more"
    if job.runtime.readers and job.loss.kind == "softmax":
        yield "runtime.readers", "are for loss.kind bce; softmax groups all triples into queries in each worker"
    per_step = job.med.sub_models_per_step
    if per_step is not None and per_step > len(job.model.dims):
        yield "med.sub_models_per_step", f"{per_step} is more than the {len(job.model.dims)} sub-models"
    if job.optimizer.kind == "adam" and job.runtime.device == "cpu":
        yield "optimizer.kind", "adam is fused on CUDA only; on a CPU use rowwise_adagrad or adagrad"
    runtime = job.runtime
    if runtime.table_memory != "device" and runtime.device == "cpu":
        yield (
            "runtime.table_memory",
            f"{runtime.table_memory} spares the memory of a GPU; on a CPU tables lie in the host's memory: use device",
        )
    if runtime.table_memory == "device" and runtime.cache_fraction is not None:
        yield "runtime.cache_fraction", "is for table_memory uvm_caching and ssd; with device nothing is cached"


def _graph_conflicts(graph: GraphSection) -> Iterator[tuple[str, str]]:
    if graph.synthetic is None and not graph.train:
        yield "graph.train", "is missing: name training files, or a graph.synthetic section"
    if graph.synthetic is not None and (graph.train or graph.valid or graph.test or graph.entity_types):
        yield "graph.synthetic", "excludes graph.train, valid, test and entity_types: a graph has one source"
    for split, files, fraction in (
        ("valid", graph.valid, graph.valid_fraction),
        ("test", graph.test, graph.test_fraction),
    ):
        if files and fraction:
            yield f"graph.{split}_fraction", f"excludes graph.{split}: give files or a fraction"
    for role in ("head_column", "relation_column", "tail_column", "head_type_column", "tail_type_column"):
        name = getattr(graph, role)
        if name is None:
            continue
        if graph.format == "ntriples" and "type" in role:
            yield f"graph.{role}", "N-Triples have no columns; give graph.entity_types"
        if not graph.header and graph.format in ("tsv", "csv", "auto") and name not in graph.columns:
            yield f"graph.{role}", f"{name!r} is not one of graph.columns {list(graph.columns)}"
    if len({graph.head_column, graph.relation_column, graph.tail_column}) < 3:
        yield "graph.head_column", "head, relation and tail must be three different columns"


def _model_conflicts(model: ModelSection, export: ExportSection) -> Iterator[tuple[str, str]]:
    if not model.dims:
        yield "model.dims", "is empty: name at least one dim"
        return
    if list(model.dims) != sorted(set(model.dims)):
        yield "model.dims", f"{list(model.dims)} is not strictly increasing"
    if not model.tiers:
        yield "model.tiers", f"is empty: name at least one tier, such as server: {model.dims[-1]}"
    for name, dim in model.tiers.items():
        if dim not in model.dims:
            yield f"model.tiers.{name}", f"{dim} is not one of model.dims {_short(model.dims)}"
    if len(model.damping) not in (1, len(model.dims) - 1):
        yield (
            "model.damping",
            f"has {len(model.damping)} values; give 1, or {len(model.dims) - 1} (levels above the first)",
        )
    if min(model.damping, default=1) < 1 and len(model.dims) > 8:
        yield (
            "model.damping",
            (f"below 1 with {len(model.dims)} sub-models wipes the first ones out; use 1, or at most 8 dims"),
        )
    if export.layout == "delta" and len(set(model.tiers.values())) < len(model.tiers):
        yield "export.layout", "delta needs tiers of different dims: of two equal ones, the second has nothing to add"
    if model.norm != "l1" and model.scorer != "transe":
        yield "model.norm", f"is for transe; {model.scorer} has its own"


def _optimizer_conflicts(job: Job) -> Iterator[tuple[str, str]]:
    factors, tier_dims = job.optimizer.tier_factors, sorted(set(job.model.tiers.values()))
    if len(factors) not in (1, len(tier_dims)):
        yield (
            "optimizer.tier_factors",
            f"has {len(factors)} values; give 1, or {len(tier_dims)} (one per dim of model.tiers: {tier_dims})",
        )


def _loss_conflicts(job: Job) -> Iterator[tuple[str, str]]:
    loss, negatives, scorer = job.loss, job.negatives, job.model.scorer
    kinds = {"bce": ("per_positive", "chunk", "in_batch"), "softmax": ("shared", "all")}[loss.kind]
    if negatives.kind not in kinds:
        yield (
            "negatives.kind",
            f"{negatives.kind} does not go with loss.kind {loss.kind}; use {' or '.join(kinds)}",
        )
    if loss.kind == "softmax":
        per_step = job.med.sub_models_per_step or len(job.model.dims)
        if per_step > 8:
            yield "med.sub_models_per_step", "softmax holds one score matrix per sub-model: at most 8 per step"
        if per_step < min(4, len(job.model.dims)) and uses_neighbours(job.med):
            yield (
                "med.sub_models_per_step",
                "softmax needs 4 or more per step, so that sub-models between the smallest and the largest come with "
                "a neighbour; or set med.mutual to off and med.evolution to off or own",
            )
        if job.med.reach < 1:
            yield "med.reach", "below 1 is for loss.kind bce; softmax has model.damping"
        if negatives.filter_known:
            yield (
                "negatives.filter_known",
                "is for bce; softmax candidates keep known triples, as in the field",
            )
    else:
        if negatives.kind != "per_positive" and job.train.batch_size % negatives.chunk_size:
            yield (
                "negatives.chunk_size",
                f"{negatives.chunk_size} does not divide batch_size {job.train.batch_size}",
            )
        if negatives.kind == "per_positive" and negatives.corrupt == "both" and negatives.number % 2:
            yield "negatives.number", f"{negatives.number} is odd: with corrupt: both, half replace each side"
        if negatives.kind == "in_batch" and negatives.chunk_size < 2:
            yield "negatives.chunk_size", "in_batch needs chunks of at least 2 positives"
    if job.med.labels == "evaluated":
        if loss.kind == "softmax":
            yield "med.labels", "evaluated is for loss.kind bce, whose labels are of single triples"
        if job.med.weights == "learnable":
            yield "med.labels", "evaluated does not go with med.weights learnable"
    if job.med.form == "paper" and scorer not in DISTANCES and job.med.evolution != "off":
        yield "med.form", f"exp(w1 / s) is undefined where s crosses 0, as {scorer}'s does; use bounded"
    if len(loss.regularizer_weights) not in (1, len(job.model.dims)):
        yield (
            "loss.regularizer_weights",
            (f"has {len(loss.regularizer_weights)} values; give 1, or {len(job.model.dims)} (one per level)"),
        )
    if loss.regularizer != "none" and not any(loss.regularizer_weights):
        yield "loss.regularizer_weights", f"is 0, which makes loss.regularizer {loss.regularizer} do nothing"
    if loss.regularizer == "none" and any(loss.regularizer_weights):
        yield "loss.regularizer_weights", "is set, but loss.regularizer is none"


def _extend_conflicts(job: Job) -> Iterator[tuple[str, str]]:
    extend = job.extend
    if extend.run is None:
        for name in ("graph", "step", "triples"):
            if getattr(extend, name) not in (None, ()):
                yield f"extend.{name}", "needs extend.run, the run that is extended"
        return
    if not extend.triples:
        yield "extend.triples", "is missing: name files of new triples"
    if extend.run == job.name:
        yield "extend.run", f"{extend.run} is the job's own name: give the job that grows out of it another"
    if job.graph_name == (extend.graph or extend.run):
        yield "graph.name", f"{job.graph_name} is the graph that is extended: give the larger one another name"
    if job.freezes and job.train.validate_every:
        yield (
            "train.validate_every",
            "must be 0 with extend.rows frozen: the validation triples mention no row that moves",
        )


def _distill_conflicts(job: Job) -> Iterator[tuple[str, str]]:
    distill, model = job.distill, job.model
    if distill.teacher is None:
        for name in ("dim", "step", "learns_after"):
            if getattr(distill, name) is not None:
                yield f"distill.{name}", "needs distill.teacher, the run that teaches"
        return
    if distill.teacher == job.name:
        yield "distill.teacher", f"{distill.teacher} is the job's own name: give the student another"
    if len(model.dims) < 2 or model.damping[-1] != 0:
        yield (
            "model.damping",
            "must end in 0 with distill.teacher: the last of two dims or more is the teacher's units added to the "
            "student's, and its score its own level's alone",
        )
    if job.med.mutual == "off":
        yield "med.mutual", "is off, and distill.teacher teaches by mutual learning: use one_way, or both"
    if distill.learns_after is not None and job.optimizer.kind != "rowwise_adagrad":
        yield "distill.learns_after", "needs optimizer.kind rowwise_adagrad, whose state of the teacher is taken over"
    if job.extend.run is not None:
        yield "distill.teacher", "does not go with extend.run: distil the run that has grown"


def _encoder_conflicts(job: Job) -> Iterator[tuple[str, str]]:
    if job.runtime.workers > 1:
        yield "runtime.workers", "must be 1 with an encoder, whose parts every worker would have to keep alike"
    for name, is_set in (("extend.run", job.extend.run), ("distill.teacher", job.distill.teacher)):
        if is_set is not None:
            yield name, "does not go with an encoder: rows are composed, and none is an entity's own"
    if set(job.optimizer.tier_factors) != {1.0}:
        yield "optimizer.tier_factors", "does not go with an encoder, whose parts serve all tiers; use encoder.lr"


def _short(dims: tuple[int, ...]) -> str:
    shown = list(map(str, dims))
    return "[" + ", ".join(shown if len(shown) <= 8 else [*shown[:3], "...", *shown[-2:]]) + "]"
