"""The page of a run: it says what was measured, names cannot run in it, and a browser shows it without a network."""

import functools
import html
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from told_run import DIMS, MRR, NASTY, ToldRun, records_of, write_told_run

from medscale import figures, places, report
from medscale.cli import main as medscale
from medscale.errors import ConfigError, MedscaleError
from medscale.figures import Curve
from medscale.page import compared_runs
from medscale.results import course_of, evaluation_of, export_report_of

PNG = b"\x89PNG\r\n\x1a\n"
IMAGES = {
    "mrr_by_dim", "hits_at_10_by_dim", "loss", "loss_by_dim", "validation_mrr", "throughput", "batch_wait",
    "entities_2", "entities_16",
}  # fmt: skip
LABEL = '<script>direct</script> $\\frac$ "&amp;'


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> ToldRun:
    """A run, its page, and two runs of one dim each that it is compared with."""
    told = write_told_run(tmp_path_factory.mktemp("told"))
    records = [
        {
            "tier": tier, "precision": precision, "mrr": 0.2 * share, "hits@10": 0.3, "bytes_per_entity": number,
            "share_of_float32": share, "marked": share < 0.99,
        }
        for tier, precision, number, share in [(NASTY, "float32", 16, 1.0), (NASTY, "int8", 8, 0.9875)]
    ]  # fmt: skip
    (told.directory / "export_report.json").write_text(json.dumps({"precisions": records}))
    for dim, mrr in ((2, 0.21), (16, 0.32)):
        (told.place / f"direct{dim}").mkdir()
        (told.place / f"direct{dim}" / "evaluation.json").write_text(json.dumps(records_of({dim: mrr})))
    assert medscale(["report", str(told.directory), "--json", *told.options(), *compare(told)]) == 0
    return told


def compare(told: ToldRun) -> list[str]:
    return ["--compare", *(f"{LABEL}={told.place / f'direct{dim}'}" for dim in (2, 16))]


@pytest.fixture(scope="module")
def page(told: ToldRun) -> str:
    return (told.directory / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_everything_measured_is_said(told: ToldRun, page: str) -> None:
    text = " ".join(Elements(page).text.split())
    for words in (
        "complex on told: 60 entities, 2 relations; step 40; ranked on 20 queries of the test split",
        "0.300 MRR of the full model, 16 units",
        "66.7% of it kept by phone, 2 units",
        "87.5% ability retention",
        "phone 2 0.200 66.7% 16 B",
        "float32 0.100 0.300 4",
        "98.75% 0.3000 8",  # of the export's own report
        "0.210",  # of the run compared
        "8 16 0.310 103.3% 0.465",  # a sub-model that is no tier
        "t-SNE of 60 entities",
        "scorer: complex",  # the job
    ):
        assert words in text, words
    assert text.count("(!)") == 2  # a marked record, and what the mark means


def test_names_cannot_run(page: str) -> None:
    parsed = Elements(page)
    assert {tag for tag, _ in parsed.elements} <= {
        "html", "head", "meta", "title", "link", "style", "body", "main", "h1", "h2", "p", "div", "b", "span",
        "section", "table", "thead", "tbody", "tr", "th", "td", "figure", "img", "figcaption", "details", "summary",
        "pre", "footer",
    }  # fmt: skip
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)
    assert parsed.text.count(NASTY) == 2  # as a tier at two precisions
    assert LABEL in parsed.text


