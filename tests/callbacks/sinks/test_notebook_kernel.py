"""A notebook that a real kernel of Jupyter runs: what its cells show, and a plot that grows below one of them."""

import pytest

nbformat = pytest.importorskip("nbformat", reason="runs a notebook: pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="runs a notebook: pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="runs a notebook: pip install nbclient ipykernel")

pytestmark = pytest.mark.slow

TRAINING = """
import torch, phasewatch as pw
from tiny_run import loss, make_data, make_model, make_probe
model = make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
of = dict(run="run", at=pw.every(1), sinks=[pw.LivePlot()], measure={measure!r})
with pw.PhaseMonitor(model, make_probe(), **of) as monitor:
    for step in range(1, 9):
        optimizer.zero_grad()
        loss(model, make_data()).backward()
        optimizer.step()
        monitor(step)
"""
SHOWN = ("monitor.trajectory", "monitor.trajectory[-1].llc", "pw.find_transitions(published)[0]", "published.plot()")
PUBLISHED = "published = pw.Trajectory.read({path!r})"


@pytest.mark.parametrize("measure", ["inline", "background"])
def test_a_notebook_shows_its_training(measure, tmp_path, monkeypatch, request):
    table = str(request.config.rootpath / "tests/data/published/lr_seed1.csv")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath / "tests"), prepend=":")
    cells = [TRAINING.format(measure=measure), PUBLISHED.format(path=table), *SHOWN]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    training, _, trajectory, estimate, transition, plot = (cell.outputs for cell in notebook.cells)
    (live,) = [output for output in training if output.output_type == "display_data"]  # drawn again in its place
    assert "Trajectory of 8 points, steps 1 to 8" in live.data["text/html"]
    assert "<img" in live.data["text/html"]
    assert not [output for output in training if output.output_type == "error"]
    for outputs, words in (
        (trajectory, "Trajectory of 8 points"),
        (estimate, "λ̂ = "),
        (transition, "a type A transition"),
    ):
        (shown,) = [output for output in outputs if output.output_type == "execute_result"]
        assert words in shown.data["text/html"]
        assert "http" not in shown.data["text/html"]
    (picture,) = plot
    assert "<img" in picture.data["text/html"]
