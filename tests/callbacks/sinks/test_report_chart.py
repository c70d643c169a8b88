"""The chart of the report: its data, its script, and what a browser makes of them."""

import base64
import dataclasses
import hashlib
import json
import math
import re
import shutil

import numpy as np
import pytest

from phasewatch.callbacks.sinks.report import write_report
from phasewatch.callbacks.sinks.report_chart import chart_data
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.trajectories.changes import Change, Transition
from phasewatch.monitor.trajectories.kinds import Kind
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


def a_point(step, llc=142.5, health=Health.OK, **metrics):
    return Point(step, 1.945678901, Estimate(llc, 0.84, (llc, llc), 20.0, 1.01, 412.3, health), metrics)


def a_stage(start, end, *, provisional=False):
    changes = {"loss": Change(4.0, 3.0, 0.1, "down"), "llc": Change(1.0, 9.0, 0.1, "up")}
    return Transition(
        Kind.A, "llc", start, end, (start - 2, start + 2), (end - 5, end + 5), 0.999, provisional, changes
    )


def a_run(folder, points):
    folder.mkdir()
    Trajectory(points).write(folder / "points.jsonl")
    return write_report(folder)


def steps_of_a_curve(count=60):
    levels = np.interp(np.arange(count), [0, 15, 30, 45, 60], [10, 10, 60, 60, 30])
    return [a_point(round(10 * 1.1**i), float(levels[i]), acc=i / count) for i in range(count)]


def test_what_the_chart_gets():
    points = [
        a_point(0, acc=0.25),
        a_point(10, math.nan, Health.DIVERGED),
        a_point(20, 7.0, Health.UNMIXED, acc=math.inf),
    ]
    data = json.loads(chart_data(points, [a_stage(5, 15, provisional=True)], ["acc"]))
    assert data["steps"] == [0, 10, 20]
    llc, loss, acc = data["panels"]
    assert (llc["name"], llc["values"], llc["errors"]) == ("complexity λ̂", [142.5, None, 7.0], [0.84] * 3)
    assert (loss["values"], acc["values"]) == ([1.94568] * 3, [0.25, None, None])
    assert (data["doubtful"], data["failed"]) == ([0, 1, 1], [0, 1, 0])
    assert [data["verdicts"][i] for i in data["verdict"]] == ["ok", "diverged", "unmixed"]
    (stage,) = data["stages"]
    assert (stage["label"], stage["look"], stage["provisional"]) == ("A", "a", True)
    assert (stage["startInterval"], stage["start"], stage["end"], stage["endInterval"]) == ([3, 7], 5, 15, [10, 20])


def test_no_name_can_leave_the_element_of_the_data(tmp_path):
    text = a_run(tmp_path / "run", [a_point(1, **{HOSTILE: 1.0}), a_point(2)]).read_text(encoding="utf-8")
    assert len(re.findall(r"<script\b", text)) == 2
    assert len(re.findall(r"</script", text)) == 2
    assert "<img src=x" not in text
    data = json.loads(re.findall(r'<script type="application/json" id="chart-data">(.*?)</script>', text)[0])
    assert data["panels"][2]["name"].startswith("</script><script>")


def test_the_page_s_policy_lets_its_own_script_run_and_nothing_else(tmp_path):
    text = a_run(tmp_path / "run", [a_point(1)]).read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_a_page_of_many_points_stays_small(tmp_path):
    trace = tuple(tuple(np.random.default_rng(0).normal(size=100).tolist()) for _ in range(8))
    plain = [a_point(i, 10 + i / 777, **{f"m{j}": i / 7 for j in range(4)}) for i in range(1, 4001)]
    doubtful = dataclasses.replace(plain[0].llc, trace=trace, health=Health.UNMIXED)
    points = [dataclasses.replace(p, llc=doubtful) if i % 500 == 0 else p for i, p in enumerate(plain)]
    assert a_run(tmp_path / "run", points).stat().st_size < 5e6


@pytest.fixture(scope="module")
def browser():
    """Chromium, where it and playwright are installed."""
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, page, width=1400):
    view = browser.new_page(viewport={"width": width, "height": 900})
    view.wrong = []
    view.on("pageerror", lambda error: view.wrong.append(str(error)))
    view.on("request", lambda request: view.wrong.append(request.url) if request.url.startswith("http") else None)
    view.goto(page.as_uri())
    return view


