"""The strict reader of job files: every mistake, at once, with its line; and nothing but `ConfigError`."""

import dataclasses
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medscale.config import GraphSection, Job, ModelSection, OptimizerSection, TrainSection
from medscale.errors import ConfigError
from medscale.jobfile import MAX_BYTES, MAX_PROBLEMS, dump_job, job_to_mapping, load_job, parse_job

JOBS = Path(__file__).resolve().parents[1] / "jobs"

GOOD = """\
name: toy
graph:
  train: [toy/train.tsv]
model:
  scorer: transe
  dims: [4, 8]
  tiers: {phone: 4, server: 8}
optimizer:
  lr: 0.1
train:
  epochs: 2
"""


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_job(text, "toy.yaml")
    assert caught.value.exit_code == 2
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def only_problem_of(text: str) -> str:
    (problem,) = problems_of(text)
    return problem


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def test_reads_every_type() -> None:
    job = parse_job(changed("lr: 0.1", "lr: 1e-3") + "  patience: null\n  watch_dim: ~\n", "toy.yaml")
    assert job == Job(
        name="toy",
        graph=GraphSection(train=("toy/train.tsv",)),
        model=ModelSection(scorer="transe", dims=(4, 8), tiers={"phone": 4, "server": 8}),
        optimizer=OptimizerSection(lr=0.001),
        train=TrainSection(epochs=2),
    )


def test_integers_are_numbers_and_words_are_text() -> None:
    job = parse_job(changed("lr: 0.1", "lr: 3\nloss: {margin: 9}\nmed: {mutual: off}"), "toy.yaml")
    assert isinstance(job.optimizer.lr, float)
    assert isinstance(job.loss.margin, float)
    assert job.med.mutual == "off"
    assert parse_job(changed("name: toy", "name: no"), "toy.yaml").name == "no"
    assert parse_job(changed("name: toy", 'name: "123"'), "toy.yaml").name == "123"


