"""The hash that decides splits and the order of rows: the same under every version of a library, for ever.

It is the second half, read as a little-endian number, of the MD5 of a text: purpose, seed and the row's values,
separated by tabs. DuckDB computes it, millions of rows a second.
"""

from collections.abc import Mapping
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["hashes"]


def hashes(seed: int, purpose: str, columns: Mapping[str, Any]) -> npt.NDArray[np.uint64]:
    """Return uint64[n] for n rows of columns (numpy or Arrow; strings or integers), in their order."""
    settings = {"threads": 1, "autoinstall_known_extensions": False}
    with duckdb.connect(config=settings) as database:
        database.register("rows", pa.table(dict(columns)))
        text = f"concat_ws(chr(9), '{purpose}', {seed}, {', '.join(columns)})"
        reader = database.execute(f"SELECT md5_number_lower({text}) FROM rows").to_arrow_reader(1 << 17)
        parts = [np.asarray(batch.column(0)) for batch in reader]
    return np.concatenate([np.empty(0, dtype=np.uint64), *parts])
