"""A real graph directory whose training triples fill three files."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from medscale.graph.reader import Graph, open_graph
from medscale.graph.schema import (
    ENTITIES,
    GRAPH_FORMAT,
    GRAPH_KIND,
    NAMES_SCHEMA,
    PART_ROWS,
    RELATIONS,
    TRIPLES_SCHEMA,
    PartWriter,
    open_writer,
)
from medscale.manifest import write_manifest

NUM_ENTITIES, NUM_RELATIONS = 200_000, 7
NUM_TRIPLES = 2 * PART_ROWS + 1234


def write_partitioned_graph(directory: Path, *, short_of: int = 0) -> Graph:
    """Write random distinct triples, `short_of` fewer than the manifest says; no validation or test triples."""
    directory.mkdir(parents=True)
    draws = np.random.default_rng(0)
    limits = (NUM_ENTITIES, NUM_RELATIONS, NUM_ENTITIES)
    triples = np.unique(np.stack([draws.integers(0, n, NUM_TRIPLES + 10_000) for n in limits], 1), axis=0)
    triples = triples[draws.permutation(len(triples))[: NUM_TRIPLES - short_of]]
    with PartWriter(directory / "train", TRIPLES_SCHEMA) as writer:
        writer.append({"head": triples[:, 0], "relation": triples[:, 1], "tail": triples[:, 2]})
    ids = np.arange(NUM_ENTITIES)
    with PartWriter(directory / ENTITIES, NAMES_SCHEMA) as entities:
        entities.append({"id": ids, "name": pa.array([f"e{i}" for i in ids])})
    with open_writer(directory / RELATIONS, NAMES_SCHEMA) as relations:
        names = [f"r{i}" for i in range(NUM_RELATIONS)]
        relations.write_table(pa.table([np.arange(NUM_RELATIONS), names], schema=NAMES_SCHEMA))
    facts = {
        "name": "partitioned", "num_entities": NUM_ENTITIES, "num_relations": NUM_RELATIONS,
        "num_triples": {"train": NUM_TRIPLES, "valid": 0, "test": 0},
    }  # fmt: skip
    write_manifest(directory, GRAPH_KIND, GRAPH_FORMAT, facts)
    return open_graph(directory, verify=False)