@pytest.mark.parametrize(
    ("old", "new", "line", "wanted"),
    [
        ("lr: 0.1", "lr: -0.1", 9, r"optimizer\.lr: -0\.1 is too small; allowed: a number, above 0"),
        ("lr: 0.1", "lr: 0", 9, r"optimizer\.lr: .* is too small"),
        ("lr: 0.1", "lr: .nan", 9, r"optimizer\.lr: '\.nan' is not a number"),
        ("lr: 0.1", "lr: 1e999", 9, r"optimizer\.lr: 1e999 is not finite"),
        ("lr: 0.1", "lr: '0.1'", 9, r"optimizer\.lr: .*text in quotes.* is not a number"),
        ("lr: 0.1", "lr: null", 9, r"optimizer\.lr: 'null' is not a number"),
        ("lr: 0.1", "lr:", 9, r"optimizer\.lr: has no value"),
        ("lr: 0.1", "lr: [0.1]", 9, r"optimizer\.lr: is a list"),
        ("epochs: 2", "epochs: 2.0", 11, r"train\.epochs: '2\.0' is not an integer"),
        ("epochs: 2", "epochs: 010", 11, r"train\.epochs: '010' is not an integer"),
        ("epochs: 2", "epochs: 0x10", 11, r"train\.epochs: '0x10' is not an integer"),
        ("epochs: 2", "epochs: true", 11, r"train\.epochs: 'true' is not an integer"),
        ("epochs: 2", "epochs: 0", 11, r"train\.epochs: 0 is too small; allowed: an integer, at least 1"),
        ("epochs: 2", "epochs: 9223372036854775808", 11, r"does not fit 64 bits"),
        ("epochs: 2", "epochs: " + "9" * 5000, 11, r"does not fit 64 bits"),
        ("epochs: 2", "epochs: {a: 1}", 11, r"train\.epochs: is a mapping"),
        ("epochs: 2", "epochs: 2\n  epochs: 3", 12, r"train\.epochs: is given twice, first in line 11"),
        ("epochs: 2", "epochs: 2\n  epoch: 3", 12, r"train\.epoch: is not a key, did you mean train\.epochs"),
        ("epochs: 2", "epochs: 2\n  lr: 3", 12, r"train\.lr: is not a key, did you mean encoder\.lr or optimizer\.lr"),
        ("epochs: 2", "batch_size: 8", 10, r"train\.epochs: is missing; allowed: an integer, at least 1"),
        ("scorer: transe", "scorer: TransE", 5, r"did you mean transe\?; allowed: one of transe, rotate"),
        ("scorer: transe", "scorer: transee", 5, r"did you mean transe\?; allowed: one of transe, rotate"),
        ("dims: [4, 8]", "dims: [4, x]", 6, r"model\.dims\[1\]: 'x' is not an integer"),
        ("dims: [4, 8]", "dims: [0, 4, 8]", 6, r"model\.dims\[0\]: 0 is too small"),
        ("dims: [4, 8]", "dims: {a: 8}", 6, r"model\.dims: .*; allowed: a list of integers, or one"),
        ("dims: [4, 8]", "dims: [8, 4]", 6, r"model\.dims: \[8, 4\] is not strictly increasing"),
        ("phone: 4", "phone: 5", 7, r"model\.tiers\.phone: 5 is not one of model\.dims \[4, 8\]"),
        ("phone: 4", "phone: 4.5", 7, r"model\.tiers\.phone: '4\.5' is not an integer"),
        ("phone: 4", "../phone: 4", 7, r"model\.tiers\.\.\./phone: is no name that files can have"),
        ("phone: 4", "server: 4", 7, r"model\.tiers\.server: is given twice"),
        ("name: toy", "name: ../toy", 1, r"name: '\.\./toy' is no name that files can have"),
        ("name: toy", "name: 12", 1, r"name: 12 is no text; write it in quotes"),
        ("name: toy", 'name: "a\\0"', 1, r"name: .* holds control characters"),
        ("name: toy", 'name: "\\ud800"', 1, r"name: .* holds control characters"),
        ("  train: [toy/train.tsv]", "  header: yes", 3, r"graph\.header: 'yes' is not true or false"),
        ("name: toy", "name: toy\npreset: papr", 2, r"preset: 'papr' is none of the choices, did you mean p"),
        ("name: toy", "name: toy\nmed: {w1: 1, dynamic_weight: True}", 2, r"'True' is not true or false"),
        ("name: toy", "name: toy\nloss: softmax", 2, r"loss: is the value 'softmax'; allowed: a section of"),
        ("name: toy", "name: toy\nloss:", 2, r"loss: is empty; allowed: a section of kind"),
        ("name: toy", "name: toy\n? [a, b]\n: 3", 2, r"a key is a list; allowed: a name"),
        ("name: toy", "name: toy\n<<: {seed: 1}", 2, r"<<: is not a key"),
        ("name: toy", "name: toy\n_component_: os.system", 2, r"_component_: is not a key"),
    ],
)  # fmt: skip
def test_each_mistake_names_line_key_and_what_is_allowed(old: str, new: str, line: int, wanted: str) -> None:
    found = problems_of(changed(old, new))
    matching = [p for p in found if re.match(rf"toy\.yaml:{line}: ", p) and re.search(wanted, p)]
    assert matching, found


@pytest.mark.parametrize(
    ("text", "line", "wanted"),
    [
        ("", 1, "is empty; allowed: `key: value` lines"),
        ("# nothing\n", 1, "is empty"),
        ("- a\n", 1, "is a list"),
        ("just text", 1, "is the value 'just text'"),
        (GOOD + "---\n" + GOOD, 12, "a second document starts here"),
        (changed("0.1", "!!float 0.1"), 9, "tag tag:yaml.org,2002:float is refused"),
        (changed("0.1", "! 0.1"), 9, "tag ! is refused"),
        (changed("0.1", "&rate 0.1"), 9, "anchor &rate is refused"),
        (changed("0.1", "&rate 0.1") + "  patience: *rate\n", 12, "alias *rate is refused"),
        (changed("lr: 0.1", "lr: 0.1\n bad"), 10, "is not valid YAML"),
        (changed("lr: 0.1", 'lr: "\\UFFFFFFFF"'), 1, "is not valid YAML"),
        (changed("lr: 0.1", "lr: 0.1\x07"), 9, "character U+0007 is not allowed"),
        (changed("[4, 8]", "[" * 100_000), 6, "is nested deeper than any job"),
        ("a: {" * 9 + "}" * 9, 1, "is nested deeper than any job"),
        (GOOD + "#" * MAX_BYTES, 1, "is too large for a job; allowed: at most 256 KiB"),
    ],
)
def test_yaml_that_no_job_needs_is_refused(text: str, line: int, wanted: str) -> None:
    found = problems_of(text)
    assert any(p.startswith(f"toy.yaml:{line}: ") and wanted in p for p in found), found


