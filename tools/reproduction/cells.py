"""Cells: one trained model, or one way to crop another's, and the job that trains it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medscale.baselines.crops import Method as Crop
from medscale.baselines.distillation import Method as Lesson
from medscale.config import DISTANCES, Job
from medscale.jobfile import load_job, parse_job, with_values
from medscale.search import Trial
from medscale.trainer import initial_scale

__all__ = [
    "ABLATIONS", "COMPACT", "CROPS", "DATASETS", "DIMS", "LARGEST", "LESSONS", "NUM_TRIALS", "RATES",
    "RECIPE", "RECIPES", "RECIPE_DIMS", "SCORERS", "SHORTER_TRIALS", "SHOWN", "SIXTY_FOUR", "STAGES",
    "SUB_MODELS", "TRIAL_EPOCHS", "Cell", "best_values", "mean_mrr", "rate_of", "tries_of",
]  # fmt: skip

DATASETS = ("WN18RR", "FB15k-237")
SCORERS = {"TransE": "transe", "SimplE": "simple", "RotatE": "rotate", "PairRE": "pairre"}
SIXTY_FOUR = tuple(range(10, 641, 10))
LARGEST = SIXTY_FOUR[-1]
#: those that tables show
DIMS = (10, 40, 160, 640)
CROPS: Mapping[str, Crop] = {"Ext": "ext", "Ext-L": "ext-l", "Ext-V": "ext-v", "PCA": "pca"}
LESSONS: Mapping[str, Lesson] = {"BKD": "bkd", "TA": "ta", "DualDE": "dualde", "IterDE": "iterde"}
#: parameter-efficient models of table 4, by data set: encoders, and directly trained models, with the paper's dims
COMPACT: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "WN18RR": {
        "RotatE-large": (500, ""), "RotatE-small": (50, ""),
        "NodePiece": (100, "kind: nodepiece, reserved: 500, nearest: 50, relations: 4"),
        "EARL": (200, "kind: earl, reserved: 4094, nearest: 10"),
    },
    "FB15k-237": {
        "RotatE-large": (1000, ""), "RotatE-small": (100, ""),
        "NodePiece": (100, "kind: nodepiece, reserved: 1000, nearest: 20, relations: 15"),
        "EARL": (150, "kind: earl, reserved: 1454, nearest: 10"),
    },
}  # fmt: skip
#: the learning rates that encoders are tried with
_ENCODER_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
#: sub-models by the name that a run has in table 8; the paper does not say which 16
SUB_MODELS = {"MED": SIXTY_FOUR, "MED n=16": (10, *range(40, 561, 40), 640), "MED n=4": DIMS}
#: the balance of sizes is not the paper's, and products' alone; "as written" learns and weighs as the paper says
ABLATIONS: Mapping[str, Mapping[str, str]] = {
    "MED w/o MLM": {"med.mutual": "off"}, "MED w/o EIM": {"med.evolution": "off"},
    "MED w/o DLW": {"med.dynamic_weight": "false"}, "MED w/o balance": {"med.balance": "0.0"},
    "MED as written": {"med.mutual": "both", "med.mutual_loss": "huber", "med.evolution": "previous"},
}  # fmt: skip

#: the shipped jobs that are strong at every dim (softmax over products, N3, damped nesting): a scorer of their own
RECIPE = "ComplEx"
RECIPES = {"WN18RR": "wn18rr.yaml", "FB15k-237": "fb15k237.yaml"}
RECIPE_DIMS = (10, 40, 200)
#: all dims that tables show
SHOWN = {*DIMS, *RECIPE_DIMS}
#: what every model of a recipe is tried with: a learning rate, and the regularizer's strength of all levels
_RECIPE_TRIES = ((0.3, 0.03), (0.3, 0.05), (0.3, 0.07), (0.3, 0.1), (0.3, 0.2), (1.0, 0.05), (1.0, 0.1))

#: the learning rates that every model is tried with, as multiples of the size of its initial columns: those of a small
#: model are far larger than those of a large one, and so are the steps that move them. Those beyond the first
#: `NUM_TRIALS` are tried while the largest so far is the best
RATES = {"distances": (0.6, 2.0, 6.0, 20.0, 60.0, 200.0), "products": (0.06, 0.2, 0.6, 2.0, 6.0, 20.0)}
NUM_TRIALS = 4
#: relations that are no vectors of that size (phases, factors) move by this times the multiple
_RELATION_RATE = 0.05
#: the part of its training after which DualDE's teacher learns too, and IterDE's soft labels have their whole weight. A
#: teacher that learns while learning rates are high unlearns: after 20 epochs TransE's, of .210, is at .198 if it
#: learns from the half on, and its student of 10 units at .074 instead of .095
STAGES: Mapping[Lesson, float] = {"dualde": 0.8, "iterde": 0.5}

#: epochs of each trial. Shorter ones choose too large a rate for a small model: 10 units of TransE on FB15k-237 got 2.2
#: from 7 epochs, and 0.66 from 20
TRIAL_EPOCHS = 20
#: where an epoch takes longest; as many steps as 20 on WN18RR
SHORTER_TRIALS = {("FB15k-237", "RotatE"): 7}
#: those of a recipe, whose steps teach more
_RECIPE_TRIAL_EPOCHS = 5

#: triples that trials and steps are compared by
_NUM_VALID = 500

_JOBS = Path(__file__).resolve().parents[2] / "jobs"
# Neighbours compare probabilities: Huber's loss of logits (the paper's) never stops pulling at easy negatives, whose
# logits grow with the model, until it outweighs the loss on the labels.
_JOB = """
name: {name}
graph:
  name: {files}
  train: [{files}/train.tsv.zst]
  valid: [{files}/valid.tsv.zst]
  test: [{files}/test.tsv.zst]
