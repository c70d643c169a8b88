import numpy as np
import pytest

from phasewatch import Trajectory
from phasewatch.monitor.emergence import watching
from phasewatch.monitor.emergence.overview import chain_overview
from phasewatch.monitor.emergence.watching import (
    NewRedFlags,
    chains,
    metric_reversal,
    red_flags,
    score_metrics,
    watched,
)

STEP = np.arange(1, 41) * 1000


def rising(seed=0):
    return -4 + np.log(STEP / 1000) / 2 + 0.02 * np.random.default_rng(seed).normal(size=40)


def turning(seed=0):
    return rising(seed) - 0.03 * np.maximum(np.arange(40) - 25, 0)


def a_run(**metrics):
    return Trajectory.from_values(STEP, loss=np.ones(40), llc=np.ones(40), metrics=metrics)


def a_chain(log_p, name="quiz"):
    values = {"log_p_per_token": log_p / 2, "brier": 1 - np.exp(log_p), "log_p": log_p}
    return {metric: values.get(score, np.exp(log_p)) for score, metric in score_metrics(name).items()}


def test_a_chain_is_known_by_all_its_scores_and_its_log_likelihood_is_watched():
    run = a_run(**a_chain(rising()), other_log_p=rising(), watch_name=rising(), accuracy=rising())
    assert list(chains(run)) == ["quiz"]
    assert watched(run) == ["quiz_log_p", "watch_name"]


def test_only_what_turns_after_a_rise_is_flagged():
    run = a_run(watch_up=rising(), watch_turns=turning(), loss_like=turning(), watch_down=-rising())
    [flag] = red_flags(run)
    assert flag.metric == "watch_turns"
    assert 25_000 < flag.reversal.alarm <= 32_000
    assert str(flag).startswith("RED FLAG: watch_turns has turned. It turned: highest at")


def test_points_without_the_metric_are_passed_over():
    holes = turning()
    holes[::7] = np.nan
    assert [flag.metric for flag in red_flags(a_run(watch_turns=holes))] == ["watch_turns"]
    assert red_flags(a_run(watch_turns=np.full(40, np.nan))) == []


def test_a_run_that_goes_on_is_flagged_once_and_as_soon_as_its_alarm_is_sure():
    run, news = a_run(watch_turns=turning(), watch_up=rising()), NewRedFlags()
    told = [(points, flag.metric) for points in range(1, 41) for flag in news.among(run[:points], STEP[points - 1])]
    assert [metric for _, metric in told] == ["watch_turns"]
    points = told[0][0]
    assert metric_reversal(run[:points], "watch_turns").is_sure
    before = metric_reversal(run[: points - 1], "watch_turns")  # it rang, and noise might still explain it
    assert not before.is_sure
    assert "It may have turned" in str(before)
    assert before.alarm == red_flags(run)[0].reversal.alarm


def test_a_resumed_run_is_not_flagged_again():
    run = a_run(watch_turns=turning())
    rang = next(points for points in range(1, 41) if red_flags(run[:points]))
    resumed = NewRedFlags()
    assert [flag for points in range(rang + 1, 41) for flag in resumed.among(run[:points], STEP[points - 1])] == []
    resumed_before = NewRedFlags()
    assert len(resumed_before.among(run[:rang], STEP[rang - 1])) == 1  # the new point itself rings
    assert NewRedFlags().among(run[:1], STEP[0]) == []


def test_a_long_run_is_looked_at_in_places(monkeypatch):
    monkeypatch.setattr(watching, "MOST_POINTS", 20)
    assert [flag.metric for flag in red_flags(a_run(watch_turns=turning()))] == ["watch_turns"]
    assert len(chain_overview(a_run(**a_chain(rising())), "quiz").steps) == 20


def test_the_chain_is_shown_from_the_smoothest_to_the_sharpest_without_what_was_never_measured():
    chain = a_chain(turning()) | {"quiz_brier": np.full(40, np.nan)}
    found = chain_overview(a_run(**chain), "quiz")
    assert list(found.scores) == ["quiz_log_p", "quiz_p", "quiz_p_among_choices", "quiz_accuracy"]
    assert found.scores["quiz_p"] == pytest.approx(np.exp(turning()))
    assert found.verdict is None
    assert found.reversal.alarm == red_flags(a_run(**chain))[0].reversal.alarm
    assert "--sharp quiz_accuracy --smooth quiz_log_p" in str(found)