def test_all_mistakes_come_at_once_in_order_of_lines() -> None:
    found = problems_of(
        """\
name: toy
seeds: 3
graph: {train: [toy/train.tsv]}
model:
  scorer: transe
  dims: [8, 4]
  tiers: {phone: 5}
optimizer: {lr: -1}
train: {epochs: ten}
negatives: {kind: shared}
"""
    )
    assert [p.split(": ")[0].removeprefix("toy.yaml:") for p in found] == ["2", "6", "7", "8", "9", "10"]


def test_unreadable_keys_cause_no_follow_up_problems() -> None:
    softmax = changed("name: toy", "name: toy\nloss: {kind: sofmax}\nnegatives: {kind: shared}")
    assert "loss.kind" in only_problem_of(softmax)
    misspelt = changed("name: toy", "name: toy\nlos: {kind: softmax}\nnegatives: {kind: shared}")
    assert "did you mean loss?" in only_problem_of(misspelt)
    per_level = changed("name: toy", "name: toy\nloss: {regularizer: n3, regularizer_weights: [0.1, 0.2]}")
    assert "model.dims" in only_problem_of(per_level.replace("[4, 8]", "[4, 8.0]"))
    per_tier = changed("lr: 0.1", "tier_factors: [0.1, 0.2, 0.3]")
    assert "optimizer.tier_factors: has 3 values; give 1, or 2" in only_problem_of(per_tier)
    assert "model.tiers" in only_problem_of(per_tier.replace("server: 8", "server: 8.0"))
    reach = changed("name: toy", "name: toy\nloss: {kind: softmax}\nnegatives: {kind: shared}\nmed: {reach: 0.5}")
    assert "med.reach: below 1 is for loss.kind bce" in only_problem_of(reach)
    composed = changed("lr: 0.1", "tier_factors: [2.0, 1.0]").replace("name: toy", "name: toy\nencoder: {kind: earl}")
    assert "optimizer.tier_factors: does not go with an encoder" in only_problem_of(composed)
    chunks = changed("epochs: 2", "epochs: 2\n  batch_size: 0")
    assert "train.batch_size" in only_problem_of(chunks)


def test_missing_section_is_one_problem() -> None:
    text = GOOD[: GOOD.index("model:")] + GOOD[GOOD.index("optimizer:") :]
    assert only_problem_of(text).startswith("toy.yaml:1: model: is missing; allowed: a section of scorer, ")


def test_preset_fills_what_the_file_leaves_open() -> None:
    job = parse_job(changed("name: toy", "name: toy\npreset: paper\nmed: {mutual: off}"), "toy.yaml")
    assert job.med.form == "paper"
    assert job.med.weights == "learnable"
    assert job.negatives.kind == "per_positive"
    assert job.loss.margin == 0
    assert job.optimizer.schedule == "linear"
    assert job.med.mutual == "off"


def test_conflict_with_a_preset_names_the_preset() -> None:
    text = changed("name: toy", "name: toy\npreset: paper").replace("transe", "complex")
    problem = only_problem_of(text)
    assert problem.startswith("toy.yaml:2: med.form: ")
    assert problem.endswith("(set by preset: paper)")


def test_conflict_of_a_key_not_given_names_its_section() -> None:
    assert only_problem_of(changed("epochs: 2", "epochs: 2\n  batch_size: 33")).startswith("toy.yaml:1: negatives.")
    text = changed("name: toy", "name: toy\nnegatives:\n  number: 5").replace(
        "epochs: 2", "epochs: 2\n  batch_size: 33"
    )
    assert only_problem_of(text).startswith("toy.yaml:2: negatives.chunk_size")


