"""From what a person names on the command line to an `App`, and from an `App` to what is deployed.

    load_app("path/to/app.py")            the file's directory is the root, or the parent of its top package
    load_app("path/to/app.py:other")      where the file has several apps
    load_app("pkg.app")                   a module found from the current directory

Importing runs the user's code, in this process. Every failure is a BadSpec or ImportFailed that says what to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sllm._app import App
from sllm._options import did_you_mean
from sllm_faas.bundle import Bundle, pack
from sllm_faas.errors import BadSpec, ImportFailed
from sllm_faas.imports import imported_packages
from sllm_faas.modules import locate
from sllm_faas.spec import AppSpec
from sllm_faas.wire.exceptions import format_traceback


@dataclass(frozen=True, slots=True)
class Loaded:
    """An app, the directory its source is in, and its module as imported from there."""

    app: App
    root: Path
    module: str


def load_app(named: str) -> Loaded:
    """Import what `named` says and find its app. Raises BadSpec, and ImportFailed with the user's traceback."""
    where, _, variable = named.partition(":")
    file = _find_file(where)
    root, module = locate(file)
    loaded = _import(root, module, file)
    return Loaded(_choose(loaded, variable, where), root, module)


def build(loaded: Loaded) -> tuple[AppSpec, Bundle | None]:
    """What to deploy: the spec, and the source (None where no function has code). Raises BadSpec, TooLarge."""
    if all(spec.kind == "llm" for spec in loaded.app.functions):
        return loaded.app.spec(), None
    bundle = pack(loaded.root)
    for spec in loaded.app.functions:
        path = spec.module.replace(".", "/")
        if spec.kind != "llm" and not {f"{path}.py", f"{path}/__init__.py"} & set(bundle.files):
            raise BadSpec(
                f"function {spec.name!r} is in module {spec.module!r}, which is not part of the source in "
                f"{loaded.root}.",
                hint="Is it named in .sllmignore, or outside of that directory?",
            )
    libs = imported_packages(loaded.root, loaded.module)
    return loaded.app.spec(bundle.digest, libs), bundle


def _find_file(where: str) -> Path:
    path = Path(where)
    if where.endswith(".py") or path.is_file():
        if not path.is_file():
            near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.py")])
            raise BadSpec(f"there is no file {where}.", hint=near)
        if path.suffix != ".py" or "." in path.stem:
            raise BadSpec(f"{where} cannot be imported; allowed: a file NAME.py without further dots in its name.")
        return path
    if path.is_dir():
        raise BadSpec(f"{where} is a directory; allowed: a Python file or module.", hint=f"Try {path / 'app.py'}.")
    if not all(part.isidentifier() for part in where.split(".")):
        raise BadSpec(f"{where!r} is neither a file nor a module name; allowed: path/to/app.py or package.module.")
    module = Path.cwd().joinpath(*where.split("."))
    for file in (module.with_name(module.name + ".py"), module / "__init__.py"):
        if file.is_file():
            return file
    raise BadSpec(f"there is no module {where!r} in {Path.cwd()}.", hint="Name the file: path/to/app.py.")


def _import(root: Path, module: str, file: Path) -> ModuleType:
    """The module imported from `file`, whatever was imported under its name before."""
    _forget(root)
    sys.path[:] = [str(root), *(entry for entry in sys.path if entry != str(root))]
    importlib.invalidate_caches()
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise ImportFailed(
            f"{file} needs the module {missing!r}, which is not installed here.",
            hint=f"Install it: pip install {missing.partition('.')[0]}. Functions run in the server's environment: "
            "install it there too.",
            param=missing,
            traceback=format_traceback(error, str(root)),
        ) from error
    except (Exception, SystemExit) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise ImportFailed(
            f"{file} failed to import: {type(error).__name__}: {line}",
            traceback=format_traceback(error, str(root)),
        ) from error
    found = getattr(loaded, "__file__", None)
    if not found or Path(found).resolve() != file.resolve():
        raise BadSpec(
            f"module {module!r} of {file} is hidden by another one of that name ({found or 'built in'}).",
            hint="Rename the file.",
        )
    return loaded


_PLATFORM = frozenset({"sllm", "sllm_faas", "sllm_gateway", "sllm_invoker"})
_roots: set[Path] = set()
"""Directories that apps were loaded from before."""


def _forget(root: Path) -> None:
    """Drop what an earlier load left behind: all modules of this root, to see their files as they are now, and
    other roots' modules whose names would hide this root's."""
    for name, loaded in list(sys.modules.items()):
        file, top = getattr(loaded, "__file__", None), name.partition(".")[0]
        if not file or top in _PLATFORM or name == "__main__" or "site-packages" in Path(file).parts:
            continue
        if any(Path(file).is_relative_to(earlier) for earlier in _roots) and (
            Path(file).is_relative_to(root) or (root / top).is_dir() or (root / f"{top}.py").is_file()
        ):
            del sys.modules[name]
    _roots.add(root)


def _choose(module: ModuleType, variable: str, where: str) -> App:
    apps = {name: value for name, value in vars(module).items() if isinstance(value, App)}
    if variable:
        if variable not in apps:
            near = did_you_mean(variable, list(apps)) or f"It has: {', '.join(apps) or 'none'}."
            raise BadSpec(f"{where} has no app {variable!r}.", hint=near)
        return apps[variable]
    distinct = list({id(app): app for app in apps.values()}.values())
    if not distinct:
        raise BadSpec(f"{where} has no app.", hint='Make one at its top level: app = sllm.App("name").')
    if len(distinct) > 1:
        raise BadSpec(
            f"{where} has {len(distinct)} apps ({', '.join(apps)}); one at a time can be deployed or run.",
            hint=f"Name it: {where}:{next(iter(apps))}.",
        )
    return distinct[0]
