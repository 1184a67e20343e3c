"""Job files: YAML read strictly into a `Job`, all mistakes reported at once with their lines; and written.

Only PyYAML's node graph is used, never its constructors: a value means what its key's type says, so `1e-3` is
a number, `no` is not false, and no tag can name code. The types, limits and help all come from `config`.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Union

import yaml

from medscale.config import PRESETS, Job, conflicts
from medscale.errors import ConfigError

__all__ = [
    "describe",
    "dump_job",
    "job_to_mapping",
    "json_schema",
    "load_job",
    "parse_job",
    "section_keys",
    "with_values",
]

MAX_BYTES = 256 * 1024
_ALLOWED_SIZE = f"allowed: at most {MAX_BYTES // 1024} KiB"
MAX_DEPTH = 8
MAX_PROBLEMS = 50
MAX_INTEGER = 2**63 - 1
#: how many guesses stand in for keys that cannot be read while combinations are checked
STAND_INS = 6

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
#: plain scalars that YAML 1.2, and so every editor, takes for something other than text
_NOT_TEXT = re.compile(
    rf"|~|null|Null|NULL|true|True|TRUE|false|False|FALSE|{_FLOAT.pattern}"
    r"|0o[0-7]+|0x[0-9a-fA-F]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_PLAIN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9_./*-]*")


class _Unreadable:
    """Stands for a value that could not be read; the problem is already reported."""


_UNREADABLE: Final = _Unreadable()


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a section: its name, its type without `None`, and its field of the dataclass."""

    name: str
    hint: Any
    optional: bool
    field: "dataclasses.Field[Any]"

    @property
    def required(self) -> bool:
        """Whether a file must give it."""
        return self.field.default is dataclasses.MISSING

    @property
    def is_section(self) -> bool:
        """Whether it holds keys of its own."""
        return dataclasses.is_dataclass(self.hint)

    @property
    def limits(self) -> Mapping[str, Any]:
        """The values that it takes, by the names of `config.key`; also its help."""
        return self.field.metadata


@functools.cache
def section_keys(section: type) -> Mapping[str, Key]:
    """Return the keys of a section's dataclass by name, in the order of their declaration."""
    hints = typing.get_type_hints(section)
    return {f.name: Key(f.name, *_unwrap(hints[f.name]), f) for f in dataclasses.fields(section)}


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """Split `X | None` into X and True; anything else stays, with False."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        assert len(inner) == 1, hint
        return inner[0], True
    return hint, False


# ---- reading -----------------------------------------------------------------------------------------------


def load_job(path: Path) -> Job:
    """Read a job file.

    Raises:
        ConfigError: with every problem found, as `FILE:LINE: section.key: what is wrong; allowed: ...`.

    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as cause:
        reason = cause.strerror or str(cause)
        raise ConfigError([f"{path}: cannot be read ({reason}); allowed: a job file, see jobs/"]) from None
    return parse_job(_decode(data, str(path)), str(path))


def parse_job(text: str, source: str) -> Job:
    """Read a job from YAML text; `source` is what problems call the file.

    Raises:
        ConfigError: with every problem found, as `SOURCE:LINE: section.key: what is wrong; allowed: ...`.

    """
    reading = _Reading(source)
    values = reading.section(_compose(text, source), Job, "")
    preset = values.get("preset", "default")
    filled = _fill_from_preset(values, preset)
    for key, problem in _conflicts(values, reading.unreadable):
        if key in filled:
            reading.report(reading.line_of("preset"), key, f"{problem} (set by preset: {preset})")
        else:
            reading.report(reading.line_of(key), key, problem)
    if reading.problems:
        raise ConfigError(reading.messages())
    job = _build(Job, values, "", set(), 0)
    assert isinstance(job, Job)
    return job