def test_problems_are_capped() -> None:
    found = problems_of(GOOD + "".join(f"key{i}: 1\n" for i in range(5_000)))
    assert len(found) == MAX_PROBLEMS + 1
    assert found[-1] == "toy.yaml: ... and 4950 more problems"


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_job(path).name == "toy"
    for data, wanted in [
        (GOOD.encode() + b"# \xff", f"{path}:12: byte 0xff is not UTF-8"),
        (b"#" * (MAX_BYTES + 1), f"{path}:1: is too large"),
    ]:
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=re.escape(wanted)):
            load_job(path)
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read \(No such file"):
        load_job(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory"):
        load_job(tmp_path)


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_dump_reads_back_equal(path: Path) -> None:
    job = load_job(path)
    text = dump_job(job)
    assert parse_job(text, "dump") == job
    for section, value in job_to_mapping(job).items():
        keys = value if isinstance(value, dict) else {}
        assert re.search(rf"^{section}:", text, re.MULTILINE)
        assert all(re.search(rf"^  {key}:", text, re.MULTILINE) for key in keys)


# Anything printable, and the characters that YAML treats as breaks, indicators or not at all.
texts = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12) | st.sampled_from(
    [
        "null",
        "~",
        "1e3",
        "010",
        "0x1F",
        "yes",
        "true",
        "- a",
        "a: b",
        "a #b",
        "'",
        '"',
        "\\",
        "é",
        "\ufeff",
        " ",
        "😀",
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), st.floats(1e-300, 1e300), st.integers(0, 2**63 - 1))
def test_dump_keeps_any_text_and_number(names: list[str], rate: float, seed: int) -> None:
    job = parse_job(GOOD, "toy.yaml")
    job = dataclasses.replace(
        job,
        seed=seed,
        graph=dataclasses.replace(job.graph, train=tuple(names)),
        optimizer=dataclasses.replace(job.optimizer, lr=rate),
    )
    assert parse_job(dump_job(job), "dump") == job


def test_tags_run_no_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for tag in (
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"!!python/object/new:os.system ['touch {canary}']",
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]",
        "!!python/name:os.system",
        "!!python/module:os",
        f"!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
    ):
        found = problems_of(changed("0.1", tag))
        assert all("python" in problem and "is refused" in problem for problem in found)
    assert not canary.exists()


def test_alias_bomb_is_refused_fast() -> None:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert all("refused" in p for p in problems_of("a0: &a0 x\n" + levels)[:-1])


JUNK = (
    "&a ", "*a", "!!python/name:os.system ", "!x ", "[", "]", "{", "}", ": ", "- ", "? ", "<<: ", "@", "`",
    "---\n", "...\n", "%YAML 9.9\n", "'", '"', ">", "|", "#", "\\", "\t", "\n", "\x00", "\x85", "\u2028",
    "\ufeff", "\ud800", "1e999", "-1", "null", "~", "yes", "0x", "é", "\U0001f600", '"\\UFFFFFFFF"', '"\\x',
    "9" * 400,
)  # fmt: skip


def mutate_line(line: str, others: list[str], draw: random.Random) -> str:
    spot = draw.randrange(len(line) + 1)
    junk = draw.choice([draw.choice(JUNK), chr(draw.randrange(1, 0x110000))])
    return draw.choice(
        [
            "\n",
            line + line,
            line[:spot] + junk + line[spot:],
            line[:spot] + line[spot + 1 :],
            " " * draw.randint(1, 5) + line,
            f"{line.partition(':')[0]}: {junk}\n",
            draw.choice(others),
        ]
    )


def mutate(text: str, draw: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(lines))
        lines[at] = mutate_line(lines[at], lines, draw)
    return "".join(lines)


def problems_of_file(path: Path) -> tuple[str, ...]:
    try:
        load_job(path)
    except ConfigError as error:
        return error.problems
    return ()


def check_mutations(number: int, directory: Path) -> None:
    draw = random.Random(7)
    sources = [path.read_text() for path in sorted(JOBS.glob("*.yaml")) if "paper" not in path.name]
    path = directory / "mutated.yaml"
    refused = 0
    for _ in range(number):
        path.write_bytes(mutate(draw.choice(sources), draw).encode("utf-8", "surrogatepass"))
        problems = problems_of_file(path)
        assert all(re.match(rf"{re.escape(str(path))}(:\d+)?: ", problem) for problem in problems)
        refused += bool(problems)
    assert refused > number // 3


def test_mutated_jobs_raise_nothing_but_config_errors(tmp_path: Path) -> None:
    check_mutations(300, tmp_path)


@pytest.mark.slow
def test_many_mutated_jobs_raise_nothing_but_config_errors(tmp_path: Path) -> None:
    check_mutations(3_000, tmp_path)


def test_one_value_stands_for_a_list_of_one() -> None:
    job = parse_job(GOOD.replace("[toy/train.tsv]", "toy/train.tsv"), "job.yaml")
    assert job.graph.train == ("toy/train.tsv",)
