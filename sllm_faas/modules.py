"""Names of modules and the directories they are imported from: how a file becomes `root` + `module`.

The bundle, the SDK and the payload codec must agree on one name for the user's code, also when it runs as a
script, where Python calls it `__main__`. Standard library only; imports nothing that it is asked about.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def locate(file: Path) -> tuple[Path, str]:
    """(root, module) of a Python file: the root is the file's directory, or the parent of its top package.

    `/w/app.py` is module `app` in `/w`; `/w/pkg/app.py` beside an `__init__.py` is `pkg.app` in `/w`.
    """
    file = file.resolve()
    parts = [] if file.name == "__init__.py" else [file.stem]
    root = file.parent
    while (root / "__init__.py").is_file() and root.parent != root:
        parts.insert(0, root.name)
        root = root.parent
    return root, ".".join(parts)


def main_name() -> str:
    """The importable name of the module running as `__main__`, or '' where there is none (a prompt, `-c`)."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return str(spec.name).removesuffix(".__main__")
    file = getattr(main, "__file__", None)
    from pathlib import Path  # with what it imports a tenth of `import sllm`

    return locate(Path(file))[1] if file else ""


def public_name(module: str) -> str:
    """`module`, or the importable name of the script when it is `__main__`."""
    return (main_name() or module) if module == "__main__" else module


def find(module: str, qualname: str) -> object | None:
    """The object `qualname` of an already imported module (or of the script of that name), else None."""
    loaded = sys.modules.get(module)
    if loaded is None and module and module == main_name():
        loaded = sys.modules.get("__main__")
    found: object | None = loaded
    for part in qualname.split("."):
        if found is None:
            return None
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return found
