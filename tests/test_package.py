"""What is imported when, and what a built wheel holds."""

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import phasewatch

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]


def python(*arguments, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=True, **options)


def folder(package: str) -> Path:
    """Where a package lies: its own entry in package-dir, or below that of its parent."""
    if package in FOLDERS:
        return ROOT / FOLDERS[package]
    parent, _, name = package.rpartition(".")
    return folder(parent) / name


def modules() -> set[str]:
    """Every module of the packages as a path in the wheel."""
    return {f"{package.replace('.', '/')}/{file.name}" for package in PACKAGES for file in folder(package).glob("*.py")}


# Names


@pytest.mark.parametrize("name", phasewatch.__all__)
def test_every_public_name_resolves_to_what_it_says(name):
    found = getattr(phasewatch, name)
    assert found.__name__ == name
    assert found.__module__ == phasewatch._HOME[name]
    assert found.__doc__


def test_the_public_names_are_those_of_the_stub():
    assert phasewatch.__all__ == sorted(phasewatch._HOME)
    assert {"Probe", "PhaseMonitor", "SGLD", "Langevin", "find_transitions", "replay"} <= set(phasewatch.__all__)
    assert set(phasewatch.__all__) <= set(dir(phasewatch))


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"module 'phasewatch' has no attribute 'Snapshoot'"):
        phasewatch.Snapshoot  # noqa: B018


def test_importing_phasewatch_is_light():
    code = "import sys, phasewatch; print(sorted(m for m in sys.modules if '.' not in m))"
    imported = set(ast.literal_eval(python("-c", code).stdout))
    assert "phasewatch" in imported
    heavy = {"torch", "numpy", "scipy", "wandb", "transformer_lens", "devinterp", "matplotlib", "safetensors", "typer"}
    assert not heavy & imported


def test_reading_a_run_needs_no_torch():
    code = (
        "import sys, phasewatch as pw; pw.find_transitions(pw.Trajectory.read(sys.argv[1])); "
        "print(sorted(m for m in sys.modules if '.' not in m))"
    )
    imported = set(ast.literal_eval(python("-c", code, ROOT / "tests/data/published/lr_seed0.csv").stdout))
    assert not {"torch", "wandb", "transformer_lens", "devinterp", "matplotlib", "safetensors"} & imported


# The wheel


def test_every_folder_with_modules_is_a_package():
    listed = {folder(package).resolve() for package in PACKAGES}
    there = {
        file.parent.resolve()
        for top in ("src", "monitor", "callbacks", "toy_tasks")
        for file in (ROOT / top).rglob("*.py")
    }
    assert listed == there
    assert set(FOLDERS) <= set(PACKAGES)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that nothing is left in the tree."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "src", "monitor", "callbacks", "toy_tasks"):
        (copy / name).symlink_to(ROOT / name)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == modules() | {
        "phasewatch/py.typed",
        "phasewatch/__init__.pyi",
        "phasewatch/callbacks/sinks/report.html.j2",
        "phasewatch/callbacks/sinks/report.js",
        "phasewatch/monitor/emergence/verdict.json",
    }


def test_the_wheel_takes_no_top_level_name_but_its_own(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"phasewatch"}


def test_the_wheel_offers_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "phasewatch = phasewatch.cli:main" in archive.read(entry_points).decode()


def test_the_wheel_is_imported_and_used(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    # -S leaves out the .pth files, and with them the editable install; the folders of packages are added by hand.
    code = (
        "import sys; sys.path += sys.argv[1:]; "
        "import phasewatch.monitor.trajectories.trajectory, phasewatch.callbacks.sinks.report; "
        "print(phasewatch.__file__, phasewatch.monitor.__file__, phasewatch.callbacks.sinks.report.__file__); "
        "run = phasewatch.write_report(phasewatch.callbacks.sinks.report.Path('run')); print(run)"
    )
    (tmp_path / "run").mkdir()
    points = phasewatch.Trajectory.read(ROOT / "tests/data/published/lr_seed0.csv")
    points.write(tmp_path / "run" / "points.jsonl")
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    done = python(
        "-S", "-I", "-c", code, tmp_path / "installed", *packages, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}
    )
    files, run = done.stdout.splitlines()
    assert all(file.startswith(str(tmp_path / "installed")) for file in files.split())
    assert "</html>" in (tmp_path / run).read_text()
