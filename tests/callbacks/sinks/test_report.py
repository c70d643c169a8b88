import base64
import copy
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import escape

from phasewatch.callbacks.sinks import report
from phasewatch.callbacks.sinks.report import MAX_TRACES, write_report
from phasewatch.monitor.emergence.watching import score_metrics
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.trajectories.changes import Change, Transition
from phasewatch.monitor.trajectories.kinds import Kind
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions

UP = Transition(
    Kind.A, "llc", 0, 1000, (0, 9), (990, 1010), 0.99999, False,
    {"loss": Change(4.26, 1.89, 0.1, "down"), "llc": Change(12.6, 169.7, 0.9, "up")},
)  # fmt: skip
DOWN = Transition(
    Kind.B, "llc", 1000, 40404, (985, 1200), (38181, 41414), 0.981, True,
    {"loss": Change(1.89, 1.78, 0.1, "down"), "llc": Change(169.7, 112.8, 1.1, "down")}, 14, 12,
)  # fmt: skip

VOID = {"meta", "img", "line", "path", "br"}
SILENT = {"style", "script"}


class Page(HTMLParser):
    """The elements of a page, with a check that every one that was opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in SILENT:
            self.words.append(data)

    def tags(self, name):
        return [attrs for tag, attrs in self.elements if tag == name]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def a_point(step, llc=142.5, *, loss=1.945, error=0.8, health=Health.OK, metrics=None, chains=0):
    trace = tuple(tuple(float(c + i % 7) for i in range(20)) for c in range(chains))
    return Point(step, loss, Estimate(llc, error, (llc, llc), 20.0, 1.01, 412.3, health, trace), metrics or {})


def a_run(folder, points=(), settings=None):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({} if settings is None else settings))
    if points is not None:
        (folder / "points.jsonl").write_text("".join(json.dumps(point.as_json()) + "\n" for point in points))
    return folder


def page_of(run):
    text = write_report(run).read_text(encoding="utf-8")
    return text, Page(text)


def found(monkeypatch, *transitions):
    monkeypatch.setattr(report, "find_transitions", lambda trajectory: list(transitions))


def test_the_page_needs_nothing_from_outside(tmp_path, monkeypatch):
    found(monkeypatch, UP, DOWN)
    points = [a_point(s, health=Health.UNMIXED, chains=2, metrics={"accuracy": 0.5}) for s in (0, 10, 1000, 40404)]
    text, page = page_of(a_run(tmp_path / "run", points))
    assert not re.search(r"https?:", text.replace("http://www.w3.org/2000/svg", ""))  # a name that is never fetched
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object"}
    outside = [attrs for _, attrs in page.elements if "href" in attrs or "srcset" in attrs]
    assert outside == []
    (image,) = page.tags("img")
    kind, data = image["src"].split(",")
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(data).rstrip().endswith(b"</svg>")


def test_the_headline_counts(tmp_path, monkeypatch):
    found(monkeypatch, UP, DOWN)
    points = [
        a_point(0),
        a_point(1000, health=Health.UNMIXED),
        a_point(2000, math.nan, health=Health.DIVERGED),
        a_point(40404),
    ]
    _, page = page_of(a_run(tmp_path / "icl", points))
    assert (
        "4 points from step 0 to step 40\u202f404: 2 transitions (A, B), 1 estimate doubtful, 1 estimate failed."
        in "".join(page.words)
    )
    assert "icl" in page.text


def test_each_transition_is_told_in_numbers_and_in_its_own_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(Transition, "sentence", lambda self: f"<i>{self.kind.name}</i> & so on.", raising=False)
    found(monkeypatch, UP, DOWN)
    text, page = page_of(a_run(tmp_path / "run", [a_point(0), a_point(40404)]))
    for transition in (UP, DOWN):
        assert str(escape(transition.sentence())) in text
    words = "".join(page.words)
    for cell in ("0–9, 990–1\u202f010", "985–1\u202f200, 38\u202f181–41\u202f414"):
        assert cell in words
    for cell in ("1\u202f000 → 40\u202f404", "1.890 → 1.780", "−0.110", "169.7 → 112.8", "−56.9 ± 1.1", "98.1 %"):
        assert cell in words
    assert words.count("provisional, 12 of 14 points doubtful") == 1


def test_transitions_are_found_in_the_points_that_are_there(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "find_transitions", lambda trajectory: seen.extend(trajectory) or [UP])
    points = [a_point(0), a_point(40404)]
    write_report(a_run(tmp_path / "run", points))
    assert seen == points


def test_names_and_settings_cannot_become_markup(tmp_path, monkeypatch):
    found(monkeypatch)
    nasty = "<b>\"'&</b>"
    run = a_run(tmp_path / "<i>run", [a_point(1, metrics={nasty: 0.5})], {nasty: [{nasty: nasty}]})
    text, page = page_of(run)
    assert "<b>" not in text
    assert "<i>run" not in text
    assert not page.tags("b")
    assert nasty in "".join(page.words)
    assert nasty in [attrs.get("title") for attrs in page.tags("th")]


def test_what_was_not_measured_is_never_printed_as_nan(tmp_path, monkeypatch):
    monkeypatch.setattr(Transition, "sentence", lambda self: "A sentence.", raising=False)
    changes = {**UP.changes, "llc": dataclasses.replace(UP.change, error=math.nan)}
    found(monkeypatch, dataclasses.replace(UP, changes=changes, confidence=math.nan))
    unknown = Estimate(math.nan, math.nan, (), math.nan, math.nan, math.nan, Health.UNMIXED, ((math.nan,) * 5,))
    points = [
        Point(1, math.nan, unknown, {"m": math.inf}),
        Point(2, math.inf, dataclasses.replace(unknown, health=Health.OK), {"m": -math.inf}),
    ]
    settings = {"a": math.nan, "b": "nan", "c": [math.inf, None]}
    _, page = page_of(a_run(tmp_path / "run", points, settings))
    assert not re.search(r"\b(nan|inf|infinity)\b", page.text, re.IGNORECASE)
    assert "–" in page.text


@pytest.mark.parametrize("points", [None, ()])
def test_a_run_without_points_has_a_page(tmp_path, points):
    _, page = page_of(a_run(tmp_path / "run", points, {"seed": 3}))
    assert "Nothing has been measured yet." in page.text
    assert "No transition so far." in page.text
    assert "seed 3" in page.text
    assert page.tags("img") == []


def test_one_point_has_a_page(tmp_path, monkeypatch):
    found(monkeypatch)
    _, page = page_of(a_run(tmp_path / "run", [a_point(1234)]))
    assert "One point, at step 1" in page.text
    assert len(page.tags("img")) == 1


def test_points_without_settings_have_a_page(tmp_path, monkeypatch):
    found(monkeypatch)
    run = a_run(tmp_path / "run", [a_point(1)])
    (run / "run.json").unlink()
    assert "None were recorded with this run." in page_of(run)[1].text


def test_a_point_s_row_holds_what_it_measured(tmp_path, monkeypatch):
    found(monkeypatch)
    points = [a_point(1234, metrics={"accuracy": 0.875}), a_point(2000)]
    _, page = page_of(a_run(tmp_path / "run", points))
    assert "1\u202f234 1.945 142.5 ± 0.8 1.010 412 ok 0.875" in " ".join(
        word.strip(" \n") for word in page.words if word.strip(" \n")
    )


def test_doubts_are_explained_and_emphasised(tmp_path, monkeypatch):
    found(monkeypatch)
    points = [a_point(s) for s in range(1, 20)]
    points += [a_point(50, health=Health.DRIFTING), a_point(60, math.nan, health=Health.DIVERGED)]
    text, page = page_of(a_run(tmp_path / "run", points))
    for health in Health:
        explained = str(escape(health.value)) in text
        assert explained == (health in (Health.DRIFTING, Health.DIVERGED))
    rows = [attrs.get("class") for attrs in page.tags("tr")]
    assert (rows.count("doubt"), rows.count("fail")) == (1, 1)
    assert "1 of 21 points, left out of the curve and of the transitions: step 60." in page.text


def test_a_healthy_run_has_no_section_of_doubts(tmp_path, monkeypatch):
    found(monkeypatch)
    _, page = page_of(a_run(tmp_path / "run", [a_point(1), a_point(2)]))
    assert "Estimates in doubt" not in page.text
    assert page.tags("svg") == []


def test_traces_are_drawn_a_line_a_chain_and_no_more_than_fit(tmp_path, monkeypatch):
    found(monkeypatch)
    points = [a_point(s, health=Health.UNMIXED, chains=3) for s in range(1, MAX_TRACES + 6)]
    _, page = page_of(a_run(tmp_path / "run", points))
    assert len(page.tags("svg")) == MAX_TRACES
    assert len(page.tags("path")) == 3 * MAX_TRACES
    assert "These are 12 of 17 doubtful points with a trace; 5 more are in points.jsonl." in page.text
    few = page_of(a_run(tmp_path / "few", points[:2]))[1]
    assert len(few.tags("svg")) == 2
    assert "more are in points.jsonl" not in few.text


def test_a_chain_that_left_for_infinity_is_broken_off_not_drawn(tmp_path, monkeypatch):
    found(monkeypatch)
    point = a_point(1, math.nan, health=Health.DIVERGED)
    trace = ((-1.0, math.nan, 1.0, 3.0), (math.inf,) * 4)
    point = dataclasses.replace(point, llc=dataclasses.replace(point.llc, trace=trace))
    _, page = page_of(a_run(tmp_path / "run", [point]))
    assert [attrs["d"] for attrs in page.tags("path")] == ["M0.0 79.8M160.0 42.0L240.0 4.2", ""]
    (zero,) = page.tags("line")
    assert float(zero["y1"]) == pytest.approx(60.9)


def test_settings_are_nested_tables_in_their_own_order(tmp_path):
    settings = {"z": {"step_size": 3e-4, "on": True, "none": None}, "a": [1, 2.5, "x"], "e": [], "m": [{"k": 1}]}
    _, page = page_of(a_run(tmp_path / "run", None, settings))
    assert page.text.endswith("Settings z step_size 0.0003 on true none – a 1, 2.5, x e none m k 1")
    assert [attrs.get("class") for attrs in page.tags("table")].count("settings") == 3


def test_the_page_goes_where_it_is_told(tmp_path, monkeypatch):
    found(monkeypatch)
    run = a_run(tmp_path / "run", [a_point(1)])
    assert write_report(run) == run / "report.html"
    assert write_report(str(run), tmp_path / "elsewhere.html") == tmp_path / "elsewhere.html"
    assert sorted(path.name for path in run.iterdir()) == ["points.jsonl", "report.html", "run.json"]
    with pytest.raises(
        PhasewatchError, match=r"write_report\(out='.*no/page.html'\) names a folder that does not exist"
    ):
        write_report(run, tmp_path / "no/page.html")


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    found(monkeypatch)
    run = a_run(tmp_path / "run", [a_point(1)])
    before = write_report(run).read_text()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(run)
    assert (run / "report.html").read_text() == before
    assert len(list(run.iterdir())) == 3


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(PhasewatchError, match=r"found neither run\.json nor points\.jsonl there"):
        write_report(tmp_path)
    with pytest.raises(PhasewatchError, match="found neither"):
        write_report(tmp_path / "missing")
    run = a_run(tmp_path / "run", None)
    (run / "run.json").write_text("{")
    with pytest.raises(PhasewatchError, match=r"run\.json is not JSON"):
        write_report(run)
    (run / "run.json").write_text("[]")
    with pytest.raises(PhasewatchError, match=r"expects a JSON object in run\.json"):
        write_report(run)


def test_the_transitions_that_are_found_are_told(tmp_path):
    random = np.random.default_rng(0)
    levels = [10.0] * 15 + [10 + 4.0 * i for i in range(15)] + [70.0] * 15
    points = []
    for i, level in enumerate(levels):
        chains = level + 0.4 * random.normal(size=4)
        point = a_point(round(10 * 1.2**i), chains.mean(), loss=4 - level / 30, error=0.2)
        points.append(dataclasses.replace(point, llc=dataclasses.replace(point.llc, per_chain=tuple(chains.tolist()))))
    run = a_run(tmp_path / "run", points)
    found = find_transitions(Trajectory.read(run / "points.jsonl"))
    text, page = page_of(run)
    assert found
    for transition in found:
        assert str(escape(transition.sentence())) in text
    assert len([attrs for attrs in page.tags("span") if attrs.get("class", "").startswith("kind ")]) == len(found)


@pytest.mark.parametrize("line", ['{"step": 1}', "not json", '{"step": 1, "loss": 2, "llc": {"value": []}}'])
def test_unreadable_points_are_refused_and_no_page_is_written(tmp_path, line):
    run = a_run(tmp_path / "run", None)
    (run / "points.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(PhasewatchError, match=r"points\.jsonl"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_the_values_are_not_changed(tmp_path, monkeypatch):
    transitions = [UP, DOWN]
    before = copy.deepcopy(transitions)
    found(monkeypatch, *transitions)
    run = a_run(tmp_path / "run", [a_point(1), a_point(2)], {"seed": 0})
    files = {path: path.read_bytes() for path in run.iterdir()}
    write_report(run)
    assert transitions == before
    assert {path: path.read_bytes() for path in files} == files


def test_no_torch_and_no_pyplot_behind_it():
    code = (
        "import phasewatch.callbacks.sinks.report, sys; "
        "assert not {'torch', 'matplotlib.pyplot', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def a_watched_run(*names, fall=0.03):
    """Log-likelihoods that rise for 25 points and then fall."""
    index = np.arange(40)
    log_p = -4 + np.log(index + 1) / 2 + 0.02 * np.random.default_rng(0).normal(size=40)
    log_p -= fall * np.maximum(index - 25, 0)
    return [a_point(1000 * (int(i) + 1), metrics={name: float(log_p[i]) for name in names}) for i in index]


def test_a_run_with_a_chain_of_scores_shows_them_side_by_side_with_the_red_flag(tmp_path):
    a_run(tmp_path, a_watched_run(*score_metrics("quiz").values(), "watch_<b>"))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Emergence" in page.text
    assert "RED FLAG: quiz_log_p has turned." in page.text
    assert "RED FLAG: watch_<b> has turned." in page.text
    assert "--sharp quiz_accuracy --smooth quiz_log_p" in page.text
    [picture] = [image for image in page.tags("img") if "The scores of quiz side by side" in image["alt"]]
    drawing = base64.b64decode(picture["src"].removeprefix("data:image/svg+xml;base64,")).decode()
    assert "quiz_p_among_choices" in drawing


def test_watched_behaviours_alone_are_named_and_nothing_is_drawn_of_them(tmp_path):
    a_run(tmp_path, a_watched_run("watch_greeting", fall=0.0))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "No watched log-likelihood has turned: watch_greeting." in page.text
    assert len(page.tags("img")) == 1


def test_other_runs_have_no_section_on_emergence(tmp_path):
    a_run(tmp_path, a_watched_run("accuracy", "my_log_p"))
    assert "Emergence" not in Page(write_report(tmp_path).read_text(encoding="utf-8")).text