def _decode(data: bytes, source: str) -> str:
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{source}:1: is too large for a job; {_ALLOWED_SIZE}"])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as cause:
        line = data[: cause.start].count(b"\n") + 1
        byte = data[cause.start]
        raise ConfigError([f"{source}:{line}: byte 0x{byte:02x} is not UTF-8; allowed: UTF-8 text"]) from None


def _compose(text: str, source: str) -> yaml.MappingNode:
    """Return the top mapping of one plain YAML document, or raise what is wrong with it."""
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise ConfigError([f"{source}:1: is too large for a job; {_ALLOWED_SIZE}"])
    try:
        # First the events: they show tags, aliases and depth before any graph is built from them.
        problems = [f"{source}:{line}: {problem}" for line, problem in _refused_events(text)]
        root = None if problems else yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as cause:
        line = text[: cause.position].count("\n") + 1
        problems = [f"{source}:{line}: character U+{int(cause.character):04X} is not allowed in YAML"]
    except yaml.MarkedYAMLError as cause:
        mark = cause.problem_mark or cause.context_mark
        line = mark.line + 1 if mark else 1
        problems = [f"{source}:{line}: is not valid YAML: {cause.problem or cause.context}"]
    except (yaml.YAMLError, ValueError, OverflowError) as cause:
        # PyYAML lets `chr` of an escape beyond Unicode through as it is.
        problems = [f"{source}:1: is not valid YAML: {cause}"]
    else:
        if not problems and not isinstance(root, yaml.MappingNode):
            problems = [f"{source}:1: is {_kind(root)}; allowed: `key: value` lines, see jobs/README.md"]
        if isinstance(root, yaml.MappingNode):
            return root
    raise ConfigError(_capped(problems, source))


def _refused_events(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, problem) for each construct that a job has no use for; stop at hopeless depth."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        documents += isinstance(event, yaml.DocumentStartEvent)
        if isinstance(event, yaml.DocumentStartEvent) and documents == 2:
            yield line, "a second document starts here; allowed: one job per file"
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            kind = "alias *" if isinstance(event, yaml.AliasEvent) else "anchor &"
            yield line, f"{kind}{_short(event.anchor)} is refused; allowed: the value itself, spelled out"
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            yield line, f"tag {_short(event.tag)} is refused; allowed: plain values, keys say their type"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            yield line, f"is nested deeper than any job; allowed: at most {MAX_DEPTH} levels"
            return


