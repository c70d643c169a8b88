"""The examples in docstrings run, and every public function and class has one."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import phasewatch as pw

ROOT = Path(__file__).parents[1]
FOLDERS = {"phasewatch.monitor": "monitor", "phasewatch.callbacks": "callbacks", "phasewatch.toy_tasks": "toy_tasks"}


def with_examples() -> list[str]:
    """The modules whose docstrings hold examples, found without importing any."""
    found = []
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                inside = file.relative_to(ROOT / folder).with_suffix("").parts
                found.append(".".join([package, *(part for part in inside if part != "__init__")]))
    return found


@pytest.mark.parametrize("name", with_examples())
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("name", pw.__all__)
def test_every_public_name_has_an_example(name):
    public = getattr(pw, name)
    source = Path(importlib.import_module(public.__module__).__file__).read_text(encoding="utf-8")
    documented = [n for n in ast.walk(ast.parse(source)) if getattr(n, "name", None) == public.__name__]
    assert documented
    if isinstance(public, type) and issubclass(public, Exception):
        return  # the others raise it
    assert ">>> " in ast.get_docstring(documented[0]), f"pw.{name} has no example in its docstring"
