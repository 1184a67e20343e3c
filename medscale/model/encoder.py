"""Entities composed of parts that they share, instead of a row each: the parameter-efficient baselines of Table 4.

    nodepiece   Galkin et al., 2022: an entity is its nearest anchors, how far those are, and the relations around it.
                Simplified: anchors are the entities of highest degree and some drawn at random (no PageRank); the parts
                of each kind are averaged before the perceptron, which in the original reads them one by one, so that
                the model is far smaller, and its quality per parameter not comparable
    earl        Chen et al., 2023: an entity is the relations around it, the reserved entities most like it in these,
                and its neighbours; a reserved entity has a vector of its own instead of the first two. Simplified:
                neighbours one hop away, some drawn for each entity once, instead of a network over all edges

Rows [E, C] come out of a small network, so a model's parameters hardly grow with its entities. What a checkpoint and a
tier hold are the composed rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from medscale.config import EncoderSection
from medscale.graph.reader import Graph
from medscale.seed import generator

__all__ = ["Earl", "Encoder", "NodePiece", "encoder_of"]

#: hops after which an anchor counts as out of reach
_MOST_HOPS = 6
#: rows compared or composed at once
_ROWS = 8192
#: cosines nearer than this are equal
_TIE = 1e-6


class Encoder(nn.Module, ABC):
    """Composes entity rows; `scale` is the size of rows before training."""

    def __init__(self, num_columns: int, scale: float) -> None:
        super().__init__()
        self.num_columns, self.scale = num_columns, scale

    @abstractmethod
    def compose(self, entities_U: Tensor) -> Tensor:
        """Return rows [U, C] of about size 1, by int64 ids [U]."""

    def forward(self, entities_U: Tensor) -> Tensor:
        """Return rows [U, C] by int64 ids [U]."""
        return self.scale * self.compose(entities_U)

    @torch.no_grad()
    def all_columns(self, start: int, stop: int, num_columns: int) -> NDArray[np.float32]:
        """Return the first columns of rows [start, stop), float32."""
        device = next(self.parameters()).device
        ids = torch.arange(start, stop, device=device)
        return np.concatenate(
            [self(part)[:, :num_columns].cpu().numpy() for part in ids.split(_ROWS)]
            or [np.empty((0, num_columns), np.float32)]
        )

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters())


class NodePiece(Encoder):
    """Nearest anchors, their distances, and relations around an entity."""

    def __init__(
        self, section: EncoderSection, triples_T3: NDArray[np.int64], num_entities: int, num_relations: int,
        num_columns: int, scale: float, seed: int,
    ) -> None:  # fmt: skip
        super().__init__(num_columns, scale)
        self.anchor_EK: Tensor
        self.hops_EK: Tensor
        self.relation_EM: Tensor
        anchors_A = anchors_of(triples_T3, num_entities, section.reserved, seed)
        anchor_EK, hops_EK = nearest_anchors(triples_T3, num_entities, anchors_A, section.nearest)
        self.register_buffer("anchor_EK", anchor_EK, persistent=False)
        self.register_buffer("hops_EK", hops_EK, persistent=False)
        relation_EM = relations_around(triples_T3, num_entities, num_relations, section.relations, seed)
        self.register_buffer("relation_EM", relation_EM, persistent=False)
        self.anchors_AC = _vectors(len(anchors_A), num_columns, seed, "anchors")
        self.hops_HC = _vectors(_MOST_HOPS + 2, num_columns, seed, "hops")
        # the last stands for none
        self.relations_RC = _vectors(2 * num_relations + 1, num_columns, seed, "relations")
        self.network = _perceptron(2 * num_columns, num_columns, seed)

    def compose(self, entities_U: Tensor) -> Tensor:
        """Return rows [U, C] of about size 1, by int64 ids [U]."""
        anchors_UC = F.embedding(self.anchor_EK[entities_U], self.anchors_AC).mean(1)
        hops_UC = F.embedding(self.hops_EK[entities_U], self.hops_HC).mean(1)
        relations_UC = F.embedding(self.relation_EM[entities_U], self.relations_RC).mean(1)
        rows_UC: Tensor = self.network(torch.cat([anchors_UC + hops_UC, relations_UC], 1))
        return rows_UC


class Earl(Encoder):
    """Relations around an entity, reserved entities like it, and neighbours."""

    def __init__(
        self, section: EncoderSection, triples_T3: NDArray[np.int64], num_entities: int, num_relations: int,
        num_columns: int, scale: float, seed: int,
    ) -> None:  # fmt: skip
        super().__init__(num_columns, scale)
        self.share_ER: Tensor
        self.place_E: Tensor
        self.reserved_EK: Tensor
        self.weight_EK: Tensor
        self.neighbour_EN: Tensor
        self.edge_EN: Tensor
        share_ER = relation_shares(triples_T3, num_entities, num_relations)
        drawn = generator(seed, "reserved entities").choice(
            num_entities, min(section.reserved, num_entities), replace=False
        )
        reserved_A = torch.from_numpy(np.sort(drawn))
        #: where an entity's own vector is; -1: it has none
        place_E = torch.full((num_entities,), -1).index_copy_(0, reserved_A, torch.arange(len(reserved_A)))
        reserved_EK, weight_EK = most_alike(share_ER, reserved_A, section.nearest, seed)
        neighbour_EN, edge_EN = neighbours_of(triples_T3, num_entities, num_relations, section.neighbours, seed)
        for name, buffer in (
            ("share_ER", share_ER), ("place_E", place_E), ("reserved_EK", reserved_EK), ("weight_EK", weight_EK),
            ("neighbour_EN", neighbour_EN), ("edge_EN", edge_EN),
        ):  # fmt: skip
            self.register_buffer(name, buffer, persistent=False)
        self.reserved_AC = _vectors(len(drawn), num_columns, seed, "reserved")
        self.relations_RC = _vectors(2 * num_relations + 1, num_columns, seed, "relations")
        self.edges_RC = _vectors(2 * num_relations + 1, num_columns, seed, "edges")
        self.network = _perceptron(2 * num_columns, num_columns, seed)
        self.around = _perceptron(2 * num_columns, num_columns, seed + 1)

    def compose(self, entities_U: Tensor) -> Tensor:
        """Return rows [U, C] of about size 1, by int64 ids [U]."""
        neighbour_UN, edge_UN = self.neighbour_EN[entities_U], self.edge_EN[entities_U]
        # an entity without so many neighbours is its own
        nodes_V, place = torch.unique(torch.cat([entities_U, neighbour_UN.flatten()]), return_inverse=True)
        own_U, around_UN = place[: len(entities_U)], place[len(entities_U) :].view_as(neighbour_UN)
        nodes_VC = self._alone(nodes_V)
        messages_UC = (F.embedding(around_UN, nodes_VC) + F.embedding(edge_UN, self.edges_RC)).mean(1)
        rows_UC: Tensor = self.around(torch.cat([F.embedding(own_U, nodes_VC), messages_UC], 1))
        return rows_UC

    def _alone(self, entities_V: Tensor) -> Tensor:
        relations_VC = self.share_ER[entities_V] @ self.relations_RC[:-1]
        alike_VKC = F.embedding(self.reserved_EK[entities_V], self.reserved_AC)
        alike_VC = (self.weight_EK[entities_V].unsqueeze(2) * alike_VKC).sum(1)
        composed_VC: Tensor = self.network(torch.cat([relations_VC, alike_VC], 1))
        place_V = self.place_E[entities_V]
        own_VC = F.embedding(place_V.clamp(min=0), self.reserved_AC)
        return torch.where(place_V.unsqueeze(1) < 0, composed_VC, own_VC)


def encoder_of(
    section: EncoderSection, graph: Graph, num_columns: int, scale: float, seed: int, device: torch.device
) -> Encoder | None:
    """Return the encoder that a job asks for, from a graph's training triples; None: it asks for none."""
    if section.kind == "none":
        return None
    kind = NodePiece if section.kind == "nodepiece" else Earl
    sizes = graph.num_entities, graph.num_relations, num_columns
    return kind(section, graph.triples("train"), *sizes, scale, seed).to(device)


