"""How large a graph will be, counted from its raw files before anything is built."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from medscale.config import GraphSection
from medscale.graph.raw import read_rows
from medscale.graph.schema import SPLITS
from medscale.graph.sources import find_all_files, triples_layout

__all__ = ["Census", "take_census"]


@dataclass(frozen=True)
class Census:
    """Counts of a graph that is not prepared; duplicates are counted in."""

    num_entities: int
    num_relations: int
    #: by split
    num_triples: dict[str, int]


def take_census(section: GraphSection, data_root: Path) -> Census:
    """Read a job's raw files once and count; memory grows with distinct names, not with triples.

    Raises:
        GraphError: a file is missing or wrong.

    """
    layout = triples_layout(section)
    entities, relations = pa.array([], pa.string()), pa.array([], pa.string())
    counts = dict.fromkeys(SPLITS, 0)
    files = find_all_files(section, data_root)
    for split in SPLITS:
        for file in files[split]:
            for rows in read_rows(file, layout, literals=section.literals):
                head, relation, tail = (rows.names[role] for role in ("head", "relation", "tail"))
                entities = _merged(entities, head, tail)
                relations = _merged(relations, relation)
                counts[split] += len(head)
    for split, fraction in (("valid", section.valid_fraction), ("test", section.test_fraction)):
        counts[split] += int(counts["train"] * fraction)
    counts["train"] -= int(counts["train"] * (section.valid_fraction + section.test_fraction))
    return Census(len(entities), len(relations), counts)


def _merged(names: pa.Array, *more: pa.Array) -> pa.Array:
    chunks = [array.cast(pa.string()) for array in (names, *more)]
    return pc.unique(pa.chunked_array(chunks))
