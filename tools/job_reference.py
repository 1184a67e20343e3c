"""Write the key reference of jobs/README.md and jobs/job.schema.json from medscale/config.py.

usage: python tools/job_reference.py [--check]

With --check nothing is written; the exit code is 1 where a file is out of date.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from medscale.config import PRESETS, Job
from medscale.jobfile import Key, describe, json_schema, section_keys

JOBS = Path(__file__).resolve().parents[1] / "jobs"
START = "<!-- keys: written by tools/job_reference.py -->"
END = "<!-- end of keys -->"


def reference() -> str:
    """Return the reference as Markdown: one table per section, in the order of config.py."""
    return "\n".join(_section(Job, "", ""))


def _section(section: type, path: str, note: str) -> Iterator[str]:
    keys = section_keys(section).values()
    yield f"\n### {f'`{path}`' if path else 'Top level'}\n"
    yield f"{' '.join((section.__doc__ or '').split())}{note}\n"
    yield "| key | takes | default | meaning |"
    yield "|---|---|---|---|"
    for key in keys:
        yield _row(key, path)
    for key in keys:
        if dataclasses.is_dataclass(key.hint):
            nested = f"{path}.{key.name}" if path else key.name
            yield from _section(key.hint, nested, " Optional." if key.optional else "")


def _row(key: Key, path: str) -> str:
    takes = "a section, see below" if key.is_section else _code_choices(key)
    text = str(key.limits["help"])
    cells = [f"`{key.name}`", takes, _default(key, path), text[:1].upper() + text[1:]]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _code_choices(key: Key) -> str:
    return describe(key).replace("_", "\\_").replace("*", "\\*")


def _default(key: Key, path: str) -> str:
    if key.required:
        return "**required**"
    if key.is_section:
        return "none" if key.optional else "its defaults"
    default = f"`{_spelled(key.field.default)}`"
    of_paper = PRESETS["paper"].get(path, {})
    if key.name in of_paper and of_paper[key.name] != key.field.default:
        return f"{default}; `preset: paper`: `{_spelled(of_paper[key.name])}`"
    return default


def _spelled(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def outputs() -> dict[Path, str]:
    """Return what each written file must hold."""
    readme = (JOBS / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(START)
    after = rest.partition(END)[2]
    schema = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    return {
        JOBS / "README.md": f"{before}{START}\n{reference()}\n\n{END}{after}",
        JOBS / "job.schema.json": schema,
    }


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.exit(__doc__)
    stale = {
        path: text for path, text in outputs().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in stale.items():
        if arguments:
            print(f"{path} is out of date: run python tools/job_reference.py", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return int(bool(stale and arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
