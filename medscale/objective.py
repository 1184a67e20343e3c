"""The loss of a step: rows in, every sub-model's loss out (equation 6).

    L = sum_i mutual(i-1, i) + sum_i exp(w3 d_i / d_n) hard_i + regularizer + barrier

One path for binary losses over corruptions, one for softmax over candidates; both score all sub-models in one
pass and share the terms.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medscale.batches.corruption import Corruption, CorruptionBatch
from medscale.batches.queries import QueryBatch
from medscale.config import Job, uses_neighbours
from medscale.loss.bce import binary_cross_entropy, logits_of
from medscale.loss.med import (
    ScalingParameters,
    dynamic_weights,
    mutual_divergence,
    mutual_huber,
    negative_weights,
    positive_weights,
)
from medscale.loss.regularizer import column_strengths, row_penalties
from medscale.loss.softmax import log_probabilities, target_log_probabilities
from medscale.model.layout import Layout
from medscale.model.prefix import PrefixScan, prefix_scan
from medscale.seed import generator

__all__ = ["Objective", "Terms"]


@dataclass(frozen=True)
class Terms:
    """A step's loss, taken apart."""

    #: [m]: loss of each sub-model trained in this step on the true labels
    hard: Tensor
    #: units of those sub-models
    dims: tuple[int, ...]
    #: [p]: mutual learning between neighbours
    mutual: Tensor
    #: the larger dim of each pair of neighbours
    mutual_dims: tuple[int, ...]
    regularizer: Tensor
    barrier: Tensor
    #: what is minimised
    total: Tensor

    def means(self) -> Mapping[str, float]:
        """Return one number per term, for logs."""
        mutual = self.mutual.mean().item() if len(self.mutual) else 0.0
        return {
            "loss": self.total.item(),
            "hard": self.hard.mean().item(),
            "mutual": mutual,
            "regularizer": self.regularizer.item(),
        }


