"""Partitions: each triple once per epoch in a seeded order, from anywhere in it, with a fixed number in memory."""

import time
from pathlib import Path

import numpy as np
import pytest
from partitions import NUM_TRIPLES, write_partitioned_graph

from medscale.batches.order import EpochOrder, PartitionOrder
from medscale.batches.partitions import Feed, PartitionReader, order_of
from medscale.errors import GraphError
from medscale.graph.reader import Graph
from medscale.graph.schema import PART_ROWS


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return write_partitioned_graph(tmp_path_factory.mktemp("partitioned") / "graph")


def packed(triples: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(triples[:, 0] << 40 | triples[:, 1] << 32 | triples[:, 2])


def test_a_single_partition_is_visited_as_items_are() -> None:
    order = PartitionOrder((4097,), seed=3)
    for epoch in (0, 7):
        np.testing.assert_array_equal(order.rows(epoch, 0), EpochOrder(4097, 3).indices(epoch, 0, 4097))


def test_stretches_cover_an_epoch_and_partitions_change_places() -> None:
    order = PartitionOrder((50, 50, 50, 50, 17), seed=1)
    assert len({tuple(order.partitions(epoch)) for epoch in range(10)}) > 5
    assert (order.rows(0, 0) != order.rows(0, 1)).any()
    for epoch in range(3):
        sizes = [order.sizes[p] for p in order.partitions(epoch)]
        whole = [(place, row) for place, size in enumerate(sizes) for row in range(size)]
        for step in (1, 16, 50, 64, 217):
            visited = [
                (s.place, row)
                for start in range(0, len(order), step)
                for s in order.stretches(epoch, start, min(start + step, len(order)))
                for row in range(s.first, s.last)
            ]
            assert visited == whole


def test_each_triple_is_read_once_per_epoch_in_another_order(graph: Graph) -> None:
    assert len(graph.parts("train")) == 3
    feed = Feed.of(PartitionReader(graph, seed=5))
    epochs = [
        np.concatenate([feed.triples(e, s, min(s + 300_000, NUM_TRIPLES)) for s in range(0, NUM_TRIPLES, 300_000)])
        for e in range(2)
    ]
    for triples in epochs:
        np.testing.assert_array_equal(np.sort(packed(triples)), np.sort(packed(graph.triples("train"))))
    assert (epochs[0] == epochs[1]).all(1).mean() < 0.01
    # from anywhere, without what came before
    fresh = Feed.of(PartitionReader(graph, seed=5)).triples(1, 1_000_000, 1_100_000)
    np.testing.assert_array_equal(fresh, epochs[1][1_000_000:1_100_000])


def test_a_slow_trainer_holds_the_partition_it_uses_and_one_ahead(graph: Graph) -> None:
    reader = PartitionReader(graph, seed=5)
    feed = Feed.of(reader)
    feed.triples(0, 0, 1000)
    time.sleep(1.0)
    feed.triples(0, 1000, 2000)
    assert reader.counts.partitions == 2
    described = feed.described()
    assert described["reader_wait_s"] > 0
    assert described["reader_triples"]["0"] in (2 * PART_ROWS, NUM_TRIPLES - PART_ROWS)
    assert described["reader_triples_per_s"]["0"] > 0


def test_a_file_of_another_length_is_named(graph: Graph, tmp_path: Path) -> None:
    other = write_partitioned_graph(tmp_path / "graph", short_of=1)
    reader = PartitionReader(other, seed=0)
    with pytest.raises(GraphError, match=r"part-00002\.parquet holds \d+ triples, not \d+"):
        [reader.read(0, place) for place in range(3)]
    (tmp_path / "graph" / "train" / "part-00001.parquet").unlink()
    place = list(reader.order.partitions(0)).index(1)
    with pytest.raises(GraphError, match=r"part-00001\.parquet is damaged or missing"):
        reader.read(0, place)


def test_files_that_do_not_fit_the_number_are_refused(toy_graph: Graph) -> None:
    import dataclasses

    with pytest.raises(GraphError, match="training triples in 1 files"):
        order_of(dataclasses.replace(toy_graph, num_triples={**toy_graph.num_triples, "train": PART_ROWS + 1}), 0)
    with pytest.raises(GraphError, match="no training triples"):
        order_of(dataclasses.replace(toy_graph, num_triples={**toy_graph.num_triples, "train": 0}), 0)
