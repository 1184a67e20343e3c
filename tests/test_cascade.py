"""Cascades: exact ones give what brute force gives, others a good part of it, and chains that are none are refused."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from small_tables import SCORERS
from tier_writer import ENTITY_UNIT, RELATION_UNIT, Format, Model, write_tiers

from medscale.errors import ExportError
from medscale.runtime import Cascade, Tier
from medscale.runtime import cascade as cascade_module

TIERS = {"phone": 3, "pc": 5, "server": 12}
NUMBER = 160


def chained(directory: Path, tiers: Mapping[str, int] = TIERS) -> list[Tier]:
    return [Tier.open(directory / name, threads=2) for name in tiers]


def model_of(scorer: str, norm: str, kind: str, seed: int = 0) -> Model:
    """Return a model of random rows, or of rows as training leaves them: in clusters, the first columns the largest."""
    draw = np.random.default_rng(seed)
    u, v = len(ENTITY_UNIT[scorer]), len(RELATION_UNIT[scorer])
    entities, relations = draw.normal(size=(NUMBER, 12 * u)), draw.normal(size=(6, 12 * v))
    if kind == "clustered":
        centres = 3 * draw.normal(size=(8, 12 * u))
        entities = centres[draw.integers(0, 8, NUMBER)] + 0.2 * entities
        entities *= np.repeat(np.linspace(2, 0.1, 12), u)
        # Relations that hardly move anything: queries lie in clusters too.
        still = {"transe": [0], "rotate": [1, 0], "complex": [1, 0]}.get(scorer, [1] * v)
        relations = np.tile(still, 12) + 0.1 * relations
    if kind == "equal":
        entities[:] = entities[draw.integers(0, 5, NUMBER)]
    names = [f"e{i}" for i in range(NUMBER)]
    return Model(
        entities.astype(np.float32), relations.astype(np.float32), names, ["r", "s", "t"], scorer,
        norm, damping=(0.5, 0.25), reciprocal=True, entity_types=["a", "b"], types=[i % 2 for i in range(NUMBER)],
    )  # fmt: skip


@pytest.mark.parametrize(("scorer", "norm"), SCORERS)
@pytest.mark.parametrize(
    ("precision", "kind"),
    [("float32", "random"), ("float32", "equal"), ("float16", "clustered"), ("int8", "clustered"), ("int4", "random")],
)
def test_exact_answers_are_brute_forces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scorer: str, norm: str, precision: str, kind: str
) -> None:
    monkeypatch.setattr(cascade_module, "PROBES", 20)
    model = model_of(scorer, norm, kind)
    write_tiers(tmp_path, model, TIERS, Format("full", precision, "range", 70))
    tiers = chained(tmp_path)
    cascade, server = Cascade(tiers), tiers[-1]
    rows = server.vectors(np.arange(NUMBER))
    for entity, k in ((3, 1), (70, 10), (159, 50)):
        scores = server.query(entity, "s", "tail").scores(rows)
        plain = np.lexsort((np.arange(NUMBER), -scores))[:k]
        names, found = server.top_k(entity, "s", k)
        assert (names, found.tolist()) == ([f"e{i}" for i in plain], scores[plain].tolist())
        answers = cascade.top_k(entity, "s", k)
        assert (answers.names, answers.scores.tolist()) == (names, found.tolist())
        assert len(answers.pruned) == 2
        assert 0 <= answers.pruned[0] <= answers.pruned[1] < 1
        answers = cascade.top_k_heads("s", entity, k, exclude=[1, "e9"], candidates="b")
        names, found = server.top_k_heads("s", entity, k, exclude=[1, "e9"], candidates="b")
        assert (answers.names, answers.scores.tolist()) == (names, found.tolist())


@pytest.mark.parametrize(("scorer", "norm"), SCORERS)
def test_rows_in_clusters_are_pruned(tmp_path: Path, scorer: str, norm: str) -> None:
    write_tiers(tmp_path, model_of(scorer, norm, "clustered"), TIERS, Format())
    cascade = Cascade(chained(tmp_path))
    pruned = [cascade.top_k(i, "s", 5).pruned[1] for i in range(12)]
    assert np.mean(pruned) > 0.05


@pytest.mark.parametrize("layout", ["full", "delta"])
@pytest.mark.parametrize("sharding", ["range", "hash"])
def test_layouts_and_shardings_answer_alike(tmp_path: Path, layout: str, sharding: str) -> None:
    model = model_of("complex", "l1", "clustered")
    write_tiers(tmp_path / "plain", model, TIERS, Format())
    write_tiers(tmp_path / "other", model, TIERS, Format(layout, "float32", sharding, 50))
    expected = Tier.open(tmp_path / "plain" / "server").top_k(7, "r", 20)
    answers = Cascade(chained(tmp_path / "other")).top_k(7, "r", 20)
    assert (answers.names, answers.scores.tolist()) == (expected[0], expected[1].tolist())


def test_shortlists_trade_recall_for_work(tmp_path: Path) -> None:
    write_tiers(tmp_path, model_of("transe", "l1", "clustered"), TIERS, Format())
    cascade = Cascade(chained(tmp_path))
    queries = [(i, "r", None) for i in range(10)] + [(None, "s", f"e{i}") for i in range(10)]
    recalls = [cascade.recall(queries, 10, shortlist=sizes) for sizes in ((10, 10), (60, 30), (160, 160))]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1
    assert cascade.recall(queries, 10) > 0.9
    for recall in (0.5, 0.9, 1.0):
        sizes = cascade.shortlist_for(queries, 10, recall)
        assert recall <= cascade.recall(queries, 10, shortlist=sizes) < recall + 0.25
    assert all(10 <= size <= NUMBER for size in sizes)
    answers = cascade.top_k(5, "r", 10, exact=False, shortlist=[60, 30])
    assert answers.pruned == (1 - 60 / NUMBER, 1 - 30 / NUMBER)
    scores = cascade._last.score(5, "r", answers.names)  # every score is the largest tier's
    forward = cascade._last.query(5, "r", "tail").scores(cascade._last.vectors(answers.names))
    assert answers.scores.tolist() == forward.tolist()
    assert scores.shape == (10,)


def test_mixed_precisions_go_together_where_nothing_is_bounded(tmp_path: Path) -> None:
    model = model_of("complex", "l1", "clustered")
    for precision in ("float32", "int8"):
        write_tiers(tmp_path / precision, model, TIERS, Format(precision=precision))
    cascade = Cascade([Tier.open(tmp_path / "int8" / "phone"), Tier.open(tmp_path / "float32" / "server")])
    assert cascade.recall([(i, "r", None) for i in range(10)], 10, shortlist=[80]) > 0.8
    with pytest.raises(ExportError, match="int8"):
        cascade.top_k(1, "r", 3)


def test_chains_that_are_none_are_refused(tmp_path: Path) -> None:
    model = model_of("distmult", "l1", "random")
    write_tiers(tmp_path / "a", model, TIERS, Format())
    phone, pc, server = chained(tmp_path / "a")
    with pytest.raises(ExportError, match="two tiers"):
        Cascade([server])
    for wrong in ([server, phone], [phone, server, pc], [pc, pc]):
        with pytest.raises(ExportError, match="wrong order"):
            Cascade(wrong)
    for key, value in (("run", "other"), ("step", 41), ("graph_sha256", "1" * 64)):
        other = model_of("distmult", "l1", "random")
        setattr(other, key, value)
        write_tiers(tmp_path / key, other, TIERS, Format())
        with pytest.raises(ExportError, match=f"different runs: {key}"):
            Cascade([phone, Tier.open(tmp_path / key / "server")])
    write_tiers(tmp_path / "retrained", model_of("distmult", "l1", "random", seed=1), TIERS, Format())
    with pytest.raises(ExportError, match="not exported together"):
        Cascade([phone, Tier.open(tmp_path / "retrained" / "server")]).top_k(1, "r", 3)
    cascade = Cascade([phone, pc, server])
    for arguments in ({"k": 0}, {"k": True}, {"k": 3, "shortlist": [5, 5]}, {"k": 3, "candidates": "c"}):
        with pytest.raises(ExportError):
            cascade.top_k(1, "r", **arguments)
    for shortlist in ([5], [5, 0], [5, 5, 5], [5, 1.5]):
        with pytest.raises(ExportError, match="shortlist"):
            cascade.top_k(1, "r", 3, exact=False, shortlist=shortlist)
    with pytest.raises(ExportError, match="head or a tail"):
        cascade.recall([(1, "r", 2)], 3)
    with pytest.raises(ExportError, match="no queries"):
        cascade.recall([], 3)
    with pytest.raises(ExportError, match="recall is 0; allowed: above 0, up to 1"):
        cascade.shortlist_for([(1, "r", None)], 3, 0)


def test_products_of_format_1_have_no_norms() -> None:
    directory = Path(__file__).with_name("vectors") / "format1"
    cascade = Cascade([Tier.open(directory / name) for name in ("phone", "server")])
    with pytest.raises(ExportError, match="without norms"):
        cascade.top_k(1, "likes", 3)
    assert cascade.top_k(1, "likes", 3, exact=False).names == Tier.open(directory / "server").top_k(1, "likes", 3)[0]
