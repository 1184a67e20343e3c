"""Students of a directly trained model: BKD, TA, DualDE and IterDE as jobs.

A student lies beside its teacher in one table (`distill` in a job), so that one pass over a batch scores both, and what
the paper calls mutual learning carries the soft labels. Each method is a few keys of a job, or a chain of jobs:

    bkd      Hinton et al., 2015: KL divergence from the teacher's distribution beside the loss on the labels. A binary
             loss has a distribution per triple, true or false; temperature 1
    ta       Mirzadeh et al., 2020: bkd from the teacher to an assistant of medium size, and from that to the student
    dualde   Zhu et al., 2022: a triple's soft label counts as far as the teacher is right about it, its hard label for
             the rest; in a second stage the teacher learns too, from the labels and the student. Simplified: soft
             labels are scores alone, without the differences of angles and lengths of embeddings; the sharpness of
             the evaluation is 1
    iterde   Liu et al., 2023: each model's student has half its units, and teaches the next one; the soft labels'
             weight rises from 0. Simplified: soft labels are scores alone; the weight rises linearly over a part of the
             training

All compare probabilities as bkd does, where DualDE and IterDE say Huber's loss of scores: that never stops pulling at
easy negatives, whose logits no small model reaches, and outweighs the loss on the labels.

Soft labels of a positive and its negatives are summed; their mean is hardly heard beside the label. (TransE with 10
units on WN18RR after 20 epochs of bkd: validation MRR .096 by sums, .082 by means.)

A student's loss on labels, its negatives and its optimizer are those of direct training.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

from medscale.config import DistillSection, Job

__all__ = ["METHODS", "Method", "assistant_dim", "chain", "student"]

Method = Literal["bkd", "ta", "dualde", "iterde"]
METHODS: tuple[Method, ...] = get_args(Method)

#: what the methods are made of, beside the teacher
_KEYS: Mapping[Method, Mapping[str, object]] = {
    "bkd": {"mutual": "one_way", "mutual_loss": "kl"},
    "ta": {"mutual": "one_way", "mutual_loss": "kl"},
    "dualde": {"mutual": "both", "mutual_loss": "kl", "labels": "evaluated"},
    "iterde": {"mutual": "one_way", "mutual_loss": "kl"},
}


def student(method: Method, direct: Job, name: str, teacher: str, teacher_dim: int, *, stage_steps: int = 0) -> Job:
    """Return the job of a student of another run's model.

    `direct` would train the student alone; `teacher` is a run with a sub-model of `teacher_dim` units. After
    `stage_steps` DualDE's teacher begins to learn, and IterDE's soft labels have their whole weight.
    """
    (dim,) = direct.model.dims
    model = replace(direct.model, dims=(dim, dim + teacher_dim), tiers={"student": dim}, damping=(0.0,))
    med = replace(
        direct.med, dynamic_weight=False, balance=0.0, mutual_weight=1.0 + direct.negatives.number,
        mutual_warmup_steps=stage_steps if method == "iterde" else 0, **_KEYS[method],  # type: ignore[arg-type]
    )  # fmt: skip
    return replace(
        direct, name=name, model=model, med=med,
        # Both are what they would be alone; a distance's student in units of the teacher's, so that one learning rate
        # suits the columns of both.
        loss=replace(direct.loss, margin_scaling="linear", temperature="linear"),
        train=replace(direct.train, watch_dim=dim),
        distill=DistillSection(
            teacher=teacher, dim=teacher_dim, learns_after=stage_steps if method == "dualde" else None
        ),
    )  # fmt: skip


def assistant_dim(mrr_of: Mapping[int, float], student_dim: int, teacher_dim: int) -> int:
    """Return the dim between a student's and its teacher's whose directly trained model is nearest to their mean MRR.

    As section 5.1.4 of the paper chooses it; `mrr_of`: the validation MRR of directly trained models by dim. Of equally
    near ones the smaller.
    """
    middle = (mrr_of[student_dim] + mrr_of[teacher_dim]) / 2
    between = [dim for dim in mrr_of if student_dim < dim < teacher_dim]
    return min(sorted(between), key=lambda dim: abs(mrr_of[dim] - middle))


def chain(student_dim: int, teacher_dim: int) -> tuple[int, ...]:
    """Return the dims of IterDE's models: the teacher's, halved as often as the student allows, and the student's."""
    dims = [teacher_dim]
    while dims[-1] // 2 > student_dim:
        dims.append(dims[-1] // 2)
    return (*dims, student_dim)
