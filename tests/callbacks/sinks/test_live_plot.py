"""The live plot, in IPython's own shell with what it would send to a notebook kept."""

import json
import subprocess
import sys

import pytest

from phasewatch.callbacks.sinks.live_plot import LivePlot
from phasewatch.monitor.errors import PhasewatchError

IN_A_NOTEBOOK = """
import json, os, sys, tempfile, threading
os.environ["IPYTHONDIR"] = tempfile.mkdtemp()
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.display_pub = CapturingDisplayPublisher()
import phasewatch as pw
from phasewatch.monitor.runs.sink import send
steps = [1, 10, 100, 1000, 2000, 3000]
points = pw.Trajectory.from_values(steps, loss=[3, 2, 1.5, 1.4, 1.3, 1.2], llc=[1, 9, 20, 21, 22, 23])
plot = pw.LivePlot()
plot.attach(lambda: points[:2])
for point in points[:2]:
    plot.write(point)
sent = len(shell.display_pub.outputs)
print(send(points, pw.find_transitions(points), plot))
print(json.dumps([
    {"sent": sent},
    *({"id": o["transient"]["display_id"], "update": bool(o.get("update")), "html": o["data"]["text/html"]}
      for o in shell.display_pub.outputs)
]))
"""


def test_one_display_is_updated_as_points_come_and_at_the_end():
    pytest.importorskip("IPython")
    done = subprocess.run([sys.executable, "-c", IN_A_NOTEBOOK], capture_output=True, text=True, check=True)
    content, shown = done.stdout.splitlines()
    (first, *outputs), sent = json.loads(shown), 2
    assert content == "True"
    assert first == {"sent": sent}  # the first display, and one drawing of two points that came at once
    assert len({output["id"] for output in outputs}) == 1
    assert [output["update"] for output in outputs] == [False, *[True] * (len(outputs) - 1)]
    assert "No point yet." in outputs[0]["html"]
    assert "Trajectory of 2 points" in outputs[1]["html"]
    assert "Trajectory of 6 points" in outputs[-1]["html"]
    assert "<img" in outputs[-1]["html"]


def test_outside_of_a_notebook_it_is_a_sentence():
    pytest.importorskip("IPython")
    with pytest.raises(PhasewatchError, match="draws below a cell of a notebook, and this is none"):
        LivePlot()


def test_without_ipython_it_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setitem(sys.modules, "IPython.core.getipython", None)
    with pytest.raises(PhasewatchError, match=r"LivePlot\(\) needs the package IPython.*'phasewatch\[notebook\]'"):
        LivePlot()