def anchors_of(triples_T3: NDArray[np.int64], num_entities: int, number: int, seed: int) -> Tensor:
    """Return int64 [A] ids of anchors, rising: the half of highest degree, and others drawn at random."""
    degree_E = np.bincount(triples_T3[:, [0, 2]].ravel(), minlength=num_entities)
    by_degree_E = np.argsort(-degree_E, kind="stable")
    number = min(number, num_entities)
    central = by_degree_E[: (number + 1) // 2]
    drawn = generator(seed, "anchors").choice(by_degree_E[len(central) :], number - len(central), replace=False)
    return torch.from_numpy(np.sort(np.concatenate([central, drawn])).astype(np.int64))


def nearest_anchors(
    triples_T3: NDArray[np.int64], num_entities: int, anchors_A: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """Return int64 ([E, K] places of anchors, [E, K] hops to them), nearest first, then by place.

    Edges count both ways. Anchors that no path of six hops reaches come last, seven hops away.
    """
    head_T, tail_T = torch.from_numpy(triples_T3[:, 0]), torch.from_numpy(triples_T3[:, 2])
    edges_2M = torch.cat([torch.stack([head_T, tail_T]), torch.stack([tail_T, head_T])], 1)
    ones_M = torch.ones(edges_2M.shape[1])
    size = (num_entities, num_entities)
    adjacency_EE = torch.sparse_coo_tensor(edges_2M, ones_M, size, check_invariants=True).coalesce()
    number = min(number, len(anchors_A))
    place_EK = torch.empty(num_entities, number, dtype=torch.int64)
    hops_EA = torch.full((num_entities, len(anchors_A)), _MOST_HOPS + 1, dtype=torch.uint8)
    for columns in torch.arange(len(anchors_A)).split(256):  # few at a time: the frontier is dense
        reached_EA = torch.zeros(num_entities, len(columns))
        reached_EA[anchors_A[columns], torch.arange(len(columns))] = 1
        hops = torch.where(reached_EA > 0, 0, _MOST_HOPS + 1).to(torch.uint8)
        for hop in range(1, _MOST_HOPS + 1):
            reached_EA = ((adjacency_EE @ reached_EA + reached_EA) > 0).float()
            hops = torch.where((reached_EA > 0) & (hops > hop), torch.tensor(hop, dtype=torch.uint8), hops)
        hops_EA[:, columns] = hops
    for rows in torch.arange(num_entities).split(_ROWS):
        place_EK[rows] = hops_EA[rows].argsort(dim=1, stable=True)[:, :number]
    return place_EK, hops_EA.gather(1, place_EK).long()


def relations_around(
    triples_T3: NDArray[np.int64], num_entities: int, num_relations: int, number: int, seed: int
) -> Tensor:
    """Return int64 [E, M]: some of the distinct relations at an entity, inverse ones behind all, none as 2 R."""
    pairs_N2 = np.unique(_ends(triples_T3, num_relations)[:, :2], axis=0)
    return _some_of_each(pairs_N2, num_entities, number, [2 * num_relations], seed, "relations around")[0]


def relation_shares(triples_T3: NDArray[np.int64], num_entities: int, num_relations: int) -> Tensor:
    """Return float32 [E, 2 R]: the share of each relation, and of each inverse, among an entity's triples."""
    ends = torch.from_numpy(_ends(triples_T3, num_relations))
    counts_ER = torch.zeros(num_entities, 2 * num_relations)
    counts_ER.index_put_((ends[:, 0], ends[:, 1]), torch.ones(len(ends)), accumulate=True)
    return counts_ER / counts_ER.sum(1, keepdim=True).clamp(min=1)


def most_alike(share_ER: Tensor, reserved_A: Tensor, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (int64 [E, K] places of reserved entities, float32 [E, K] weights), by the cosine of relations' shares.

    Of equally alike ones, which are many, some are drawn; weights are a softmax of temperature 0.2, as the authors'.
    """
    unit_ER = F.normalize(share_ER, dim=1)
    reserved_AR = unit_ER[reserved_A]
    draws = generator(seed, "equally alike")
    best = []
    for part in unit_ER.split(_ROWS):
        noise = torch.from_numpy(draws.random((len(part), len(reserved_A)), dtype=np.float32))
        best.append(torch.topk(part @ reserved_AR.T + _TIE * noise, min(number, len(reserved_A)), dim=1))
    return torch.cat([b.indices for b in best]), torch.cat([torch.softmax(b.values / 0.2, 1) for b in best])


def neighbours_of(
    triples_T3: NDArray[np.int64], num_entities: int, num_relations: int, number: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return int64 ([E, N] neighbours, [E, N] the relations to them); where there are fewer, itself and 2 R."""
    ends_N3 = _ends(triples_T3, num_relations)
    neighbour_EN, edge_EN = _some_of_each(
        ends_N3[:, [0, 2, 1]], num_entities, number, [-1, 2 * num_relations], seed, "neighbours"
    )
    return torch.where(neighbour_EN < 0, torch.arange(num_entities).unsqueeze(1), neighbour_EN), edge_EN


def _ends(triples_T3: NDArray[np.int64], num_relations: int) -> NDArray[np.int64]:
    """Return int64 [2 T, 3]: each triple as (entity, relation, other one) from both ends."""
    head_T, relation_T, tail_T = triples_T3.T
    forward_T3, backward_T3 = (head_T, relation_T, tail_T), (tail_T, relation_T + num_relations, head_T)
    return np.concatenate([np.stack(forward_T3, 1), np.stack(backward_T3, 1)])


def _some_of_each(
    rows_NW: NDArray[np.int64], num_entities: int, number: int, missing: Sequence[int], seed: int, what: str
) -> list[Tensor]:
    """Return int64 [E, number] of each column behind the first, which is the entity: some rows of each.

    `missing` stands where an entity has fewer.
    """
    order = generator(seed, what).permutation(len(rows_NW))
    rows_NW = rows_NW[order][np.argsort(rows_NW[order, 0], kind="stable")]
    starts_E = np.searchsorted(rows_NW[:, 0], np.arange(num_entities))
    place_N = np.arange(len(rows_NW)) - starts_E[rows_NW[:, 0]]
    kept = place_N < number
    chosen: list[Tensor] = []
    for column, absent in zip(rows_NW.T[1:], missing, strict=True):
        values_EM = np.full((num_entities, number), absent, dtype=np.int64)
        values_EM[rows_NW[kept, 0], place_N[kept]] = column[kept]
        chosen.append(torch.from_numpy(values_EM))
    return chosen


def _vectors(number: int, num_columns: int, seed: int, what: str) -> nn.Parameter:
    draws = generator(seed, "encoder", what).standard_normal((number, num_columns), dtype=np.float32)
    return nn.Parameter(torch.from_numpy(draws))


def _perceptron(columns_in: int, columns_out: int, seed: int) -> nn.Sequential:
    """Two layers, whose weights keep the size of what goes through."""
    layers: Sequence[nn.Linear] = (nn.Linear(columns_in, 2 * columns_out), nn.Linear(2 * columns_out, columns_out))
    for number, layer in enumerate(layers):
        draws = generator(seed, "encoder", "layer", number).standard_normal(layer.weight.shape, dtype=np.float32)
        layer.weight.data.copy_(torch.from_numpy(draws) * (2 / layer.in_features) ** 0.5)
        layer.bias.data.zero_()
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])
