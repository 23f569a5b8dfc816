"""The Python files of an export, made from the files of this package."""

from __future__ import annotations

import ast
from pathlib import Path

CONFIGURATION_FILE = "configuration_longspan.py"
MODELING_FILE = "modeling_longspan.py"
PARTS = ("mixers_longspan.py", "recurrent_longspan.py", "stack_longspan.py", MODELING_FILE)
_PACKAGE = "longspan.modeling.hf."
_FOLDER = Path(__file__).parent


def python_files() -> dict[str, str]:
    """File name -> text: one configuration file and one modeling file that import only torch and transformers."""
    parts = [(_FOLDER / name).read_text(encoding="utf-8") for name in PARTS]
    configuration = (_FOLDER / CONFIGURATION_FILE).read_text(encoding="utf-8")
    return {CONFIGURATION_FILE: configuration, MODELING_FILE: join_modules(parts)}


def join_modules(parts: list[str]) -> str:
    """One module that holds what `parts` define, in their order, with all their imports at its head.

    Its text is that of the last part, then those of the others. Imports of parts fall away; other imports of this
    package become imports of the file beside it.
    """
    trees = [ast.parse(part) for part in parts]
    imports = [node for tree in trees for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    texts = [ast.get_docstring(tree) or "" for tree in (trees[-1], *trees[:-1])]
    docstring = "\n\n".join([texts[0], *(text.partition("\n\n")[2] for text in texts[1:])]).strip()
    bodies = [_after_imports(part, tree) for part, tree in zip(parts, trees, strict=True)]
    return f'"""{docstring}\n"""\n\n{_import_lines(imports)}\n\n' + "\n\n\n".join(bodies) + "\n"


def _after_imports(part: str, tree: ast.Module) -> str:
    last = max(node.end_lineno or 0 for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    return "\n".join(part.splitlines()[last:]).strip("\n")


def _import_lines(imports: list[ast.Import | ast.ImportFrom]) -> str:
    """Import statements, each module once, in three groups: standard library, packages, the file beside."""
    whole: set[str] = set()
    names: dict[str, set[str]] = {}
    for node in imports:
        if isinstance(node, ast.Import):
            whole.update(ast.unparse(node).split("\n"))
        elif node.module is not None:
            names.setdefault(node.module, set()).update(alias.name for alias in node.names)
    joined_parts = {_PACKAGE + name.removesuffix(".py") for name in PARTS}
    froms = [
        f"from {module.replace(_PACKAGE, '.')} import {', '.join(sorted(found))}"
        for module, found in names.items()
        if module not in joined_parts
    ]
    groups: list[list[str]] = [[], [], []]
    for line in [*sorted(whole), *sorted(froms)]:
        package = line.split()[1].split(".")[0]
        groups[2 if not package else 1 if package in ("torch", "transformers") else 0].append(line)
    return "\n\n".join("\n".join(group) for group in groups)