def test_nothing_is_loaded(told: ToldRun, page: str) -> None:
    parsed = Elements(page)
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "data", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policies = [a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert [str(policy).split("; ")[:2] for policy in policies] == [["default-src 'none'", "img-src data:"]]
    alts = [attributes["alt"] for tag, attributes in parsed.elements if tag == "img"]
    assert len(alts) == len(IMAGES)
    assert all(alts)


def test_figures_lie_beside_the_page(told: ToldRun) -> None:
    written = {path.stem: path.read_bytes() for path in (told.directory / "report").iterdir()}
    assert set(written) == IMAGES
    assert all(data.startswith(PNG) for data in written.values())
    assert len(set(written.values())) == len(IMAGES)


def test_the_same_run_gives_the_same_page_but_for_the_date(told: ToldRun, page: str) -> None:
    (told.directory / "report" / "of_an_older_report.png").write_bytes(PNG)
    assert report.main([str(told.job_path), *told.options(), *compare(told)]) == 0
    again = (told.directory / "report.html").read_text(encoding="utf-8")
    dates = [text.split("Written ")[1].split(" by medscale")[0] for text in (page, again)]
    assert again.replace(dates[1], "") == page.replace(dates[0], "")
    assert {path.stem for path in (told.directory / "report").iterdir()} == IMAGES


def test_a_page_says_what_is_left_out(tmp_path: Path) -> None:
    told = write_told_run(tmp_path)
    (told.directory / "metrics.jsonl").unlink()
    assert report.main([str(told.directory), f"--graphs-dir={tmp_path / 'elsewhere'}"]) == 0
    page = (told.directory / "report.html").read_text()
    for words in (
        "The map is left out",
        "Sizes by dimension are left out",
        "metrics.jsonl of this run holds no record",
    ):
        assert words in page
    assert {path.stem for path in (told.directory / "report").iterdir()} == {"mrr_by_dim", "hits_at_10_by_dim"}


def test_comparisons_that_mislead_are_refused(told: ToldRun, tmp_path: Path) -> None:
    own = evaluation_of(told.directory)
    (tmp_path / "evaluation.json").write_text(json.dumps(records_of({2: 0.5}, num_queries=7)))
    with pytest.raises(MedscaleError, match=r"was ranked on 7 queries of test, this run on 20"):
        compared_runs([f"other={tmp_path}"], own)
    with pytest.raises(MedscaleError, match="run medscale evaluate first"):
        compared_runs([f"other={tmp_path / 'nowhere'}"], own)
    with pytest.raises(ConfigError, match="is not LABEL=RUN_DIRECTORY"):
        compared_runs(["runs/other"], own)
    same = f"direct={told.place / 'direct2'}"
    with pytest.raises(ConfigError, match="'direct' has dim 2 twice"):
        compared_runs([same, same], own)
    (one,) = compared_runs([same, f"direct={told.place / 'direct16'}"], own)
    assert [record["mrr"] for record in one.evaluation.values()] == [0.21, 0.32]


def test_files_of_a_run_that_are_damaged(tmp_path: Path) -> None:
    for content in ("[{}]", "{", '{"precisions": [{"tier": "a", "precision": "int8", "marked": true, "mrr": "x"}]}'):
        (tmp_path / "export_report.json").write_text(content)
        with pytest.raises(MedscaleError, match=r"export_report.json is damaged"):
            export_report_of(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(records_of({2: 1.5})))
    with pytest.raises(MedscaleError, match="figures out of range"):
        evaluation_of(tmp_path)


def test_the_course_keeps_whole_lines_in_order(told: ToldRun) -> None:
    course = course_of(told.directory)
    assert [record["step"] for record in course.train] == list(range(10, 4010, 10))
    assert [record["step"] for record in course.valid] == [1000, 2000, 3000, 4000]
    assert course.valid[-1]["mrr"] == {str(dim): mrr for dim, mrr in MRR.items()}


# ---- figures and the map -----------------------------------------------------------------------------------


def test_long_curves_are_means_of_neighbours() -> None:
    x = np.arange(1000.0)
    thin_x, thin_y = figures.thinned(Curve("", x.tolist(), (2 * x).tolist()))
    expected = [x[i : i + 4].mean() for i in range(0, 1000, 4)]
    np.testing.assert_allclose(thin_x, expected)
    np.testing.assert_allclose(thin_y, 2 * np.array(expected))


@pytest.mark.parametrize("name", ["_hidden", "$\\frac$", "  ", "x" * 500, "日本\nb\x00c"])
@pytest.mark.filterwarnings("error")
def test_every_name_can_be_drawn(name: str) -> None:
    curves = [Curve(name, DIMS, list(MRR.values())), Curve("other", DIMS, list(MRR.values()))]
    assert figures.by_dim(name, "MRR", curves, {name: 2, "server": 16}).startswith(PNG)
    categories = np.array([0, 1, 0, 1])
    assert figures.cloud(name, np.random.default_rng(0).normal(size=(4, 2)), categories, [name, "b"]).startswith(PNG)
    assert len(figures.plain_name(name)) <= 28
    assert figures.plain_name("a\nb\x00c") == "a b c"


@pytest.mark.filterwarnings("error")
def test_odd_curves_can_be_drawn() -> None:
    assert figures.by_dim("one dim", "MRR", [Curve("a", [7], [0.5])], {"only": 7}).startswith(PNG)
    many = list(range(10, 650, 10))
    assert figures.by_dim("64 dims", "MRR", [Curve("a", many, [0.1] * 64)], {"phone": 10, "pc": 20}).startswith(PNG)
    zeros = Curve("zeros", [1, 2], [0.0, 0.0])
    assert figures.over_steps("zeros", "loss", [zeros], logarithmic=True).startswith(PNG)
    wide = Curve("wide", [1, 2, 3], [0.0, 1e-3, 1e3])
    assert figures.over_steps("wide", "loss", [wide], logarithmic=True, marked=2).startswith(PNG)


def test_sample_takes_types_and_else_slots(told: ToldRun, tmp_path: Path) -> None:
    sample = places.sample_of(told.graph)
    assert sample is not None
    assert (sample.by, set(sample.names)) == ("entity type", {NASTY, "_hidden", "plain"})
    names = told.graph.entity_names().to_pylist()
    kinds = {NASTY: "a", "_hidden": "b", "plain": "c"}
    assert [kinds[sample.names[c]] for c in sample.category_N] == [names[e][0] for e in sample.entity_N]
    again = places.sample_of(told.graph)
    assert again is not None
    np.testing.assert_array_equal(sample.entity_N, again.entity_N)

    graph = write_told_run(tmp_path, types=False).graph
    by_slot = places.sample_of(graph)
    assert by_slot is not None
    assert by_slot.by == "most frequent relation slot"
    relations = graph.relation_names().to_pylist()
    for entity, category in zip(by_slot.entity_N, by_slot.category_N, strict=True):
        assert by_slot.names[category] == plain_slot(graph.triples("train"), relations, int(entity))


def plain_slot(triples: Any, relations: list[str], entity: int) -> str:
    """The slot that an entity takes most often; of equals that of the first relation, heads before tails."""
    counts = {
        (relation, side): sum(1 for row in triples if row[1] == relation and row[column] == entity)
        for relation in range(len(relations))
        for side, column in (("head", 0), ("tail", 2))
    }
    relation, side = max(counts, key=lambda slot: counts[slot])
    return f"{side} of {relations[relation]}"


def test_places_keep_groups_together_and_repeat() -> None:
    draw = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], 30)
    rows = (8 * np.eye(3, 12)[groups] + draw.normal(size=(90, 12))).astype(np.float32)
    found = places.places_of([rows[:, :6], rows])
    for at in found:
        centres = np.stack([at[groups == g].mean(0) for g in range(3)])
        nearest = np.linalg.norm(at[:, None] - centres, axis=-1).argmin(1)
        assert (nearest == groups).mean() > 0.95
    for at, again in zip(found, places.places_of([rows[:, :6], rows]), strict=True):
        np.testing.assert_array_equal(at, again)