class _Reading:
    """One file being read: the problems so far, the line of each key, the keys whose value is unknown."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[tuple[int, str]] = []
        self.lines: dict[str, int] = {}
        self.unreadable: set[str] = set()

    def report(self, line: int, path: str, problem: str) -> None:
        """Note a problem of the key `path`."""
        self.problems.append((line, f"{self.source}:{line}: {path}: {problem}"))

    def messages(self) -> list[str]:
        """Return the problems in the order of their lines."""
        in_order = sorted(self.problems, key=lambda problem: problem[0])
        return _capped([text for _, text in in_order], self.source)

    def line_of(self, path: str) -> int:
        """Return the line of a key, else that of the section that would hold it."""
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return self.lines.get(path, 1)

    def section(self, node: yaml.MappingNode, section: type, path: str) -> dict[str, Any]:
        """Return the values that a section's node gives, nested sections as dicts."""
        keys = section_keys(section)
        values: dict[str, Any] = {}
        given = dict(self._entries(node, path))
        for name, child in given.items():
            if name not in keys:
                self._report_unknown(name, keys, given, path)
                continue
            value = self._value(child, keys[name], _join(path, name))
            if value is _UNREADABLE:
                self.unreadable.add(_join(path, name))
            else:
                values[name] = value
        for key in keys.values():
            if key.required and key.name not in given:
                self._report_missing(key, path)
        return values

    def _entries(self, node: yaml.MappingNode, path: str) -> Iterator[tuple[str, yaml.Node]]:
        """Yield (key, value node) of a mapping, noting lines; reports keys that repeat or are no text."""
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.report(line, path or "top level", f"a key is {_kind(key_node)}; allowed: a name")
                continue
            name = key_node.value
            if name in seen:
                problem = f"is given twice, first in line {seen[name]}; allowed: once"
                self.report(line, _join(path, _short(name)), problem)
                continue
            seen[name] = self.lines[_join(path, name)] = line
            yield name, value_node

    def _report_unknown(self, name: str, keys: Mapping[str, Key], given: Mapping[str, Any], path: str) -> None:
        where = _join(path, name)
        close = difflib.get_close_matches(name[:64], keys, 1) if len(self.problems) < MAX_PROBLEMS else []
        elsewhere = [place for place in _places_of(name) if place != where]
        if close and close[0] not in given:
            # It was probably meant, so nothing is known about its value.
            self.unreadable.add(_join(path, close[0]))
        guesses = [_join(path, close[0])] if close else elsewhere
        guess = f", did you mean {' or '.join(guesses)}?" if guesses else ""
        shown = _join(path, _short(name) or "(empty)")
        self.report(self.lines[where], shown, f"is not a key{guess}; allowed: {', '.join(keys)}")

    def _report_missing(self, key: Key, path: str) -> None:
        where = _join(path, key.name)
        if where not in self.unreadable:
            self.report(self.line_of(path), where, f"is missing; allowed: {describe(key)}")
        self.unreadable.add(where)

    def _value(self, node: yaml.Node, key: Key, path: str) -> Any:
        """Return what the node says under the key's type, or `_UNREADABLE` after reporting why not."""
        if key.optional and _is_null(node):
            return None
        if key.is_section:
            if isinstance(node, yaml.MappingNode):
                return self.section(node, key.hint, path)
        elif typing.get_origin(key.hint) is tuple:
            if isinstance(node, yaml.SequenceNode):
                return self._items(node, key, path)
            if isinstance(node, yaml.ScalarNode) and not _is_null(node):
                # One value is a list of one.
                item = self._scalar(node, typing.get_args(key.hint)[0], key, path)
                return _UNREADABLE if item is _UNREADABLE else (item,)
        elif typing.get_origin(key.hint) is not None and typing.get_origin(key.hint) is not Literal:
            if isinstance(node, yaml.MappingNode):
                return self._pairs(node, key, path)
        else:
            return self._scalar(node, key.hint, key, path)
        self._report_wrong(node, f"is {_kind(node)}", key, path)
        return _UNREADABLE

    def _items(self, node: yaml.SequenceNode, key: Key, path: str) -> Any:
        inner = typing.get_args(key.hint)[0]
        items = [self._scalar(item, inner, key, f"{path}[{i}]") for i, item in enumerate(node.value)]
        return _UNREADABLE if _UNREADABLE in items else tuple(items)

    def _pairs(self, node: yaml.MappingNode, key: Key, path: str) -> Any:
        inner = typing.get_args(key.hint)[1]
        pattern = key.limits["pattern"]
        pairs = {}
        for name, child in self._entries(node, path):
            if re.fullmatch(pattern, name) is None:
                problem = f"is no name that files can have; allowed: names matching {pattern}"
                self.report(self.lines[_join(path, name)], _join(path, _short(name)), problem)
                pairs[name] = _UNREADABLE
            else:
                pairs[name] = self._scalar(child, inner, key, _join(path, name))
        return _UNREADABLE if _UNREADABLE in pairs.values() else pairs

    def _scalar(self, node: yaml.Node, hint: Any, key: Key, path: str) -> Any:
        try:
            _refuse(node, key)
            value = _read_scalar(node, hint)
            _check_limits(value, hint, key)
        except ValueError as cause:
            self._report_wrong(node, str(cause), key, path)
            return _UNREADABLE
        return value

    def _report_wrong(self, node: yaml.Node, problem: str, key: Key, path: str) -> None:
        self.report(node.start_mark.line + 1, path, f"{problem}; allowed: {describe(key)}")


