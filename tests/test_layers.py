"""The shape of the package: imports only point down, no cycles, and no way for data to become code."""

import ast
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "medscale"

#: the import table: a module may import from layers below its own, and from its own without cycles
LAYERS = (
    ("errors", "location", "storage", "manifest", "seed", "logs"),
    ("config", "jobfile", "options", "workers", "pulse", "cluster"),
    ("graph",),
    ("batches",),
    ("model",),
    ("loss", "objective"),
    ("distributed", "sharding", "traffic", "optimizer"),
    ("pieces", "checkpoint", "ranking", "metrics", "telemetry", "finite", "validation", "lineage"),
    ("results", "markup", "figures", "places", "namehash", "tierfiles", "shardfiles", "versions"),
    (
        "trainer", "prepare", "evaluate", "split", "onnx_model", "search_index", "formats", "fidelity", "memory",
        "pace", "capacity", "plan", "doctor", "answers", "baselines",
    ),
    ("tiers", "page", "report"),
    ("launch", "readers", "evaluators", "extend", "train", "search", "export", "predict", "cli"),
)  # fmt: skip
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}

RUNTIME_MAY_IMPORT = {"numpy", "medscale.errors", "medscale.manifest", "medscale.storage"}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "base", "misc", "logging", "types", "typing", "random", "io"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES: Mapping[str, ast.Module] = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a module imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in TREES else node.module


def part_of(module: str) -> str:
    """Return the row of the import table that a module stands in: its first name below the package."""
    return module.split(".")[1] if "." in module else ""


def own_imports(module: str) -> set[str]:
    return {name for name in imports_of(TREES[module]) if name.split(".")[0] == "medscale"} - {module}


def test_every_module_has_a_layer() -> None:
    parts = {part_of(module) for module in TREES} - {"", "runtime"}
    assert parts - LAYER_OF.keys() == set()


@pytest.mark.parametrize("module", [m for m in sorted(TREES) if part_of(m) not in ("", "runtime")])
def test_imports_point_down(module: str) -> None:
    part = part_of(module)
    for imported in own_imports(module) - {"medscale"}:
        target = part_of(imported)
        # Reading exported tiers is everyone's to use: it needs numpy alone.
        assert target == "runtime" or LAYER_OF[target] <= LAYER_OF[part], f"{module} imports {imported}"


def test_package_itself_imports_nothing() -> None:
    assert list(imports_of(TREES["medscale"])) == []


def test_no_cycles() -> None:
    graph = {module: own_imports(module) for module in TREES}
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert graph == {}, "these modules import each other in a circle, or stand above one that does"


def test_runtime_needs_numpy_alone() -> None:
    for module in (m for m in TREES if part_of(m) == "runtime"):
        for imported in imports_of(TREES[module]):
            top = imported.split(".")[0]
            allowed = top in sys.stdlib_module_names or top in RUNTIME_MAY_IMPORT
            below = imported == "medscale" or imported.startswith("medscale.runtime")
            at_call = top == "pyarrow" and not _at_import(TREES[module], "pyarrow")
            assert allowed or below or at_call or imported in RUNTIME_MAY_IMPORT, f"{module} imports {imported}"


def _at_import(tree: ast.Module, name: str) -> bool:
    """Whether importing the module imports `name`: outside functions and TYPE_CHECKING blocks."""
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    flat = [node for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return any(imported.split(".")[0] == name for node in flat for imported in imports_of(node))


def test_no_drawer_for_odds_and_ends() -> None:
    names = {part for module in TREES for part in module.split(".")}
    assert names & FORBIDDEN_NAMES == set()


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def forbidden(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield each way by which data could become code (or YAML could be read loosely) in a module."""
    for imported in imports_of(tree):
        top = imported.split(".")[0]
        if top in FORBIDDEN_MODULES or (top in ("yaml", "ruamel") and module != "medscale.jobfile"):
            yield f"imports {imported}"
    for name, call in calls(tree):
        last = name.rpartition(".")[2]
        if name in ("eval", "exec", "compile", "__import__") or name in ("os.system", "os.popen"):
            yield f"calls {name}"
        if last in (
            "full_load",
            "unsafe_load",
            "safe_load",
            "load_all",
            "UnsafeLoader",
            "FullLoader",
            "Loader",
        ):
            yield f"calls {name}"
        if name.startswith("yaml.") and last not in ("parse", "compose"):
            yield f"calls {name}"
        for keyword in call.keywords:
            value = ast.unparse(keyword.value)
            if (keyword.arg, value) in {
                ("weights_only", "False"),
                ("allow_pickle", "True"),
                ("shell", "True"),
            }:
                yield f"calls {name} with {keyword.arg}={value}"


@pytest.mark.parametrize("module", sorted(TREES))
def test_data_never_becomes_code(module: str) -> None:
    assert list(forbidden(module, TREES[module])) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import yaml", "eval(x)", "exec(x)", "os.system(x)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "yaml.safe_load(x)",
        "yaml.load(text, Loader)", "def f():\n    import dill", "subprocess.run('x', shell=True)",
    ],
)  # fmt: skip
def test_the_test_finds_each_forbidden_thing(source: str) -> None:
    assert list(forbidden("medscale.elsewhere", ast.parse(source)))


def test_public_names_are_declared_and_exist() -> None:
    for module, tree in TREES.items():
        if module.endswith("errors") or module == "medscale":
            continue
        declared = [
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        empty = not any(not isinstance(node, ast.Expr) for node in tree.body)
        assert declared or empty, f"{module} has no __all__"
        if declared:
            names = ast.literal_eval(declared[0])
            assert len(names) == len(set(names))
            assert set(names) <= set(itertools.chain.from_iterable(map(defined_names, tree.body))), module


def defined_names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield from map(ast.unparse, target.elts if isinstance(target, ast.Tuple) else [target])
    elif isinstance(node, ast.AnnAssign):
        yield ast.unparse(node.target)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
