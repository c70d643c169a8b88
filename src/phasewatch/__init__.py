"""phasewatch tells when a model in training reorganised itself, and how.

A training run leaves snapshots; a probe turns a snapshot into a point, its loss and an estimate of its local learning
coefficient; points in order make a trajectory; between a trajectory's plateaus lie its transitions; sinks write
points and transitions down.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_FROM = [node for node in _STUB.body if isinstance(node, ast.ImportFrom) and node.module != "phasewatch.monitor"]
_HOME = {alias.name: node.module for node in _FROM for alias in node.names}  # emergence is a module, and has no home

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that reading a run never waits for torch."""
    if name == "emergence":
        return importlib.import_module("phasewatch.monitor.emergence")
    if name not in _HOME:
        raise AttributeError(f"module 'phasewatch' has no attribute {name!r}")
    try:
        home = importlib.import_module(str(_HOME[name]))
    except ModuleNotFoundError as error:
        from phasewatch.monitor.errors import missing_package

        raise missing_package(error, f"phasewatch.{name}") from error
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