def _refuse(node: yaml.Node, key: Key) -> None:
    reason = key.limits.get("refused", {}).get(node.value) if isinstance(node, yaml.ScalarNode) else None
    if reason is not None:
        raise ValueError(f"{node.value} is refused: {reason}")


def _read_scalar(node: yaml.Node, hint: Any) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"is {_kind(node)}")
    if node.style is None and node.value == "":
        raise ValueError("has no value")
    if typing.get_origin(hint) is Literal:
        return _read_choice(node, typing.get_args(hint))
    readers: dict[Any, Callable[[yaml.ScalarNode], Any]] = {
        bool: _read_bool, int: _read_integer, float: _read_float, str: _read_text,
    }  # fmt: skip
    return readers[hint](node)


def _read_choice(node: yaml.ScalarNode, choices: tuple[str, ...]) -> str:
    if node.value in choices:
        return str(node.value)
    close = difflib.get_close_matches(node.value[:64].lower(), choices, 1)
    guess = f", did you mean {close[0]}?" if close else ""
    raise ValueError(f"{_quoted(node)} is none of the choices{guess}")


def _read_bool(node: yaml.ScalarNode) -> bool:
    if node.style is None and node.value in ("true", "false"):
        return bool(node.value == "true")
    raise ValueError(f"{_quoted(node)} is not true or false")


def _read_integer(node: yaml.ScalarNode) -> int:
    if node.style is not None or not _INTEGER.fullmatch(node.value):
        raise ValueError(f"{_quoted(node)} is not an integer")
    if len(node.value) > 20 or abs(int(node.value)) > MAX_INTEGER:
        raise ValueError(f"{_short(node.value)} does not fit 64 bits")
    return int(node.value)


def _read_float(node: yaml.ScalarNode) -> float:
    if node.style is not None or not _FLOAT.fullmatch(node.value):
        raise ValueError(f"{_quoted(node)} is not a number")
    if not math.isfinite(float(node.value)):
        raise ValueError(f"{_short(node.value)} is not finite")
    return float(node.value)


def _read_text(node: yaml.ScalarNode) -> str:
    if node.style is None and _NOT_TEXT.fullmatch(node.value):
        raise ValueError(f"{_short(node.value)} is no text; write it in quotes if it is meant to be")
    text = str(node.value)
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text):
        raise ValueError(f"{_quoted(node)} holds control characters")
    return text


def _check_limits(value: Any, hint: Any, key: Key) -> None:
    limits = key.limits
    if isinstance(value, int | float):
        if value < limits.get("minimum", value):
            raise ValueError(f"{value} is too small")
        if "above" in limits and value <= limits["above"]:
            raise ValueError(f"{value} is too small")
        if value > limits.get("maximum", value):
            raise ValueError(f"{value} is too large")
    elif hint is str and "pattern" in limits and re.fullmatch(limits["pattern"], value) is None:
        raise ValueError(f"'{_short(value)}' is no name that files can have")


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in ("null", "~")


def _kind(node: yaml.Node | None) -> str:
    if isinstance(node, yaml.ScalarNode) and not (node.style is None and node.value == ""):
        return f"the value {_quoted(node)}"
    if isinstance(node, yaml.CollectionNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    return "empty"


def _quoted(node: yaml.ScalarNode) -> str:
    return f"'{_short(node.value)}'" + ("" if node.style is None else " (text in quotes)")


def _short(text: str | None) -> str:
    shown = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in (text or "")[:61])
    return shown if len(text or "") <= 60 else f"{shown[:57]}..."


def _capped(problems: list[str], source: str) -> list[str]:
    rest = len(problems) - MAX_PROBLEMS
    return problems if rest <= 0 else [*problems[:MAX_PROBLEMS], f"{source}: ... and {rest} more problems"]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _places_of(name: str) -> list[str]:
    """Return the dotted keys of a job whose last part is `name`."""
    top = section_keys(Job)
    sections = [key for key in top.values() if key.is_section]
    nested = [f"{key.name}.{name}" for key in sections if name in section_keys(key.hint)]
    return [name, *nested] if name in top else nested