model:
  scorer: {scorer}
  dims: {dims}
  tiers: {{{tiers}}}
encoder: {{{encoder}}}
negatives: {{kind: chunk, number: 64, chunk_size: 32}}
loss: {{kind: bce, margin: 9.0}}
med: {{mutual_loss: kl}}
optimizer: {{kind: rowwise_adagrad, lr: 0.03, schedule: linear}}
train:
  epochs: {epochs}
  batch_size: 1024
  validate_every: 5
  valid_triples: {num_valid}
checkpoint: {{every_steps: 100000}}
"""


@dataclass(frozen=True)
class Cell:
    """One model, or one way to crop another's: a row of a table at some dims."""

    dataset: str
    scorer: str
    method: str
    #: the dim it was trained for; None: all dims of one croppable run, or of one model's crops
    dim: int | None

    @property
    def name(self) -> str:
        """The name of its run and of its file."""
        method = self.method.replace("w/o ", "without ").replace("=", "").replace(" ", "_")
        return f"{self.dataset}_{self.scorer}_{method}{'' if self.dim is None else f'_{self.dim}'}".lower()

    @property
    def teacher(self) -> "Cell":
        """The largest directly trained model, which others are crops or students of."""
        return Cell(self.dataset, self.scorer, "DT", LARGEST)

    @property
    def epochs(self) -> int:
        """Epochs of training, at most, where nothing else is said: a recipe's are the shipped job's."""
        return load_job(_JOBS / RECIPES[self.dataset]).train.epochs if self.scorer == RECIPE else 200

    @property
    def trial_epochs(self) -> int:
        """Epochs of each trial where nothing else is said."""
        if self.scorer == RECIPE:
            return _RECIPE_TRIAL_EPOCHS
        return SHORTER_TRIALS.get((self.dataset, self.scorer), TRIAL_EPOCHS)

    def job(self, epochs: int, dim: int | None = None) -> Job:
        """Return the job that trains the cell's model, or one of another dim alone."""
        dim = dim or self.dim
        if self.scorer == RECIPE:
            return _recipe(self.dataset, self.name, epochs, dim)
        encoder = COMPACT[self.dataset].get(self.method, (0, ""))[1]
        dims = SUB_MODELS.get(self.method, SIXTY_FOUR) if dim is None else (dim,)
        text = _JOB.format(
            name=self.name, files=self.dataset, scorer=SCORERS[self.scorer], dims=list(dims), epochs=epochs,
            num_valid=_NUM_VALID, encoder=encoder,
            tiers=", ".join(f"d{dim}: {dim}" for dim in dims if len(dims) == 1 or dim in DIMS),
        )  # fmt: skip
        return with_values(parse_job(text, self.name), ABLATIONS.get(self.method, {}), self.name)


