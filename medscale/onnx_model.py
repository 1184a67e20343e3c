"""ONNX models of an exported tier: embeddings, score function and top-k, for any program that runs ONNX.

Two files beside a tier's own, of some kilobytes each, whatever the tier's size, because the tables stay where they are:
initializers point into the tier's safetensors files (ONNX's external data), which runtimes map into memory.

    model.onnx   entity int64 [B], relation int64 [B], asks_head bool [B], k int64 [1]
                 -> ids int64 [B, k], scores float32 [B, k]: the best tails of (entity, relation, ?) or, where asks_head
                    is true, the best heads of (?, relation, entity); best first, equal scores in the order of rows
    score.onnx   head int64 [B], relation int64 [B], tail int64 [B] -> scores float32 [B]

Scores are those of `medscale.runtime.Tier` (`medscale.runtime.scoring` states them), damping and inverse relations
included, summed in float32. Rows of any precision are decoded as they are scanned, never the whole table: a loop goes
over the entities in chunks of about `SCAN_NUMBERS` numbers, and keeps the k best. An id out of range is an error of
ONNX's Gather. More answers than there are entities gives all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medscale.errors import ExportError, UnsupportedError
from medscale.runtime.precision import stored_width
from medscale.runtime.scoring import ExportedScorer, exported_scorer, unit_weights
from medscale.runtime.tier import Tier, shard_name

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

__all__ = ["SCAN_NUMBERS", "SCORE_FILE", "TOP_K_FILE", "onnx_models", "write_onnx"]

TOP_K_FILE = "model.onnx"
SCORE_FILE = "score.onnx"

#: numbers of a chunk of the scan: about a core's cache
SCAN_NUMBERS = 1 << 18

#: of 2022, which all present runtimes know; the first with bitwise operators
_OPSET, _IR_VERSION = 18, 8
#: safetensors type: ONNX type
_TYPES = {"F32": 1, "U8": 2, "I8": 3, "I64": 7, "F16": 10}
_FLOAT, _INT64, _BOOL = 1, 7, 9
#: a graph's input or output: name, type, shape
_Value = tuple[str, int, Sequence[str | int] | None]


def write_onnx(tier: Tier, directory: Path) -> None:
    """Write `model.onnx` and `score.onnx` into a tier's directory; equal tiers give equal bytes.

    Raises:
        ExportError: the tier does not hold whole rows of all its entities.
        UnsupportedError: the package `onnx` is not installed.

    """
    for name, model in onnx_models(tier.facts, directory).items():
        (directory / name).write_bytes(model.SerializeToString(deterministic=True))


def onnx_models(facts: Mapping[str, Any], directory: Path) -> "dict[str, ModelProto]":
    """Return the models of the tier in `directory` with these facts, by file name. See `write_onnx`."""
    try:
        import onnx.helper
    except ImportError:
        raise UnsupportedError("an ONNX model needs the package onnx: pip install 'medscale[onnx]'") from None
    if facts.get("layout", "full") != "full":
        raise ExportError(
            f"{directory} is of layout {facts['layout']}: an ONNX model needs whole rows; export tiers of layout full"
        )
    metadata = {key: facts[key] for key in ("run", "step", "graph_sha256", "tier", "dim", "scorer", "norm")}
    models = {}
    for name, graph in (
        (TOP_K_FILE, _top_k_graph(_Tables(facts, directory))),
        (SCORE_FILE, _score_graph(_Tables(facts, directory))),
    ):
        model = onnx.helper.make_model(
            graph,
            ir_version=_IR_VERSION,
            opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
            producer_name="medscale",
        )
        onnx.helper.set_model_props(model, {key: str(value) for key, value in metadata.items()})
        models[name] = model
    return models


@dataclass
class _Nodes:
    """The nodes of a graph (or of a loop's body) under construction; values are told by name."""

    prefix: str
    nodes: "list[NodeProto]" = field(default_factory=list)
    #: shared by a graph and its loops' bodies
    initializers: "dict[str, TensorProto]" = field(default_factory=dict)

    def body(self, prefix: str) -> "_Nodes":
        """Return nodes that see this graph's values."""
        return _Nodes(prefix, initializers=self.initializers)

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node and return the name of its first output; the others end in _1, _2, ..."""
        import onnx.helper

        name = f"{self.prefix}{operator}_{len(self.nodes)}"
        names = [name, *(f"{name}_{i}" for i in range(1, outputs))]
        self.nodes.append(onnx.helper.make_node(operator, inputs, names, name=name, **attributes))
        return name

    def constant(self, value: "Sequence[int] | int | NDArray[Any]") -> str:
        """Return the name of a constant; whole numbers are int64."""
        import onnx.numpy_helper

        array = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
        same = (n for n, t in self.initializers.items() if n.startswith("constant") and _equal(t, array))
        name = next(same, f"constant_{len(self.initializers)}")
        self.initializers.setdefault(name, onnx.numpy_helper.from_array(array, name))
        return name

    def number(self, value: float) -> str:
        """Return the name of a float32 constant."""
        return self.constant(np.array(value, np.float32))

    def cut(self, table: str, start: str, stop: str) -> str:
        """Return rows start .. stop - 1 of a table (both int64 [1])."""
        return self("Slice", table, start, stop, self.constant([0]))

    def graph(
        self, inputs: "list[ValueInfoProto]", outputs: "list[ValueInfoProto]", renamed: list[str]
    ) -> "GraphProto":
        """Return a graph whose outputs are the values of these names."""
        import onnx.helper

        for value, output in zip(renamed, outputs, strict=True):
            self.nodes.append(onnx.helper.make_node("Identity", [value], [output.name], name=f"name_{output.name}"))
        whole = list(self.initializers.values()) if not self.prefix else []
        return onnx.helper.make_graph(self.nodes, self.prefix or "medscale", inputs, outputs, whole)


def _equal(tensor: "TensorProto", array: NDArray[Any]) -> bool:
    import onnx.numpy_helper

    other = onnx.numpy_helper.to_array(tensor)
    same: bool = other.dtype == array.dtype and other.shape == array.shape and other.tobytes() == array.tobytes()
    return same


@dataclass(frozen=True)
class _Shard:
    """The tensors of an entity file, as initializers."""

    rows: int
    vectors: str
    #: with int8 and int4
    scales: str | None
    #: with sharding by hash: which entities these are
    ids: str | None


class _Tables:
    """A tier's tables as initializers of a graph, and the arithmetic on them."""

    def __init__(self, facts: Mapping[str, Any], directory: Path) -> None:
        self.directory = directory
        self.add = _Nodes("")
        self.precision = facts.get("precision", "float32")
        self.cuts: list[int] = facts.get("cuts", [facts["dim"]])
        self.unit_columns: int = facts["columns"] // facts["dim"]
        self.columns: int = facts["columns"]
        self.num_entities: int = facts["num_entities"]
        self.num_relations: int = facts["num_relations"]
        self.reciprocal: bool = facts["reciprocal"]
        self.name: str = facts["scorer"]
        self.scorer: ExportedScorer = exported_scorer(facts["scorer"], facts["norm"])
        weights = unit_weights(facts["dims"], facts["damping"]).repeat(self.unit_columns)
        # w |q - t| = |wq - wt|: distances weigh both sides, products the query alone
        self.weights = (np.sqrt(weights) if self.scorer.geometry == "l2" else weights).astype(np.float32)
        by_hash = facts.get("sharding", "range") == "hash"
        count = -(-self.num_entities // facts["shard_rows"])
        self.shards = [
            shard for i in range(count) if (shard := self._shard(shard_name(i, count), i, by_hash)).rows
        ]  # fmt: skip
        # with sharding by hash: where an entity's row lies in all shards one after the other
        self.places = self.add.constant(self._places(count)) if by_hash else None
        self.relations = self._initializer("relations.safetensors", "vectors", "relations")[0]

    # What lies in files

    def _shard(self, file: str, index: int, by_hash: bool) -> _Shard:
        vectors, rows = self._initializer(file, "vectors", f"vectors_{index}")
        scaled = self.precision in ("int8", "int4")
        scales = self._initializer(file, "scales", f"scales_{index}")[0] if scaled else None
        return _Shard(rows, vectors, scales, self._initializer(file, "ids", f"ids_{index}")[0] if by_hash else None)

    def _initializer(self, file: str, tensor: str, name: str) -> tuple[str, int]:
        """Add a tensor of a file as it lies there, without reading it; return its name and rows."""
        import onnx

        dtype, shape, start, stop = _place(self.directory / file, tensor)
        proto = onnx.TensorProto(
            name=name, data_type=_TYPES[dtype], dims=shape, data_location=onnx.TensorProto.EXTERNAL
        )  # fmt: skip
        for key, value in (("location", file), ("offset", str(start)), ("length", str(stop - start))):
            proto.external_data.add(key=key, value=value)
        if shape[0]:  # there is nothing to point to in an empty shard
            self.add.initializers[name] = proto
        return name, shape[0]

    def _places(self, count: int) -> NDArray[np.int64]:
        places, first = np.empty(self.num_entities, np.int64), 0
        for index in range(count):
            path = self.directory / shard_name(index, count)
            _, (rows,), start, _ = _place(path, "ids")
            with path.open("rb") as file:
                file.seek(start)
                places[np.frombuffer(file.read(8 * rows), np.int64)] = np.arange(first, first + rows)
            first += rows
        return places

    # Rows

    def checked(self, ids: str, number: int) -> str:
        """Return ids that a Gather refuses if they are out of range: it would take negative ones from the end."""
        add = self.add
        wrong = add("Or", add("Less", ids, add.constant(0)), add("GreaterOrEqual", ids, add.constant(number)))
        return add("Add", ids, add("Gather", add.constant([0]), add("Cast", wrong, to=_INT64)))

    def entity_rows(self, ids: str) -> str:
        """Return float32 [B, columns] of checked ids [B]."""
        add, rows, first = self.add, "", 0
        places = ids if self.places is None else add("Gather", self.places, ids)
        for shard in self.shards:
            last = add.constant(shard.rows - 1)
            within = add("Sub", places, add.constant(first))
            inside = add("Max", add("Min", within, last), add.constant(0))
            scales = shard.scales and add("Gather", shard.scales, inside)
            found = self.decode(add, add("Gather", shard.vectors, inside), scales)
            here = add("Unsqueeze", add("GreaterOrEqual", within, add.constant(0)), add.constant([1]))
            rows = add("Where", here, found, rows) if rows else found
            first += shard.rows
        return rows

    def decode(self, add: _Nodes, stored: str, scales: str | None) -> str:
        """Return float32 [N, columns] of rows as stored, [N, width], and their scales [N, cuts]."""
        if self.precision == "float32":
            return stored
        if self.precision == "int4":
            stored = self._unpack(add, stored)
        numbers = add("Cast", stored, to=_FLOAT)
        if scales is None:
            return numbers
        if self.precision == "int4":
            numbers = add("Sub", numbers, add.number(8))
        if len(self.cuts) > 1:
            widths = np.diff([0, *self.cuts]) * self.unit_columns
            scales = add("Gather", scales, add.constant(np.repeat(np.arange(len(widths)), widths)), axis=1)
        return add("Mul", numbers, scales)

    def _unpack(self, add: _Nodes, stored: str) -> str:
        """Return the nibbles of uint8 [N, width], uint8 [N, columns]."""
        low = add("BitwiseAnd", stored, add.constant(np.array(15, np.uint8)))
        high = add("BitShift", stored, add.constant(np.array(4, np.uint8)), direction="RIGHT")
        nibbles = self.interleave(add, low, high)
        kept: list[int] = []
        place = 0
        for width in np.diff([0, *self.cuts]) * self.unit_columns:
            kept += range(place, place + int(width))
            place += 2 * stored_width("int4", int(width))
        # a cut of an odd number of columns ends in an empty nibble
        return nibbles if len(kept) == place else add("Gather", nibbles, add.constant(kept), axis=1)

    def relation_rows(self, relations: str, asks_head: str | None) -> str:
        """Return float32 [B, relation columns] of checked ids; with `asks_head` true those of inverses."""
        if asks_head is not None:
            number = self.add.constant(self.num_relations)
            relations = self.add("Add", relations, self.add("Where", asks_head, number, self.add.constant(0)))
        return self.add("Gather", self.relations, relations)

    # Scores

    def query(self, known: str, relation: str, asks_head: str | None) -> tuple[str, str | None]:
        """Return the weighted queries [B, columns], and the weighted factor [B, columns] on the rows compared, if any.

        `asks_head` is bool [B, 1]; None: all ask for tails. The twins are the functions of `runtime.scoring`.
        """
        add = self.add
        weights = add.constant(self.weights)
        if self.name == "pairre":
            head_factor, tail_factor = self.parts(add, relation)
            given = self._either(asks_head, tail_factor, head_factor)
            asked = self._either(asks_head, head_factor, tail_factor)
            return add("Mul", add("Mul", known, given), weights), add("Mul", asked, weights)
        if self.name == "transe":
            query = add("Add", known, self._either(asks_head, add("Neg", relation), relation))
        elif self.name == "distmult":
            query = add("Mul", known, relation)
        elif self.name == "simple":
            as_head, as_tail = self.parts(add, known)
            forward, inverse = self.parts(add, relation)
            backward = self._either(asks_head, forward, inverse)
            forward = self._either(asks_head, inverse, forward)
            pair = self.interleave(add, add("Mul", as_tail, backward), add("Mul", as_head, forward))
            query = add("Mul", pair, add.number(0.5))
        else:
            query = self._complex_multiply(known, relation, asks_head)
        return add("Mul", query, weights), None

    def _complex_multiply(self, known: str, relation: str, asks_head: str | None) -> str:
        add = self.add
        a, b = self.parts(add, known)
        c, d = self.parts(add, relation)
        d = self._either(asks_head, add("Neg", d), d)
        real = add("Sub", add("Mul", a, c), add("Mul", b, d))
        return self.interleave(add, real, add("Add", add("Mul", a, d), add("Mul", b, c)))

    def _either(self, asks_head: str | None, head: str, tail: str) -> str:
        return tail if asks_head is None else self.add("Where", asks_head, head, tail)

    def compare(self, add: _Nodes, query: str, factor: str | None, rows: str, *, pairs: bool = False) -> str:
        """Return scores [B, N] of queries [B, C] (weighted) and rows [N, C]; with `pairs` [B] of rows [B, C]."""
        if self.scorer.geometry == "product":
            if not pairs:
                return add("Gemm", query, rows, transB=1)
            return add("ReduceSum", add("Mul", query, rows), add.constant([1]), keepdims=0)
        if not pairs:
            query = add("Unsqueeze", query, add.constant([1]))
            factor = factor and add("Unsqueeze", factor, add.constant([1]))
        rows = add("Mul", rows, factor or add.constant(self.weights))
        last = add.constant([1 if pairs else 2])
        if self.scorer.geometry == "modulus":
            real, imaginary = (
                add("Sub", of_query, of_rows)
                for of_query, of_rows in zip(self.parts(add, query), self.parts(add, rows), strict=True)
            )
            squares = add("Add", add("Mul", real, real), add("Mul", imaginary, imaginary))
            sums = add("ReduceSum", add("Sqrt", squares), last, keepdims=0)
        else:
            norm = {"l1": "ReduceL1", "l2": "ReduceL2"}[self.scorer.geometry]
            sums = add(norm, add("Sub", query, rows), last, keepdims=0)
        return add("Neg", sums)

    def parts(self, add: _Nodes, interleaved: str) -> tuple[str, str]:
        """Split [..., 2 U] interleaved by unit into two [..., U]."""
        ends, two, last = add.constant([np.iinfo(np.int64).max]), add.constant([2]), add.constant([-1])
        first, second = (add("Slice", interleaved, add.constant([i]), ends, last, two) for i in (0, 1))
        return first, second

    def interleave(self, add: _Nodes, first: str, second: str) -> str:
        """Return [N, 2 U] of two [N, U]."""
        last = add.constant([2])
        pair = add("Concat", add("Unsqueeze", first, last), add("Unsqueeze", second, last), axis=2)
        return add("Flatten", pair, axis=1)


def _place(path: Path, tensor: str) -> tuple[str, list[int], int, int]:
    """Return type, shape and the bytes [start, stop) of a tensor in a safetensors file of our own writing."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[tensor]
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    return entry["dtype"], entry["shape"], start, stop


def _top_k_graph(tables: _Tables) -> "GraphProto":
    from onnx.helper import make_tensor_value_info

    add = tables.add
    asks_head = "asks_head"
    known = tables.entity_rows(tables.checked("entity", tables.num_entities))
    relations = tables.checked("relation", tables.num_relations)
    if tables.reciprocal:
        # An inverse relation asks for the tail of (t, inverse of r, ?): the same question, told forwards.
        query, factor = tables.query(known, tables.relation_rows(relations, asks_head), None)
    else:
        column = add("Unsqueeze", asks_head, add.constant([1]))
        query, factor = tables.query(known, tables.relation_rows(relations, None), column)
    batch = add("Shape", "entity")
    # [B, rows, columns] of a distance's chunk, or the rows and the [B, rows] of a product's
    per_row = (
        add("Add", batch, add.constant([tables.columns])) if tables.scorer.geometry == "product"
        else add("Mul", batch, add.constant([tables.columns]))
    )  # fmt: skip
    per_row = add("Max", per_row, add.constant([1]))  # no queries
    step = add("Max", add("Div", add.constant([SCAN_NUMBERS]), per_row), add.constant([1]))
    empty = add("Concat", batch, add.constant([0]), axis=0)
    scores = add("Expand", add.number(0), empty)
    ids = add("Expand", add.constant(0), empty)
    first = 0
    for index, shard in enumerate(tables.shards):
        rounds = add("Div", add("Add", step, add.constant([shard.rows - 1])), step)
        scan = _scan(tables, f"scan_{index}_", shard, first, step, query, factor, batch)
        scores = add("Loop", add("Squeeze", rounds), "", scores, ids, outputs=2, body=scan)
        ids = f"{scores}_1"
        first += shard.rows
    inputs: list[_Value] = [
        ("entity", _INT64, ["B"]),
        ("relation", _INT64, ["B"]),
        ("asks_head", _BOOL, ["B"]),
        ("k", _INT64, [1]),
    ]
    outputs: list[_Value] = [("ids", _INT64, ["B", "K"]), ("scores", _FLOAT, ["B", "K"])]
    return add.graph(
        [make_tensor_value_info(*value) for value in inputs], [make_tensor_value_info(*value) for value in outputs],
        [ids, scores],
    )  # fmt: skip


def _scan(
    tables: _Tables, prefix: str, shard: _Shard, first: int, step: str, query: str, factor: str | None, batch: str
) -> "GraphProto":
    """Return the body of the loop over a shard: the k best so far and of one chunk."""
    from onnx.helper import make_tensor_value_info

    add = tables.add.body(prefix)
    start = add("Mul", add("Unsqueeze", f"{prefix}round", add.constant([0])), step)
    stop = add("Min", add("Add", start, step), add.constant([shard.rows]))
    scales = shard.scales and add.cut(shard.scales, start, stop)
    rows = tables.decode(add, add.cut(shard.vectors, start, stop), scales)
    if shard.ids is None:
        ends = (add("Squeeze", add("Add", end, add.constant([first]))) for end in (start, stop))
        chunk_ids = add("Range", *ends, add.constant(1))
    else:
        chunk_ids = add.cut(shard.ids, start, stop)
    chunk_scores = tables.compare(add, query, factor, rows)
    scores = add("Concat", f"{prefix}best_scores", chunk_scores, axis=1)
    wide = add("Concat", batch, add("Sub", stop, start), axis=0)
    ids = add("Concat", f"{prefix}best_ids", add("Expand", chunk_ids, wide), axis=1)
    k = add("Min", "k", add("Shape", scores, start=1))
    best = add("TopK", scores, k, outputs=2, axis=1)  # of equal scores the first one, so ids rise
    best_ids = add("GatherElements", ids, f"{best}_1", axis=1)
    inputs: list[_Value] = [
        ("round", _INT64, []),
        ("going", _BOOL, []),
        ("best_scores", _FLOAT, None),
        ("best_ids", _INT64, None),
    ]
    outputs: list[_Value] = [("go_on", _BOOL, []), ("scores", _FLOAT, None), ("ids", _INT64, None)]
    return add.graph(
        [make_tensor_value_info(prefix + name, dtype, shape) for name, dtype, shape in inputs],
        [make_tensor_value_info(prefix + name, dtype, shape) for name, dtype, shape in outputs],
        [f"{prefix}going", best, best_ids],
    )


def _score_graph(tables: _Tables) -> "GraphProto":
    from onnx.helper import make_tensor_value_info

    add = tables.add
    heads, tails = (tables.entity_rows(tables.checked(name, tables.num_entities)) for name in ("head", "tail"))
    relations = tables.checked("relation", tables.num_relations)

    def score(known: str, relation: str, asked: str) -> str:
        query, factor = tables.query(known, relation, None)
        return tables.compare(add, query, factor, asked, pairs=True)

    scores = score(heads, tables.relation_rows(relations, None), tails)
    if tables.reciprocal:
        inverse = tables.relation_rows(add("Add", relations, add.constant(tables.num_relations)), None)
        scores = add("Mul", add("Add", scores, score(tails, inverse, heads)), add.number(0.5))
    inputs = [make_tensor_value_info(name, _INT64, ["B"]) for name in ("head", "relation", "tail")]
    return add.graph(inputs, [make_tensor_value_info("scores", _FLOAT, ["B"])], [scores])