# ---- building ----------------------------------------------------------------------------------------------


def _fill_from_preset(values: dict[str, Any], preset: str) -> set[str]:
    """Give keys that the file leaves open the preset's values, in place; return which."""
    filled = set()
    for section, keys in PRESETS[preset].items():
        into = values.setdefault(section, {})
        for name, value in keys.items():
            if name not in into:
                into[name] = value
                filled.add(f"{section}.{name}")
    return filled


def _build(section: type, values: Mapping[str, Any], path: str, unreadable: set[str], variant: int) -> Any:
    """Make a section's dataclass; unreadable keys get the variant-th guess."""
    arguments = {}
    for name, key in section_keys(section).items():
        where = _join(path, name)
        if where in unreadable:
            arguments[name] = _stand_in(key, where, unreadable, variant)
        elif name in values:
            value = values[name]
            nested = key.is_section and value is not None
            arguments[name] = _build(key.hint, value, where, unreadable, variant) if nested else value
    return section(**arguments)


def _stand_in(key: Key, path: str, unreadable: set[str], variant: int) -> Any:
    """Return the variant-th guess of a key's value: its default first, then values of many kinds."""
    if variant == 0 and not key.required:
        return key.field.default
    if key.is_section:
        inner = {f"{path}.{name}" for name in section_keys(key.hint)}
        return _build(key.hint, {}, path, unreadable | inner, variant)
    if typing.get_origin(key.hint) is Literal:
        choices = typing.get_args(key.hint)
        return choices[variant % len(choices)]
    if key.hint is str:
        return f"unreadable-{variant}"
    number = min(key.limits.get("minimum", 0) + variant + 1, key.limits.get("maximum", variant + 1))
    if typing.get_origin(key.hint) is tuple:
        items = range(variant + 1)
        if typing.get_origin(typing.get_args(key.hint)[0]) is Literal:
            return key.field.default
        return tuple(f"unreadable-{i}" if str in typing.get_args(key.hint) else number + i for i in items)
    if typing.get_origin(key.hint) is not None:
        return {f"unreadable-{variant}": number}
    return bool(variant % 2) if key.hint is bool else key.hint(number)


def _conflicts(values: Mapping[str, Any], unreadable: set[str]) -> list[tuple[str, str]]:
    """Return the impossible combinations that no value of the unreadable keys would resolve."""
    variants = range(STAND_INS if unreadable else 1)
    found = [list(conflicts(_build(Job, values, "", unreadable, variant))) for variant in variants]
    return [conflict for conflict in found[0] if all(conflict in others for others in found)]


# ---- writing and describing --------------------------------------------------------------------------------


def job_to_mapping(job: Job) -> dict[str, Any]:
    """Return the job as nested dicts and lists, every key there, ready for JSON."""
    mapping = _plain(job)
    assert isinstance(mapping, dict)
    return mapping


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def dump_job(job: Job) -> str:
    """Return YAML that `load_job` reads back to an equal job, every key spelled out."""
    return "\n".join(_lines(job_to_mapping(job), "")) + "\n"


def with_values(job: Job, values: Mapping[str, str], source: str) -> Job:
    """Return the job with some keys (`section.key`) set to what is written for them, in YAML.

    Raises:
        ConfigError: there is no such key, or it takes no such value.

    """
    mapping, problems = job_to_mapping(job), []
    section: Any
    for path, text in values.items():
        *sections, name = path.split(".")
        section = mapping
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            problems.append(f"{source}: {path}: is not a key; allowed: section.key, see jobs/README.md")
        elif "\n" in text:
            problems.append(f"{source}: {path}: has several lines; allowed: one, such as [10, 20] for a list")
        else:
            section[name] = _AsWritten(text)
    if problems:
        raise ConfigError(problems)
    words = ", ".join(f"{path}={text}" for path, text in values.items())
    return parse_job("\n".join(_lines(mapping, "")) + "\n", f"{source} with {words}" if words else source)


