"""The rooms' import arrows, third-party owners, sizes and docstrings, read from the source with `ast`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("trainer", "modeling", "data_pipeline", "cluster", "kernels")
ARROWS = {
    "trainer": {"modeling", "data_pipeline", "cluster", "kernels"},
    "modeling": {"kernels"},
    "data_pipeline": set(),
    "cluster": set(),
    "kernels": set(),
}
# module -> files or folders (with trailing slash) that alone may import it
OWNERS = {
    "deepspeed": ("trainer/engine.py",),
    "megatron": ("cluster/mesh.py", "modeling/tensor_parallel.py"),
    "ray": ("cluster/",),
    "mlflow": ("trainer/tracking.py",),
    "webdataset": ("data_pipeline/",),
    "transformers": ("modeling/hf/", "trainer/export.py"),
}
# answer before torch is loaded: the command line, recipes and every configuration schema
TORCH_FREE = (
    "longspan/__init__.py",
    "longspan/errors.py",
    "trainer/cli.py",
    "trainer/config.py",
    "trainer/recipes.py",
    "modeling/config.py",
    "data_pipeline/config.py",
    "data_pipeline/recipe.py",
    "cluster/config.py",
    "trainer/evaluation/spec.py",
)
MAX_LINES = {"kernels": 600, "tests": 800}
MAX_FUNCTION_LINES = 80
UNSAFE_CALLS = re.compile(
    r"\b(pickle\.loads?|(?<!safetensors\.)torch\.load|\.extractall|shell=True|yaml\.load\(|yaml\.unsafe_load|os\.system)\b"
)


def python_files(*folders: str) -> list[Path]:
    return sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts
    )


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Every module named in an import statement, function-level ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import; write longspan.room.module"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


ROOM_FILES = python_files(*ROOMS)
SOURCES = {
    relative(path): path.read_text(encoding="utf-8")
    for path in [*ROOM_FILES, *sorted((ROOT / "longspan").glob("*.py"))]
}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}


def arrow_problems(name: str, tree: ast.AST) -> list[str]:
    """Imports of file `name` that point to a room it may not see."""
    room = name.split("/")[0]
    problems = []
    for module in imported_modules(tree):
        parts = module.split(".")
        if parts[0] in (*ROOMS, "configs", "tests"):
            problems.append(f"{name}: imports {module}; write longspan.{module}")
        elif parts[0] == "longspan" and len(parts) > 1 and parts[1] in ROOMS:
            if room == "longspan" or (parts[1] != room and parts[1] not in ARROWS[room]):
                problems.append(f"{name}: {room} may not import {module}")
        elif parts[:2] == ["longspan", "configs"]:
            problems.append(f"{name}: nobody imports from configs")
    return problems


def module_name(name: str) -> str:
    stem = name.removesuffix(".py").removesuffix("/__init__")
    return "longspan." + stem.replace("/", ".") if not name.startswith("longspan/") else stem.replace("/", ".")


def import_graph() -> dict[str, set[str]]:
    modules = {module_name(name) for name in TREES}
    return {
        module_name(name): {target for target in imported_modules(tree) if target in modules} - {module_name(name)}
        for name, tree in TREES.items()
    }


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """One import cycle, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            cycle = visit(target, [*path, node])
            if cycle:
                return cycle
        done.add(node)
        return []

    return next((cycle for cycle in (visit(node, []) for node in sorted(graph)) if cycle), [])


def test_imports_follow_the_arrows() -> None:
    problems = [problem for name, tree in TREES.items() for problem in arrow_problems(name, tree)]
    assert not problems, "\n".join(problems)


def test_a_wrong_arrow_is_seen() -> None:
    assert arrow_problems("kernels/x.py", ast.parse("def f():\n    from longspan.modeling import state"))
    assert arrow_problems("modeling/x.py", ast.parse("import kernels.window_attention"))


def test_no_import_cycle() -> None:
    assert not find_cycle(import_graph())


def test_a_cycle_is_seen() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_third_party_packages_stay_with_their_owner() -> None:
    problems = [
        f"{name}: imports {module}; only {', '.join(OWNERS[module.split('.')[0]])} may"
        for name, tree in TREES.items()
        for module in imported_modules(tree)
        if module.split(".")[0] in OWNERS and not name.startswith(OWNERS[module.split(".")[0]])
    ]
    assert not problems, "\n".join(sorted(set(problems)))


@pytest.mark.parametrize("name", TORCH_FREE)
def test_schemas_and_command_line_import_no_torch(name: str) -> None:
    graph, heavy = import_graph(), {"torch", "deepspeed", "megatron", "ray", "mlflow", "transformers", "numpy"}
    seen, todo = set(), [module_name(name)]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        todo += graph.get(module, set())
    direct = {
        f"{name}: {target}"
        for name, tree in TREES.items()
        if module_name(name) in seen
        for target in imported_modules(tree)
        if target.split(".")[0] in heavy
    }
    assert not direct


def test_files_are_small() -> None:
    long = []
    for path in [*ROOM_FILES, *python_files("tests", "benchmarks")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = MAX_LINES.get(relative(path).split("/")[0], 400)
        if lines > limit:
            long.append(f"{relative(path)}: {lines} lines, limit {limit}")
    assert not long, "\n".join(long)


def test_functions_are_small() -> None:
    long = [
        f"{name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines, limit {MAX_FUNCTION_LINES}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


def test_public_names_have_docstrings() -> None:
    missing = [
        f"{name}:{node.lineno} {full}"  # type: ignore[attr-defined]
        for name, tree in TREES.items()
        for full, node in [*public_definitions(tree.body)]
        if ast.get_docstring(node) is None  # type: ignore[arg-type]
    ]
    missing += [f"{name}: no module docstring" for name, tree in TREES.items() if ast.get_docstring(tree) is None]
    assert not missing, "\n".join(missing)


def test_nothing_that_runs_code_from_files() -> None:
    problems = [
        f"{name}:{number} {line.strip()}"
        for name, text in SOURCES.items()
        for number, line in enumerate(text.splitlines(), 1)
        if UNSAFE_CALLS.search(line) and not line.lstrip().startswith("#")
    ]
    assert not problems, "\n".join(problems)


def test_top_level_folders_are_the_rooms() -> None:
    allowed = {*ROOMS, "configs", "tests", "longspan", "docs", "benchmarks"}
    tracked = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    strays = tracked - allowed - {"runs", "corpora", "build", "dist"} - {n for n in tracked if n.endswith(".egg-info")}
    assert not strays - {"__pycache__"}
