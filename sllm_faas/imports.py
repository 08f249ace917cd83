"""Which packages a module needs, read from its source without running it.

Used to choose the warmth layer an instance is forked from: a hint, so what cannot be read is left out and what
is imported dynamically is missed. Follows imports into the bundle's own modules, also inside functions; imports
that only a type checker sees do not count.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

_PLATFORM = frozenset({"sllm", "sllm_faas", "sllm_gateway", "sllm_invoker"})
MAX_MODULES = 2000


def imported_packages(root: Path, module: str) -> tuple[str, ...]:
    """Sorted top-level names that `module` and the modules under `root` it reaches import from elsewhere:
    neither the standard library, nor the platform, nor the bundle itself."""
    found: set[str] = set()
    seen: set[str] = set()
    todo = [module]
    while todo and len(seen) < MAX_MODULES:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        file = _file(root, name)
        if file is None:
            continue
        if "." in name:
            todo.append(name.rpartition(".")[0])  # importing a module runs its packages
        for wanted in _imports(file, name, is_package=file.name == "__init__.py"):
            if _file(root, wanted.partition(".")[0]) or (root / wanted.partition(".")[0]).is_dir():
                todo.append(wanted)
            else:
                found.add(wanted.partition(".")[0])
    return tuple(sorted(found - sys.stdlib_module_names - _PLATFORM))


def _file(root: Path, module: str) -> Path | None:
    base = root.joinpath(*module.split("."))
    for file in (base / "__init__.py", base.with_name(base.name + ".py")):
        if file.is_file():
            return file
    return None


def _imports(file: Path, module: str, *, is_package: bool) -> set[str]:
    """Absolute dotted names; for `from a import b` both `a` and `a.b`, as `b` may be a module."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return set()  # the import check will say what is wrong with it
    found: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.update(name for alias in node.names for name in (base, f"{base}.{alias.name}") if base)
        todo.extend(ast.iter_child_nodes(node))
    return found
