"""The plain, obviously right twin of `prefix`: crop, score, next sub-model. For tests; slow on purpose."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["level_sums", "score_triples", "sub_model_scores"]


def score_triples(
    scorer: str, norm: str, head_BC: Tensor, relation_BR: Tensor, tail_BC: Tensor, *, root: bool = True
) -> Tensor:
    """Return scores [B] of triples as Table 1 of the paper writes them; units are interleaved.

    `root=False` leaves TransE-L2's sum of squares without its root, which is what levels add up.
    """
    match scorer:
        case "transe":
            difference = head_BC + relation_BR - tail_BC
            if norm == "l1":
                return -difference.abs().sum(-1)
            squares = difference.square().sum(-1)
            return -squares.sqrt() if root else -squares
        case "rotate":
            turned = _complex(head_BC) * torch.polar(torch.ones_like(relation_BR), relation_BR)
            return -(turned - _complex(tail_BC)).abs().sum(-1)
        case "pairre":
            head_factor, tail_factor = relation_BR[:, 0::2], relation_BR[:, 1::2]
            return -(head_BC * head_factor - tail_BC * tail_factor).abs().sum(-1)
        case "simple":
            forward, inverse = relation_BR[:, 0::2], relation_BR[:, 1::2]
            one = (head_BC[:, 0::2] * forward * tail_BC[:, 1::2]).sum(-1)
            other = (tail_BC[:, 0::2] * inverse * head_BC[:, 1::2]).sum(-1)
            return (one + other) / 2
        case "complex":
            return (_complex(head_BC) * _complex(relation_BR) * _complex(tail_BC).conj()).sum(-1).real
        case _:
            assert scorer == "distmult", scorer
            return (head_BC * relation_BR * tail_BC).sum(-1)


def level_sums(
    scorer: str, norm: str, dims: Sequence[int], columns: tuple[int, int],
    head_BC: Tensor, relation_BR: Tensor, tail_BC: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Return each level's own score [B], B_1 .. B_n; `columns` = per unit of (entity, relation)."""
    entity, relation = columns
    sums = []
    for start, stop in zip([0, *dims[:-1]], dims, strict=True):
        head, tail = (x[:, start * entity : stop * entity] for x in (head_BC, tail_BC))
        part = relation_BR[:, start * relation : stop * relation]
        sums.append(score_triples(scorer, norm, head, part, tail, root=False))
    return sums


def sub_model_scores(
    scorer: str, norm: str, dims: Sequence[int], damping: Sequence[float], columns: tuple[int, int],
    head_BC: Tensor, relation_BR: Tensor, tail_BC: Tensor, reach: float = 1.0,
) -> Tensor:  # fmt: skip
    """Return scores [n, B] of every sub-model, one after the other.

    Without damping each sub-model is the plain scorer on the crop; with it, s_i = B_i + kappa_i s_(i-1),
    kappa_2 .. kappa_n. Derivatives by B_j of s_i count reach^(i - j).
    """
    if reach == 1 and all(kappa == 1 for kappa in damping):
        entity, relation = columns
        return torch.stack([
            score_triples(
                scorer, norm, head_BC[:, : d * entity], relation_BR[:, : d * relation], tail_BC[:, : d * entity]
            )
            for d in dims
        ])  # fmt: skip
    scores = [torch.zeros_like(head_BC[:, 0])]
    own_sums = level_sums(scorer, norm, dims, columns, head_BC, relation_BR, tail_BC)
    for kappa, own in zip((1.0, *damping), own_sums, strict=True):
        below = reach * scores[-1] + (1 - reach) * scores[-1].detach()
        scores.append(own + kappa * below)
    stacked = torch.stack(scores[1:])
    return -(-stacked).sqrt() if (scorer, norm) == ("transe", "l2") else stacked


def _complex(interleaved: Tensor) -> Tensor:
    return torch.view_as_complex(interleaved.unflatten(-1, (-1, 2)).contiguous())