class Objective(torch.nn.Module):
    """Everything between looked-up rows and the number to minimise."""

    def __init__(self, job: Job, layout: Layout, device: torch.device) -> None:
        super().__init__()
        self.job, self.layout, self.device = job, layout, device
        med = job.med
        self.scaling = ScalingParameters(
            med.w1, med.w2, med.w3, learnable=med.weights == "learnable", barrier=med.weights_barrier
        ).to(device)
        self.logits = logits_of(job.loss, layout.dims, is_distance=layout.scorer.is_distance, device=device)
        self.strengths, self.relation_strengths = (
            column_strengths(job.loss.regularizer_weights, layout.dims, columns).to(device)
            for columns in (layout.scorer.unit_columns, layout.scorer.relation_unit_columns)
        )
        self._scan_of = functools.lru_cache(maxsize=64)(self._make_scan)

    def forward(self, batch: CorruptionBatch | QueryBatch, rows_UC: Tensor, relations_RC: Tensor, step: int) -> Terms:
        """Return the terms of a step's batch; `rows_UC` are the rows of its `entities_U`."""
        if isinstance(batch, QueryBatch):
            return self._softmax_terms(batch, rows_UC, relations_RC, step)
        return self._binary_terms(batch, rows_UC, relations_RC, step)

    # -- binary losses ------------------------------------------------------------------------------------

    def _binary_terms(self, batch: CorruptionBatch, rows_UC: Tensor, relations_RC: Tensor, step: int) -> Terms:
        """Binary cross-entropy; neighbours are those of the full list, since the one pass gives them for free."""
        chosen = self._chosen(step)
        scan = self._scan_of(tuple(range(len(self.layout.dims))))
        total = sum(c.num_positives for c in batch.corruptions)
        hard = rows_UC.new_zeros(len(chosen))
        mutual = rows_UC.new_zeros(len(self._taught(chosen)))
        for corruption in batch.corruptions:
            share = corruption.num_positives / total
            part_hard, part_mutual = self._corruption_losses(corruption, scan, chosen, rows_UC, relations_RC)
            hard = hard + share * part_hard
            mutual = mutual + share * part_mutual
        triples = [(c.known_XP, c.relation_XP, c.target_XP) for c in batch.corruptions]
        known, relation, target = (torch.cat([t[i].flatten() for t in triples]) for i in range(3))
        penalty = self._penalty(rows_UC, relations_RC, known, relation, target)
        dims = self.layout.dims
        return self._combine(hard, [dims[i] for i in chosen], mutual, [dims[i] for i in self._taught(chosen)], penalty)

    def _corruption_losses(
        self, c: Corruption, scan: PrefixScan, chosen: Sequence[int], rows_UC: Tensor, relations_RC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (hard loss of each chosen sub-model, mutual loss of each pair) of one corruption."""
        scorer, med = self.layout.scorer, self.job.med
        relation_XPC = _gather(relations_RC, c.relation_XP)
        query_XPC = scorer.query(_gather(rows_UC, c.known_XP), relation_XPC, c.side)
        scale_XPC = scorer.scale(relation_XPC, c.side) if scorer.scale else None
        flat = (query_XPC.flatten(0, 1), _gather(rows_UC, c.target_XP.flatten()))
        positive_nR = scan.pair_scores(*flat, None if scale_XPC is None else scale_XPC.flatten(0, 1))
        negative_nXPK = scan.scores(query_XPC, _gather(rows_UC, c.candidates_XK), scale_XPC)
        logit_nR, logit_nXPK = self.logits(positive_nR), self.logits(negative_nXPK)

        w1, w2, _ = self.scaling()
        literal = med.form == "paper"
        positive_evidence = positive_nR if literal else torch.sigmoid(logit_nR.detach())
        negative_evidence = negative_nXPK if literal else logit_nXPK
        weights_mR = positive_weights(self._evidence(positive_evidence, chosen), w1, form=med.form)
        weights_mXPK = negative_weights(self._evidence(negative_evidence, chosen), w2, c.keep_XPK, over=med.normalize)
        if med.evolution == "previous" and chosen[0] == 0:
            weights_mR, weights_mXPK = _first_even(weights_mR), _first_even(weights_mXPK, c.keep_XPK)
        hard_m = binary_cross_entropy(logit_nR[chosen], weights_mR, logit_nXPK[chosen], weights_mXPK)
        return hard_m, self._mutual(logit_nR, logit_nXPK, chosen)

    def _evidence(self, values_n: Tensor, chosen: Sequence[int]) -> Tensor:
        """Return what each chosen sub-model's weights depend on: constant, the previous scores, or its own."""
        match self.job.med.evolution:
            case "off":
                return torch.full_like(values_n[chosen], -1.0).detach()
            case "previous":
                return values_n.detach()[[max(i - 1, 0) for i in chosen]]
            case _:
                return values_n.detach()[chosen]

    def _mutual(self, logit_nR: Tensor, logit_nXPK: Tensor, chosen: Sequence[int]) -> Tensor:
        """Return Huber losses [p] between each taught pair, mean over positives and negatives alike."""
        larger = self._taught(chosen)
        if not larger:
            return logit_nR.new_zeros(0)
        both = self.job.med.mutual == "both"
        pieces = (logit_nR, logit_nXPK.flatten(1))
        counts = [piece.shape[1] for piece in pieces]
        losses = []
        for piece in pieces:
            teacher = piece[larger] if both else piece[larger].detach()
            losses.append(mutual_huber(piece[[i - 1 for i in larger]], teacher))
        return sum(loss * (count / sum(counts)) for loss, count in zip(losses, counts, strict=True))  # type: ignore[return-value]

    def _taught(self, chosen: Sequence[int]) -> list[int]:
        """Return the larger sub-model of each pair that learns in this step."""
        return [] if self.job.med.mutual == "off" else [i for i in chosen if i > 0]

    # -- softmax losses -----------------------------------------------------------------------------------

    def _softmax_terms(self, batch: QueryBatch, rows_UC: Tensor, relations_RC: Tensor, step: int) -> Terms:
        """Cross-entropy over candidates; only chosen sub-models are scored, each a product of matrices."""
        chosen = self._chosen(step)
        scan, med, targets = self._scan_of(tuple(chosen)), self.job.med, batch.targets
        scores = self._candidate_scores(batch, scan, chosen, rows_UC, relations_RC)
        pairs = [(a, a + 1) for a in range(len(chosen) - 1) if chosen[a + 1] == chosen[a] + 1]
        if med.mutual != "off" and pairs:
            logs = [log_probabilities(s, batch.bias_M) for s in scores]
            log_mT = torch.stack([log[targets.query_T, targets.candidate_T] for log in logs])
            mutual = torch.stack([mutual_divergence(logs[a], logs[b], both=med.mutual == "both") for a, b in pairs])
        else:
            log_mT = torch.stack([target_log_probabilities(s, batch.bias_M, targets) for s in scores])
            mutual, pairs = rows_UC.new_zeros(0), []
        hard = -(self._answer_weights(log_mT, chosen) * log_mT).sum(1)
        known, relation = batch.known_Q[targets.query_T], batch.relation_Q[targets.query_T]
        penalty = self._penalty(rows_UC, relations_RC, known, relation, targets.candidate_T)
        return self._combine(hard, scan.dims, mutual, [scan.dims[b] for _, b in pairs], penalty)

    def _candidate_scores(
        self, batch: QueryBatch, scan: PrefixScan, chosen: Sequence[int], rows_UC: Tensor, relations_RC: Tensor
    ) -> list[Tensor]:
        """Return logits [Q, M] of each chosen sub-model; a product's score is its logit."""
        scorer = self.layout.scorer
        known_QC, relation_QR = _gather(rows_UC, batch.known_Q), _gather(relations_RC, batch.relation_Q)
        split = [batch.num_tail_queries, len(known_QC) - batch.num_tail_queries]
        (known_tails, known_heads), (for_tails, for_heads) = known_QC.split(split), relation_QR.split(split)
        queries = (scorer.query(known_tails, for_tails, "tail"), scorer.query(known_heads, for_heads, "head"))
        query_1QC = torch.cat(queries).unsqueeze(0)
        if not scorer.is_distance:
            return [s.squeeze(0) for s in scan.product_scores(query_1QC, rows_UC.unsqueeze(0))]
        scale_1QC = None
        if scorer.scale:
            scale_1QC = torch.cat([scorer.scale(for_tails, "tail"), scorer.scale(for_heads, "head")]).unsqueeze(0)
        scores_mQM = scan.scores(query_1QC, rows_UC.unsqueeze(0), scale_1QC).squeeze(1)
        return list(self.logits.of(chosen)(scores_mQM))

    def _answer_weights(self, log_mT: Tensor, chosen: Sequence[int]) -> Tensor:
        """Weights [m, T] of answers (equation 3, with the probability of the answer as evidence).

        Negatives need none: a softmax weighs each by its own probability already.
        """
        if self.job.med.evolution == "off":
            return torch.full_like(log_mT, 1 / log_mT.shape[1]).detach()
        evidence = log_mT.detach().exp()
        if self.job.med.evolution == "previous":
            # Constant evidence is equal weights: for the smallest, and where the one below is not in this step.
            even = torch.ones_like(evidence[0])
            below = [b and chosen[b] == chosen[b - 1] + 1 for b in range(len(chosen))]
            evidence = torch.stack([evidence[b - 1] if is_there else even for b, is_there in enumerate(below)])
        return positive_weights(evidence, self.scaling()[0], form="bounded")

    # -- both ---------------------------------------------------------------------------------------------

    def _combine(
        self, hard: Tensor, dims: Sequence[int], mutual: Tensor, mutual_dims: Sequence[int], penalty: Tensor
    ) -> Terms:
        """Add up the terms (equation 6)."""
        weights = torch.ones_like(hard)
        if self.job.med.dynamic_weight:
            sizes = torch.tensor([*dims, self.layout.dims[-1]], dtype=hard.dtype, device=hard.device)
            weights = dynamic_weights(sizes, self.scaling()[2])[: len(dims)]
        barrier = self.scaling.barrier()
        total = (weights * hard).sum() + self.job.med.mutual_weight * mutual.sum() + penalty + barrier
        return Terms(hard, tuple(dims), mutual, tuple(mutual_dims), penalty, barrier, total)

    def _penalty(
        self, rows_UC: Tensor, relations_RC: Tensor, known: Tensor, relation: Tensor, target: Tensor
    ) -> Tensor:
        """Return the regularizer of the batch's triples, mean over triples."""
        kind = self.job.loss.regularizer
        if kind == "none":
            return rows_UC.new_zeros(())
        scorer = self.layout.scorer
        is_complex = scorer.name in ("complex", "rotate")
        entity_U = row_penalties(rows_UC, self.strengths, kind, complex_units=is_complex)
        relation_R = row_penalties(relations_RC, self.relation_strengths, kind, complex_units=scorer.name == "complex")
        return (
            entity_U.index_select(0, known) + relation_R.index_select(0, relation) + entity_U.index_select(0, target)
        ).mean()

    def _chosen(self, step: int) -> list[int]:
        """Return the sub-models of a step: all, or a seeded sample with the smallest and the largest.

        Softmax losses pay for each one, so there the sample is made of neighbours, which can teach each other.
        """
        num_sub_models, wanted = len(self.layout.dims), self.job.med.sub_models_per_step
        if wanted is None or wanted >= num_sub_models:
            return list(range(num_sub_models))
        draws = generator(self.job.seed, "sub-models", step)
        chosen = {0, num_sub_models - 1}
        stride = 2 if self.job.loss.kind == "softmax" and uses_neighbours(self.job.med) else 1
        for start in draws.permutation(num_sub_models - 1):
            chosen.update(range(start, min(start + stride, num_sub_models))[: wanted - len(chosen)])
            if len(chosen) == wanted:
                break
        return sorted(int(i) for i in chosen)

    def _make_scan(self, chosen: tuple[int, ...]) -> PrefixScan:
        return prefix_scan(self.layout.scorer, self.layout.dims, self.layout.damping, chosen, device=self.device)


def _gather(rows_UC: Tensor, positions: Tensor) -> Tensor:
    """Return rows [..., C] at positions [...].

    Indexing would do, but on several CPU threads its backward pass adds to repeated rows in any order; that of a
    look-up adds in order, so runs repeat bit for bit.
    """
    return F.embedding(positions, rows_UC)


def _first_even(weights: Tensor, keep: Tensor | None = None) -> Tensor:
    """Give the smallest sub-model, which has no previous one, equal weights (i = 1 in equations 3 and 4)."""
    counted = torch.ones_like(weights[:1]) if keep is None else keep.to(weights.dtype).expand_as(weights[:1])
    return torch.cat([counted / counted.sum().clamp(min=1), weights[1:]])
