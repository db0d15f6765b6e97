"""Importing big libraries cheaply: no garbage collection meanwhile, and a package's front only where it is needed."""

from __future__ import annotations

import ast
import gc
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

BIG = 100  # modules; a library that imports fewer is not worth setting apart
PROBES = ("__version__", "__all__")  # the only double-underscore names for which a front has to run


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector away from imports in the block: what they make stays, so it finds nothing.

    Each of its passes walks over all that was imported before. Measured: importing transformers' Llama takes
    3.0 s of CPU with it paused and 3.8 s without. What was imported is then set apart for good, so that no later
    pass walks over it either (0.2 s each).
    """
    enabled, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - known > BIG:
            gc.freeze()
        if enabled:
            gc.enable()


def defer_front(name: str) -> None:
    """Make a package importable whose `__init__` runs when somebody first asks it for a name.

    Its submodules can be imported at once. Nothing changes for a package that is imported already. Raises
    ModuleNotFoundError.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def run_front(attribute: str) -> Any:
        if attribute.startswith("__") and attribute not in PROBES:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        del package.__dict__["__getattr__"]
        try:
            loader.exec_module(package)
        except BaseException:
            package.__dict__["__getattr__"] = run_front
            raise
        return getattr(package, attribute)

    package.__dict__["__getattr__"] = run_front
    sys.modules[name] = package


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def read_constant(module: str, name: str) -> Any:
    """Return a literal that a module assigns at its top, read from its source without importing the module.

    Raises LookupError where it holds no such literal.
    """
    package, _, leaf = module.rpartition(".")
    parent: ModuleType = sys.modules[package]
    for folder in parent.__path__:
        file = Path(folder) / f"{leaf}.py"
        for node in ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                with suppress(ValueError):
                    return ast.literal_eval(node.value)
    raise LookupError(f"{module} assigns no literal to {name}")
