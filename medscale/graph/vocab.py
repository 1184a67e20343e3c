"""Names and ids. Ids are dense, from 0, in the order of the names (numerical where all names are integers).

So the ids of a graph depend on its names alone, and integer ids that are dense already stay as they are.
Numbering happens in the database of an ingest, which spills to disk.
"""

from collections.abc import Callable
from typing import Literal

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from medscale.graph.schema import ROW_GROUP_ROWS

__all__ = ["number_names"]

#: at most 16 digits, no leading zero: exactly what its integer prints as
_INTEGER = "0|[1-9][0-9]{0,15}"

_USES = {
    "entities": "SELECT head AS name, split FROM raw UNION ALL SELECT tail AS name, split FROM raw",
    "relations": "SELECT relation AS name, split FROM raw",
}


def number_names(
    database: duckdb.DuckDBPyConnection,
    kind: Literal["entities", "relations"],
    *,
    only_seen: bool,
    write: Callable[[npt.NDArray[np.int64], pa.Array], None],
) -> int:
    """Number the names in table `raw` (split, head, relation, tail) as table `kind` (id, name, seen).

    `seen` tells whether a name occurs in train. `write(ids int64[n], names string[n])` gets the names in the
    order of their ids, batch by batch. With `only_seen`, unseen names get ids after all seen ones and are not
    written. Returns the number of names written.
    """
    database.execute(
        f"CREATE TABLE {kind}_used AS SELECT name, bool_or(split = 0) AS seen FROM ({_USES[kind]}) GROUP BY name"
    )
    database.execute(f"CREATE TABLE {kind} (id BIGINT, name VARCHAR, seen BOOLEAN)")
    order = "NOT seen, " if only_seen else ""
    integers = database.execute(f"SELECT bool_and(regexp_full_match(name, '{_INTEGER}')) FROM {kind}_used")
    order += "CAST(name AS BIGINT)" if _scalar(integers) else "name"
    num_ids = num_written = 0
    with database.cursor() as insertion:
        query = f"SELECT name, seen FROM {kind}_used ORDER BY {order}"
        for batch in database.execute(query).to_arrow_reader(ROW_GROUP_ROWS):
            name, seen = batch.column(0), batch.column(1)
            ids = np.arange(num_ids, num_ids + len(batch), dtype=np.int64)
            num_ids += len(batch)
            kept = pc.sum(seen).as_py() if only_seen else len(batch)
            write(ids[:kept], name.slice(0, kept))
            num_written += kept
            numbered = pa.table({"id": ids, "name": name, "seen": seen})
            insertion.register("numbered", numbered)
            insertion.execute(f"INSERT INTO {kind} SELECT id, name, seen FROM numbered")
            insertion.unregister("numbered")
    database.execute(f"DROP TABLE {kind}_used")
    return num_written


def _scalar(result: duckdb.DuckDBPyConnection) -> object:
    row = result.fetchone()
    assert row is not None
    return row[0]