class _AsWritten(str):
    """YAML already."""

    __slots__ = ()


def _lines(mapping: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in mapping.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{_yaml(name)}:"
            yield from _lines(value, f"{indent}  ")
        else:
            yield f"{indent}{_yaml(name)}: {value if isinstance(value, _AsWritten) else _yaml(value)}"


def _yaml(value: Any) -> str:
    """Return a flow value; JSON is YAML but for characters that YAML takes for line breaks or refuses."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) and not _NOT_TEXT.fullmatch(value):
        return value
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


_ARTICLES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}


def describe(key: Key) -> str:
    """Return in words the values that a key takes, such as `an integer, at least 1`."""
    origin, arguments = typing.get_origin(key.hint), typing.get_args(key.hint)
    limits = _limits_in_words(key.limits)
    if key.is_section:
        words = f"a section of {', '.join(section_keys(key.hint))}"
    elif origin is Literal:
        words = "one of " + ", ".join(arguments)
    elif origin is tuple and typing.get_origin(arguments[0]) is Literal:
        words = f"a list out of {', '.join(typing.get_args(arguments[0]))}, or one"
    elif origin is tuple:
        words = f"a list of {_PLURALS[arguments[0]]}, or one" + limits.replace(", ", ", each ", 1)
    elif origin is not None:
        words = f"NAME: {_ARTICLES[arguments[1]]}{limits}, one or more"
    else:
        words = _ARTICLES[key.hint] + limits
    return words + (", or null" if key.optional else "")


def _limits_in_words(limits: Mapping[str, Any]) -> str:
    words = {"minimum": "at least {}", "above": "above {}", "maximum": "at most {}"}
    parts = [text.format(f"{limits[name]:,}") for name, text in words.items() if name in limits]
    return f", {' and '.join(parts)}" if parts else _pattern_in_words(limits)


def _pattern_in_words(limits: Mapping[str, Any]) -> str:
    return f" matching {limits['pattern']}" if "pattern" in limits else ""


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of job files, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "medscale job",
        **_section_schema(Job),
    }


def _section_schema(section: type) -> dict[str, Any]:
    keys = section_keys(section)
    required = [key.name for key in keys.values() if key.required]
    return {
        "type": "object",
        "description": " ".join((section.__doc__ or "").split()),
        "additionalProperties": False,
        "properties": {name: _key_schema(key) for name, key in keys.items()},
    } | ({"required": required} if required else {})


def _key_schema(key: Key) -> dict[str, Any]:
    if key.is_section:
        schema = _section_schema(key.hint)
        schema = {"anyOf": [schema, {"type": "null"}]} if key.optional else schema
    else:
        schema = _value_schema(key.hint, key.limits)
        if key.optional:
            schema["type"] = [schema["type"], "null"]
    schema["description"] = key.limits["help"]
    if not key.required and not (key.is_section and not key.optional):
        schema["default"] = _plain(key.field.default)
    return schema


def _value_schema(hint: Any, limits: Mapping[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    if origin is tuple:
        item = _value_schema(arguments[0], limits)
        return {"anyOf": [{"type": "array", "items": item}, item]}
    if origin is not None:
        numbers = _value_schema(arguments[1], {k: v for k, v in limits.items() if k != "pattern"})
        names = {"propertyNames": {"pattern": f"^(?:{limits['pattern']})$"}}
        return {"type": "object", "additionalProperties": numbers} | names
    schema: dict[str, Any] = {"type": {int: "integer", float: "number", bool: "boolean", str: "string"}[hint]}
    words = {"minimum": "minimum", "above": "exclusiveMinimum", "maximum": "maximum"}
    schema |= {words[name]: limits[name] for name in words if name in limits}
    return schema | ({"pattern": f"^(?:{limits['pattern']})$"} if "pattern" in limits else {})