# ---- in a browser ------------------------------------------------------------------------------------------

#: loads the page in a frame of the given width and tells what came of it
HARNESS = """<!doctype html><title>harness</title>
<iframe src="report.html" style="width: WIDTHpx; height: 3000px; border: 0"></iframe><pre id="told"></pre>
<script>
window.onload = () => {
  const frame = document.querySelector("iframe"), inner = frame.contentDocument;
  const images = [...inner.images];
  document.getElementById("told").textContent = JSON.stringify({
    title: inner.title, scripts: inner.scripts.length, text: inner.body.innerText,
    natural: images.map(image => image.naturalWidth), widths: images.map(image => image.clientWidth),
    columns: new Set(images.slice(0, 2).map(image => image.getBoundingClientRect().left)).size,
    overflow: inner.documentElement.scrollWidth - inner.documentElement.clientWidth,
    resources: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:")),
  });
};
</script>"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of `tmp_path` on this machine, and what it was asked for."""
    asked: list[str] = []
    handler = functools.partial(type("Handler", (_Handler,), {"asked": asked}), directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def chromium(place: Path, *arguments: str) -> str:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium): the page was not opened")
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={place / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]  # fmt: skip
    done = subprocess.run([program, *options, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (360, 1)])
def test_a_browser_shows_it(width: int, columns: int, page: str, tmp_path: Path, served: tuple[str, list[str]]) -> None:
    address, asked = served
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    (tmp_path / "harness.html").write_text(HARNESS.replace("WIDTH", str(width)), encoding="utf-8")
    seen = chromium(tmp_path, "--window-size=1400,1000", "--dump-dom", f"{address}/harness.html")
    shown = json.loads(html.unescape(seen.split('<pre id="told">')[1].split("</pre>")[0]))
    assert shown["title"] == "told"
    assert shown["scripts"] == 0
    assert NASTY in " ".join(shown["text"].split())
    assert len(shown["natural"]) == len(IMAGES)
    assert all(natural >= 960 for natural in shown["natural"])
    assert all(0 < drawn <= width for drawn in shown["widths"])
    assert shown["columns"] == columns
    assert shown["overflow"] == 0, "the page is wider than its window"
    assert shown["resources"] == []
    assert sorted(set(asked) - {"/favicon.ico"}) == ["/harness.html", "/report.html"]