def _recipe(dataset: str, name: str, epochs: int, dim: int | None) -> Job:
    """Return a shipped job of another name and length, or of one of its sub-models alone, untuned."""
    rate, strength = _RECIPE_TRIES[0]
    values = {
        "name": name, "train.epochs": str(epochs), "graph.name": dataset, "optimizer.tier_factors": "[1.0]",
        "optimizer.lr": f"{rate}", "loss.regularizer_weights": f"[{strength}]",
    }  # fmt: skip
    if dim is not None:
        values |= {
            "model.dims": f"[{dim}]",
            "model.tiers": f"{{d{dim}: {dim}}}",
            "model.damping": "[1.0]",
            "med.mutual": "off",
        }
    return with_values(load_job(_JOBS / RECIPES[dataset]), values, name)


def tries_of(job: Job) -> list[dict[str, str]]:
    """Return what to try with a job, as keys and values: rising learning rates, a recipe's with its regularizer.

    Those after the first `NUM_TRIALS` are for models that the largest before suits best; a recipe's are for all.
    """
    if job.loss.kind == "softmax":
        return [
            {"optimizer.lr": f"{rate:g}", "loss.regularizer_weights": f"[{weight:g}]"} for rate, weight in _RECIPE_TRIES
        ]
    if job.encoder.kind != "none":
        return [{"encoder.lr": str(rate)} for rate in _ENCODER_RATES]
    multiples = RATES["distances" if job.model.scorer in DISTANCES else "products"]
    return [rate_of(job, multiple) for multiple in multiples]


def best_values(job: Job, trials: Sequence[Trial]) -> dict[str, str]:
    """Return what to train a job with, by its trials: what was best on validation.

    Each tier of a recipe's croppable run has the learning rate and the strength that were best for its own dim.
    """
    judged = [trial for trial in trials if trial.mrr is not None]
    dims = sorted(set(job.model.tiers.values()))
    if job.loss.kind != "softmax" or len(dims) == 1:
        return dict(max(judged, key=lambda trial: mean_mrr(trial, job.train.watch_dim)).values)
    best = [max(judged, key=lambda trial, dim=str(dim): trial.mrr_by_dim[dim]).values for dim in dims]
    rates = [float(values["optimizer.lr"]) for values in best]
    factors = ", ".join(f"{rate / rates[-1]:.4g}" for rate in rates)
    weights = ", ".join(values["loss.regularizer_weights"].strip("[]") for values in best)
    return dict(best[-1]) | {"optimizer.tier_factors": f"[{factors}]", "loss.regularizer_weights": f"[{weights}]"}


def rate_of(job: Job, multiple: float) -> dict[str, str]:
    """Return a learning rate that is a multiple of the size of the initial columns."""
    rate = {"optimizer.lr": f"{multiple * initial_scale(job):.3g}"}
    if job.model.scorer in ("rotate", "pairre"):
        rate["optimizer.relation_lr"] = f"{multiple * _RELATION_RATE:.3g}"
    return rate


def mean_mrr(trial: Trial, watch_dim: int | None = None) -> float:
    """Return a trial's validation MRR, averaged over the dims that tables show: a croppable run serves them alike.

    Of a student, whose job watches its dim, it is that of the student alone.
    """
    if watch_dim is not None:
        return trial.mrr_by_dim[str(watch_dim)]
    of_dims = {int(dim): mrr for dim, mrr in trial.mrr_by_dim.items()}
    tables = RECIPE_DIMS if set(of_dims) <= set(RECIPE_DIMS) else DIMS
    shown = [mrr for dim, mrr in of_dims.items() if dim in tables] or list(of_dims.values())
    return sum(shown) / len(shown)