def first_tick(view):
    return view.locator(".chart text.tick:not(.y)").first.text_content()


@pytest.mark.parametrize("width", [1400, 390])
def test_values_and_verdict_under_the_pointer_and_zoom(browser, tmp_path, width):
    points = steps_of_a_curve()
    points[40] = a_point(points[40].step, points[40].llc.value, Health.UNMIXED, acc=0.5)
    view = opened(browser, a_run(tmp_path / "run", points), width)
    assert view.evaluate("document.documentElement.scrollWidth") == width
    chart = view.locator(".chart")
    chart.scroll_into_view_if_needed()
    chart.focus()
    view.keyboard.press("ArrowRight")
    while "unmixed" not in (tip := view.locator(".tip").inner_text()):
        view.keyboard.press("ArrowRight")
    words = " ".join(tip.split())
    assert f"step {points[40].step}" in words
    assert f"complexity λ̂ {points[40].llc.value:.1f} ± 0.8" in words
    assert "loss 1.946 acc 0.500 verdict unmixed" in words
    box = chart.bounding_box()
    view.mouse.move(box["x"] + 0.6 * width / 2, box["y"] + 80)
    assert view.locator(".tip").is_visible()
    before = first_tick(view)
    view.mouse.down()
    view.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 80, steps=3)
    view.mouse.up()
    assert first_tick(view) != before
    view.get_by_role("button", name="show all steps").or_(view.locator("button[value=all]")).first.click()
    assert first_tick(view) == before
    view.locator("button[value=in]").click()
    assert first_tick(view) != before
    assert view.wrong == []


def test_nothing_of_a_transition_is_cut_off_on_a_phone(browser, tmp_path):
    view = opened(browser, a_run(tmp_path / "run", steps_of_a_curve()), 390)
    items = view.locator("ol.transitions li")
    assert items.count() > 0
    for box in [element.bounding_box() for element in view.locator("ol.transitions :is(p, dl, .head)").all()]:
        assert 0 <= box["x"]
        assert box["x"] + box["width"] <= 390
    assert "is right with probability" in items.first.inner_text()


def test_a_phone_is_touched_and_pinched(browser, tmp_path):
    long = [dataclasses.replace(p, metrics={"a_score_with_a_long_name_" * 3: 0.5}) for p in steps_of_a_curve()]
    page = a_run(tmp_path / "run", long)
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    view = context.new_page()
    view.goto(page.as_uri())
    box = view.locator(".chart").bounding_box()
    view.touchscreen.tap(box["x"] + 200, box["y"] + 100)
    for cell in view.locator(".tip :is(span, b)").all():
        place = cell.bounding_box()
        assert 0 <= place["x"]
        assert place["x"] + place["width"] <= 390
    devtools = context.new_cdp_session(view)

    def touch(kind, *across):
        points = [{"x": x, "y": box["y"] + 100, "id": i} for i, x in enumerate(across)]
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    before = first_tick(view)
    touch("touchStart", 160)
    touch("touchStart", 160, 240)
    for moved in (20, 40, 60):
        touch("touchMove", 160 - moved, 240 + moved)
    touch("touchEnd")
    assert first_tick(view) != before
    view.locator("h1").tap()
    assert not view.locator(".tip").is_visible()
    context.close()


def test_hostile_names_run_nothing_in_a_browser(browser, tmp_path):
    points = [a_point(i, **{HOSTILE: float(i)}) for i in range(1, 9)]
    view = opened(browser, a_run(tmp_path / "run", points))
    view.locator(".chart").focus()
    view.keyboard.press("ArrowRight")
    assert "</script><script>" in view.locator(".tip").inner_text()
    assert view.title() == "run · phasewatch"
    assert view.locator("img[src=x]").count() == 0


def test_without_scripts_there_is_the_picture(browser, tmp_path):
    page = a_run(tmp_path / "run", steps_of_a_curve())
    view = browser.new_context(java_script_enabled=False).new_page()
    view.goto(page.as_uri())
    assert view.locator("figure img").first.is_visible()
    assert not view.locator(".buttons").is_visible()
    with_script = opened(browser, page)
    assert not with_script.locator("figure img").first.is_visible()
    with_script.emulate_media(media="print")
    assert with_script.locator("figure img").first.is_visible()
