"""The loss of a step: rows in, every sub-model's loss out (equation 6).

    L = sum_i b_i (mutual(i-1, i) + exp(w3 d_i / d_n) hard_i) + regularizer + barrier,  b_i = (d_1 / d_i)^balance

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
from medscale.loss.bce import logits_of
from medscale.loss.fused import Kernels
from medscale.loss.med import ScalingParameters, dynamic_weights, mutual_divergence, positive_weights, size_balance
from medscale.loss.negatives import BinaryConstants, negative_losses
from medscale.loss.positives import positive_losses
from medscale.loss.regularizer import column_strengths, row_penalties
from medscale.loss.softmax import log_probabilities
from medscale.model.layout import Layout
from medscale.model.prefix import PrefixScan, prefix_scan
from medscale.model.rows import Rows, add_rows
from medscale.seed import generator
from medscale.workers import ALONE, Workers

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
    #: whether the negatives' losses are in all that; if not, they may be missing
    whole: bool = True

    def over(self, workers: Workers) -> "Terms":
        """Return the terms of all workers' shares together."""
        if workers.size == 1:
            return self
        parts = [t.detach() for t in (self.hard, self.mutual, self.regularizer, self.barrier, self.total)]
        sums = workers.sum(torch.cat([part.reshape(-1) for part in parts])).split([part.numel() for part in parts])
        hard, mutual, regularizer, barrier, total = (s.view_as(p) for s, p in zip(sums, parts, strict=True))
        return Terms(hard, self.dims, mutual, self.mutual_dims, regularizer, barrier, total, self.whole)

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
    """Everything between looked-up rows and the number to minimise: this worker's share of it."""

    def __init__(self, job: Job, layout: Layout, device: torch.device, workers: Workers = ALONE) -> None:
        super().__init__()
        self.job, self.layout, self.device, self.workers = job, layout, device, workers
        med = job.med
        self.scaling = ScalingParameters(
            med.w1, med.w2, med.w3, learnable=med.weights == "learnable", barrier=med.weights_barrier
        ).to(device)
        self.logits = logits_of(job.loss, layout.dims, is_distance=layout.scorer.is_distance, device=device)
        self.strengths, self.relation_strengths = (
            column_strengths(job.loss.regularizer_weights, layout.dims, columns).to(device)
            for columns in (layout.scorer.unit_columns, layout.scorer.relation_unit_columns)
        )
        # GPU kernels know the paper's mutual learning alone.
        is_plain = device.type == "cpu" or (med.mutual_loss == "huber" and med.labels == "even" and med.reach == 1)
        self.kernels = Kernels(device) if job.runtime.kernels == "auto" and is_plain else None
        self._scan_of = functools.lru_cache(maxsize=64)(self._make_scan)

    def rows(self, looked_up_UC: Tensor) -> Rows:
        """Return a step's rows, ready to gather their gradient."""
        return Rows(looked_up_UC, self.kernels.pairs.add_rows if self.kernels else add_rows)

    def forward(
        self, batch: CorruptionBatch | QueryBatch, rows: Rows, relations_RC: Tensor, step: int, *, losses: bool = True
    ) -> Terms:  # fmt: skip
        """Return the terms of a step's batch; `rows` are those of its `entities_U`.

        Derivatives need no `losses` of negatives, whose logarithms take about a tenth of the kernel's time.
        """
        if isinstance(batch, QueryBatch):
            return self._softmax_terms(batch, rows, relations_RC, step)
        return self._binary_terms(batch, rows, relations_RC, step, losses=losses)

    # -- binary losses ------------------------------------------------------------------------------------

    def _binary_terms(
        self, batch: CorruptionBatch, rows: Rows, relations_RC: Tensor, step: int, *, losses: bool
    ) -> Terms:  # fmt: skip
        """Binary cross-entropy; neighbours are those of the full list, since the one pass gives them for free."""
        chosen = self._chosen(step)
        constants = self._binary_constants(chosen, step)
        hard_weights_n, mutual_weights_n = self._loss_weights(step)
        is_trained_n = torch.zeros_like(hard_weights_n)
        is_trained_n[chosen] = 1
        hard_weights_n = is_trained_n * hard_weights_n
        num_positives = sum(c.total_positives for c in batch.corruptions)
        barrier = self.scaling.barrier() / self.workers.size
        total, penalty = barrier, hard_weights_n.new_zeros(())
        hard_n, mutual_n = torch.zeros_like(hard_weights_n), torch.zeros_like(hard_weights_n)
        for corruption in batch.corruptions:
            share = corruption.total_positives / num_positives
            loss, *parts = self._corruption_terms(
                corruption, constants, rows, relations_RC, share, hard_weights_n, mutual_weights_n, losses=losses
            )
            total = total + loss
            hard_n, mutual_n, penalty = (a + share * b for a, b in zip((hard_n, mutual_n, penalty), parts, strict=True))
        dims = self.layout.dims
        taught = [i for i, is_taught in enumerate(constants.taught) if is_taught]
        return Terms(
            hard_n[chosen], tuple(dims[i] for i in chosen), mutual_n[taught], tuple(dims[i] for i in taught), penalty,
            barrier, total + penalty, losses or self.kernels is None,
        )  # fmt: skip

    def _corruption_terms(
        self, c: Corruption, constants: BinaryConstants, rows: Rows, relations_RC: Tensor, share: float,
        hard_weights_n: Tensor, mutual_weights_n: Tensor, *, losses: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Return one corruption's share of the loss, and its (hard [n], mutual [n], penalty)."""
        scorer, med = self.layout.scorer, self.job.med
        scan = self._scan_of(tuple(range(len(self.layout.dims))))
        relation_XPC = _gather(relations_RC, c.relation_XP)
        known_XPC, target_RC = rows.take(c.known_XP), rows.take(c.target_XP.flatten())
        query_XPC = scorer.query(known_XPC, relation_XPC, c.side)
        scale_XPC = scorer.scale(relation_XPC, c.side) if scorer.scale else None
        query_RC, scale_RC = query_XPC.flatten(0, 1), None if scale_XPC is None else scale_XPC.flatten(0, 1)
        w1, w2, _ = self.scaling()

        # Each positive's negatives count the same, so a worker's mean counts by its share of the positives; mutual
        # learning is a mean over positives and negatives alike.
        part = len(query_RC) / c.total_positives
        count = c.total_positives * (1 + c.candidates_XK.shape[1])
        if med.normalize == "batch":
            part = 1.0  # their weights are a softmax over all workers' negatives already
        hard_weights_n, mutual_weights_n = share * hard_weights_n, share / count * mutual_weights_n
        if self.kernels is None:
            positive_nR = scan.pair_scores(query_RC, target_RC, scale_RC)
            hard_n, mutual_n = positive_losses(constants, w1, positive_nR, self.workers)
            negative_nXPK = scan.scores(query_XPC, rows.take(c.candidates_XK), scale_XPC)
            negative_n, negative_mutual_n = negative_losses(constants, w2, negative_nXPK, c.keep_XPK, self.workers)
            hard_n, mutual_n = hard_n + part * negative_n, mutual_n + negative_mutual_n
            total = (hard_weights_n * hard_n).sum() + (mutual_weights_n * mutual_n).sum()
        else:
            of_positives, hard_n, mutual_n = self.kernels.positive_loss(
                scan.levels, constants, query_RC, target_RC, scale_RC, w1, hard_weights_n, mutual_weights_n,
                self.workers,
            )  # fmt: skip
            of_negatives, negative_n, negative_mutual_n = self.kernels.corruption_loss(
                scan.levels, constants, query_XPC, rows, c.candidates_XK, c.keep_XPK, scale_XPC, w2,
                part * hard_weights_n, mutual_weights_n, self.workers, losses=losses,
            )  # fmt: skip
            total = of_positives + of_negatives
            hard_n, mutual_n = hard_n + part * negative_n, mutual_n + negative_mutual_n
        penalty = self._row_penalties(known_XPC.flatten(0, 1), relation_XPC.flatten(0, 1), target_RC)
        return total, hard_n, mutual_n / count, len(query_RC) / c.total_positives * penalty

    def _binary_constants(self, chosen: Sequence[int], step: int) -> BinaryConstants:
        """Return whose scores weigh whose triples, and who teaches whom, in a step that trains some sub-models."""
        med, number, trained = self.job.med, range(len(self.layout.dims)), set(chosen)
        # The smallest has no previous one: its weights are even.
        evidence = {"off": [-1 for _ in number], "previous": [i - 1 for i in number], "own": list(number)}
        return BinaryConstants(
            logits=self.logits, evidence=tuple(evidence[med.evolution]),
            taught=tuple(med.mutual != "off" and i > 0 and i in trained for i in number), raw=med.form == "paper",
            over_batch=med.normalize == "batch", both=med.mutual == "both", weights_learn=med.weights == "learnable",
            divergence=med.mutual_loss == "kl", evaluated=med.labels == "evaluated",
            num_kept=int(self.job.keeps_teacher(step)),
        )  # fmt: skip

    # -- softmax losses -----------------------------------------------------------------------------------

    def _softmax_terms(self, batch: QueryBatch, rows: Rows, relations_RC: Tensor, step: int) -> Terms:
        """Cross-entropy over candidates; only chosen sub-models are scored, each level a product of matrices."""
        chosen = self._chosen(step)
        scan, med, targets = self._scan_of(tuple(chosen)), self.job.med, batch.targets
        taught = tuple(med.mutual != "off" and m > 0 and chosen[m] == chosen[m - 1] + 1 for m in range(len(chosen)))
        log_mT, mutual_m = self._log_probabilities(batch, scan, chosen, taught, rows, relations_RC)
        hard = -(self._answer_weights(log_mT, chosen, batch.total_targets) * log_mT).sum(1)
        # means over a worker's queries count by their share
        mutual = len(batch.known_Q) / batch.total_queries * mutual_m[list(taught)]
        known, relation = batch.known_Q[targets.query_T], batch.relation_Q[targets.query_T]
        penalty = self._penalty(rows.values_UC, relations_RC, known, relation, targets.candidate_T)
        penalty = len(known) / batch.total_targets * penalty
        barrier = self.scaling.barrier() / self.workers.size
        hard_weights_n, mutual_weights_n = self._loss_weights(step)
        of_taught = [i for i, is_taught in zip(chosen, taught, strict=True) if is_taught]
        total = (hard_weights_n[chosen] * hard).sum() + (mutual_weights_n[of_taught] * mutual).sum() + penalty + barrier
        taught_dims = tuple(dim for dim, is_taught in zip(scan.dims, taught, strict=True) if is_taught)
        return Terms(hard, scan.dims, mutual, taught_dims, penalty, barrier, total)

    def _log_probabilities(
        self, batch: QueryBatch, scan: PrefixScan, chosen: Sequence[int], taught: tuple[bool, ...], rows: Rows,
        relations_RC: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return (log p(target | query) [m, T], divergence of each chosen sub-model from the one before [m])."""
        scorer, both, targets = self.layout.scorer, self.job.med.mutual == "both", batch.targets
        query_QC, scale_QC = self._queries(batch, rows, relations_RC)
        fused = self.kernels.softmax if self.kernels else None
        results: tuple[Tensor, Tensor]
        if fused and not scorer.is_distance:
            softmax = fused.Softmax(scan, taught, both)
            results = fused.product_log_probabilities(softmax, query_QC, rows, batch.bias_M, targets)
            return results
        query_1QC, values_1UC = query_QC.unsqueeze(0), rows.values_UC.unsqueeze(0)
        if scorer.is_distance:
            scores_mQM = scan.scores(query_1QC, values_1UC, None if scale_QC is None else scale_QC.unsqueeze(0))
            logits_mQM = self.logits.of(chosen)(scores_mQM.squeeze(1))
        else:
            logits_mQM = torch.cat(scan.product_scores(query_1QC, values_1UC))  # a product's score is its logit
        if fused:
            softmax = fused.Softmax(scan, taught, both)
            results = fused.score_log_probabilities(softmax, logits_mQM, batch.bias_M, targets)
            return results
        logs_mQM = log_probabilities(logits_mQM, batch.bias_M)
        nothing = logs_mQM.new_zeros(())
        divergences = [
            mutual_divergence(logs_mQM[m - 1], logs_mQM[m], both=both) if is_taught else nothing
            for m, is_taught in enumerate(taught)
        ]
        return logs_mQM[:, targets.query_T, targets.candidate_T], torch.stack(divergences)

    def _queries(self, batch: QueryBatch, rows: Rows, relations_RC: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the queries [Q, C], and the scales [Q, C] where the scorer has one; those for tails come first."""
        scorer = self.layout.scorer
        known_QC, relation_QR = rows.take(batch.known_Q), _gather(relations_RC, batch.relation_Q)
        split = [batch.num_tail_queries, len(known_QC) - batch.num_tail_queries]
        (known_tails, known_heads), (for_tails, for_heads) = known_QC.split(split), relation_QR.split(split)
        queries = (scorer.query(known_tails, for_tails, "tail"), scorer.query(known_heads, for_heads, "head"))
        if not scorer.scale:
            return torch.cat(queries), None
        return torch.cat(queries), torch.cat([scorer.scale(for_tails, "tail"), scorer.scale(for_heads, "head")])

    def _answer_weights(self, log_mT: Tensor, chosen: Sequence[int], total_targets: int) -> Tensor:
        """Weights [m, T] of answers (equation 3, with the probability of the answer as evidence).

        Negatives need none: a softmax weighs each by its own probability already.
        """
        if self.job.med.evolution == "off":
            return torch.full_like(log_mT, 1 / total_targets).detach()
        evidence = log_mT.detach().exp()
        if self.job.med.evolution == "previous":
            # Constant evidence is equal weights: for the smallest, and where the one below is not in this step.
            even = torch.ones_like(evidence[0])
            below = [b and chosen[b] == chosen[b - 1] + 1 for b in range(len(chosen))]
            evidence = torch.stack([evidence[b - 1] if is_there else even for b, is_there in enumerate(below)])
        return positive_weights(evidence, self.scaling()[0], form="bounded", workers=self.workers)

    # -- both ---------------------------------------------------------------------------------------------

    def _loss_weights(self, step: int) -> tuple[Tensor, Tensor]:
        """Return weights [n] in a step (0-based): of own losses (equation 6), and of mutual ones, by the larger one."""
        med = self.job.med
        sizes = torch.tensor(self.layout.dims, dtype=self.strengths.dtype, device=self.device)
        balance = size_balance(sizes, self.job.balance)
        hard_n = balance * dynamic_weights(sizes, self.scaling()[2]) if med.dynamic_weight else balance
        risen = min(1.0, (step + 1) / med.mutual_warmup_steps) if med.mutual_warmup_steps else 1.0
        return hard_n, med.mutual_weight * risen * torch.cat([balance[:1], balance[:-1]])  # the smaller one is taught

    def _row_penalties(self, known: Tensor, relation: Tensor, target: Tensor) -> Tensor:
        """Return the regularizer of triples, given their rows: mean over triples."""
        kind, scorer = self.job.loss.regularizer, self.layout.scorer
        if kind == "none":
            return known.new_zeros(())
        is_complex = scorer.name in ("complex", "rotate")
        entities = [row_penalties(rows, self.strengths, kind, complex_units=is_complex) for rows in (known, target)]
        relations = row_penalties(relation, self.relation_strengths, kind, complex_units=scorer.name == "complex")
        return _mean(entities[0] + relations + entities[1])

    def _penalty(
        self, rows_UC: Tensor, relations_RC: Tensor, known: Tensor, relation: Tensor, target: Tensor
    ) -> Tensor:
        """Return the regularizer of triples, given positions: rows that many triples share are taken once."""
        kind, scorer = self.job.loss.regularizer, self.layout.scorer
        if kind == "none":
            return rows_UC.new_zeros(())
        is_complex = scorer.name in ("complex", "rotate")
        entity_U = row_penalties(rows_UC, self.strengths, kind, complex_units=is_complex)
        relation_R = row_penalties(relations_RC, self.relation_strengths, kind, complex_units=scorer.name == "complex")
        return _mean(
            entity_U.index_select(0, known) + relation_R.index_select(0, relation) + entity_U.index_select(0, target)
        )

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
        return prefix_scan(
            self.layout.scorer, self.layout.dims, self.layout.damping, chosen, reach=self.job.med.reach,
            device=self.device,
        )  # fmt: skip


def _mean(penalties_T: Tensor) -> Tensor:
    """Return the mean; 0 for a worker without triples."""
    return penalties_T.sum() / max(1, len(penalties_T))


def _gather(rows_UC: Tensor, positions: Tensor) -> Tensor:
    """Return rows [..., C] at positions [...].

    Indexing would do, but on several CPU threads its backward pass adds to repeated rows in any order; that of a
    look-up adds in order, so runs repeat bit for bit.
    """
    return F.embedding(positions, rows_UC)
