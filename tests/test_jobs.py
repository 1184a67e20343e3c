"""The shipped jobs: each is read, valid for editors, and documented; generated files are current."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from medscale.config import Job
from medscale.jobfile import dump_job, json_schema, load_job, section_keys

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "jobs").glob("*.yaml"))
each_job = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)


def yaml_1_2(text: str) -> Any:
    """Read YAML as editors do: `1e-3` is a number, `no` is text (PyYAML alone follows YAML 1.1)."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {}
    for kind, pattern in {
        "null": r"(null|~|)$",
        "bool": r"(true|false)$",
        "int": r"[-+]?[0-9]+$",
        "float": r"[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$",
    }.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), None)
    return yaml.load(text, Loader)


def test_the_promised_jobs_are_shipped() -> None:
    promised = {"quickstart", "umls", "wn18rr", "fb15k237", "codex_s", "codex_l", "yago3_10", "skg"}
    assert promised <= {path.stem for path in SHIPPED}


@each_job
def test_job_is_read_and_named_after_its_file(path: Path) -> None:
    job = load_job(path)
    assert job.name == path.stem
    assert path.read_text().startswith("# yaml-language-server: $schema=job.schema.json\n")
    assert max(job.model.tiers.values()) == job.model.dims[-1], "the whole model is one of the tiers"


@each_job
def test_job_is_valid_under_the_schema(path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.validate(yaml_1_2(path.read_text()))
    validator.validate(yaml_1_2(dump_job(load_job(path))))


def test_skg_is_the_papers() -> None:
    job = load_job(ROOT / "jobs" / "skg.yaml")
    assert job.graph.synthetic is not None
    assert (job.graph.synthetic.num_users, job.graph.synthetic.num_triples) == (5_526_835, 50_775_620)
    assert job.model.scorer == "transe"
    assert job.model.tiers == {"phone": 10, "pc": 100, "server": 500}


def test_schema_is_a_schema_and_refuses_what_the_reader_refuses() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validator = jsonschema.Draft202012Validator(json_schema())
    good = yaml_1_2((ROOT / "jobs" / "quickstart.yaml").read_text())
    for section, key, value in [
        ("train", "epochs", 0),
        ("train", "epoch", 1),
        ("optimizer", "lr", 0),
        ("optimizer", "lr", "0.1"),
        ("model", "scorer", "transee"),
        ("model", "dims", [4, "x"]),
        ("model", "tiers", {"../phone": 4}),
        ("graph", "valid_fraction", 0.9),
        ("negatives", "filter_known", 1),
    ]:
        bad = good | {section: good[section] | {key: value}}
        assert not validator.is_valid(bad), (section, key, value)


def test_generated_schema_and_reference_are_current() -> None:
    command = [sys.executable, "tools/job_reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((ROOT / "jobs" / "job.schema.json").read_text()) == json_schema()


def test_readme_explains_every_key_and_every_job() -> None:
    readme = (ROOT / "jobs" / "README.md").read_text()
    keys = section_keys(Job)
    names = set(keys) | {name for key in keys.values() if key.is_section for name in section_keys(key.hint)}
    assert [name for name in sorted(names) if f"| `{name}` |" not in readme] == []
    assert [path.stem for path in SHIPPED if f"`{path.stem}`" not in readme] == []


@pytest.mark.parametrize("readme", ["README.md", "jobs/README.md"])
def test_example_in_readme_is_a_job(readme: str, tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
    assert examples
    for example in examples:
        path = tmp_path / "example.yaml"
        path.write_text(example)
        load_job(path)


@pytest.mark.parametrize("script", ["quality_table", "speed_table", "baselines_table"])
def test_results_in_the_readme_are_those_committed(script: str) -> None:
    command = [sys.executable, f"tools/bench/{script}.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
