"""Every experiment that has runs, at its quick size."""

import sys

import pytest

from phasewatch import Trajectory

WITH_RUNS = [
    "induction_bump",
    "induction_substages",
    "cheap_monitor",
    "regression_stages",
    "grokking",
    "parity",
    "superposition",
]


def quick(script, name, folder, monkeypatch):
    """The experiment as its command line runs it."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--jobs", "1", "--runs", str(folder)])
    script(name).main()


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in WITH_RUNS[:3]), *WITH_RUNS[3:]],
)
def test_it_ends_with_a_table_of_runs_that_can_be_opened_and_makes_none_of_them_twice(
    name, script, monkeypatch, tmp_path, capsys
):
    quick(script, name, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert printed.startswith(f"# Output of `python experiments/{name}.py`")
    assert "\n| --- |" in printed
    results = tmp_path / f"{name}-quick"
    assert (results / f"{name}.md").read_text("utf-8") == printed.removesuffix("\n")

    kept = sorted((results / "points" / name).glob("*.jsonl"))
    assert kept
    for points in kept:
        run = results / points.stem
        assert len(Trajectory.read(points)) >= 5
        whole = [script("campaign").without_traces(point) for point in Trajectory.read(run / "points.jsonl")]
        assert [point.as_json() for point in whole] == [point.as_json() for point in Trajectory.read(points)]
        assert "<html" in (run / "report.html").read_text("utf-8")

    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    made |= {file: file.stat().st_mtime_ns for file in tmp_path.rglob("points.jsonl")}
    quick(script, name, tmp_path, monkeypatch)
    assert capsys.readouterr().out == printed
    for points in kept:  # as after a stop between the last point and its keeping
        points.unlink()
    quick(script, name, tmp_path, monkeypatch)
    assert capsys.readouterr().out == printed
    assert {file: file.stat().st_mtime_ns for file in made} == made


@pytest.mark.parametrize("name", WITH_RUNS)
def test_a_table_can_be_made_before_anything_is_measured(name, script, monkeypatch, tmp_path, capsys):
    none = ["--only", "none", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *none])
    script(name).main()
    assert capsys.readouterr().out.startswith(f"# Output of `python experiments/{name}.py`")
    assert not list(tmp_path.rglob("*.safetensors"))
