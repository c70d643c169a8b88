# pyright: reportArgumentType=false
import warnings
from decimal import Decimal

import numpy as np
import pytest

from phasewatch import PhasewatchError, emergence
from phasewatch.monitor.emergence.items import Items

POINTS = 20
STEP = np.geomspace(100, 1e5, POINTS)
LOG_P = np.linspace(-4, -0.05, POINTS)
ACCURACY = 0.25 + 0.75 * np.exp(3 * LOG_P)
FOUR = np.log(np.full((4, 6, 3), 0.2))
COLUMNS = np.stack([ACCURACY, np.log(STEP)], axis=1)

ALONG = {
    "verdict": lambda x, sharp, smooth: emergence.verdict(x, sharp, smooth, chance=0.25),
    "forecast": lambda x, sharp, smooth: emergence.forecast(x, sharp, smooth, at=[2e5], chance=0.25),
    "retrodict": lambda x, sharp, smooth: emergence.retrodict(x, sharp, smooth, cut=5000, chance=0.25),
    "reversal": lambda x, _, smooth: emergence.reversal(x, smooth),
}


@pytest.mark.parametrize("call", ALONG)
@pytest.mark.parametrize(
    ("x", "smooth", "words"),
    [
        (STEP, LOG_P * 1e300, "beyond 1e.100; correct it"),
        (STEP, LOG_P + 0j, "type complex128 came"),
        (STEP, None, r"isn't given|array of numbers"),
        (np.r_[0, 5e-324, STEP[2:]], LOG_P, "nearer to 0 than 1e-100; use another unit"),
        (STEP * 1e299, LOG_P, "beyond 1e.100"),
        ([10**400, *STEP[1:]], LOG_P, "int too large"),
        (np.arange("2020-01-01", "2020-01-21", dtype="datetime64[D]"), LOG_P, "type datetime64"),
        (STEP, np.ma.masked_greater(LOG_P, -1), "values that are NaN"),
    ],
    ids=["huge", "complex", "none", "tiny x", "huge x", "int", "dates", "masked"],
)
def test_numbers_that_no_curve_has_are_refused_in_words(call, x, smooth, words):
    if smooth is None and call in {"forecast", "retrodict"}:
        pytest.skip("needs no smooth score")
    with pytest.raises(PhasewatchError, match=words) as found:
        ALONG[call](x, ACCURACY, smooth)
    assert str(found.value).startswith(f"{call}(")


@pytest.mark.parametrize("fit", ["forecast", "retrodict", "Link.fit"])
def test_a_smooth_score_without_columns_is_refused(fit):
    calls = {**ALONG, "Link.fit": lambda _, sharp, smooth: emergence.Link.fit(smooth, sharp, chance=0.25)}
    with pytest.raises(PhasewatchError, match=r"at least one column; \(20, 0\) came"):
        calls[fit](STEP, ACCURACY, np.empty((POINTS, 0)))


@pytest.mark.parametrize("series", [1, "abc", ["a"] * 3, iter("ab")])
def test_series_are_one_name_for_each_point(series):
    with pytest.raises(PhasewatchError, match=r"forecast\(series=.*(must be a list|names for 20 points)"):
        emergence.forecast(STEP, ACCURACY, LOG_P, at=[2e5], chance=0.25, series=series)


def test_an_iterator_of_names_is_read_once_and_counts_by_position():
    pandas_like = dict.fromkeys(f"run {i}" for i in range(POINTS))  # has a length, and no item 0
    expected = emergence.retrodict(STEP, ACCURACY, LOG_P, cut=5000, chance=0.25, series=range(POINTS))
    for series in (pandas_like, iter(range(POINTS))):
        found = emergence.retrodict(STEP, ACCURACY, LOG_P, cut=5000, chance=0.25, series=series)
        assert found.error == pytest.approx(expected.error)


def test_points_at_one_place_tell_no_course():
    with pytest.raises(PhasewatchError, match="is 5 at every point; add points"):
        emergence.forecast(np.full(POINTS, 5.0), ACCURACY, LOG_P, at=[6], chance=0.25, series=range(POINTS))
    x = np.r_[np.full(8, 1e3), np.full(12, 1e4)]
    with pytest.raises(PhasewatchError, match="one place up to the cut"):
        emergence.retrodict(x, ACCURACY, LOG_P, cut=2e3, chance=0.25, series=range(POINTS))


def test_an_axis_far_from_zero_is_as_good_as_one_that_starts_there():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        far = emergence.retrodict(1e16 + 2 * np.arange(POINTS), ACCURACY, LOG_P, cut=1e16 + 20, chance=0.25)
    near = emergence.retrodict(-40 + 2 * np.arange(POINTS), ACCURACY, LOG_P, cut=-20, chance=0.25)
    assert far.linear_error == pytest.approx(near.linear_error)


@pytest.mark.parametrize(
    ("x", "at", "words"),
    [
        ([["a", "b"]] * POINTS, [[1, 2]], r"forecast\(x=...\) must be an array of numbers"),
        (COLUMNS, [["a", "b"]], r"forecast\(at=...\) must be an array of numbers"),
        (COLUMNS * 1e300, [[1, 2]], r"beyond 1e\+100"),
        (COLUMNS, [[np.inf, 2]], r"forecast\(at=...\) has 1 values that are NaN or infinite"),
        (COLUMNS[:, :0], np.empty((1, 0)), "at least one"),
        (STEP, [[2e5]], r"forecast\(at=...\) must have the shape"),
    ],
)
def test_several_columns_are_checked_like_one(x, at, words):
    with pytest.raises(PhasewatchError, match=words):
        emergence.forecast(x, ACCURACY, at=at, chance=0.25)


def test_a_forecast_without_a_smooth_score_does_not_speak_of_one():
    found = emergence.forecast(STEP, np.full(POINTS, 0.3), at=[2e5], chance=0.25)
    assert "No smooth score explains" in str(found)


def test_a_percentage_as_chance_is_named():
    with pytest.raises(PhasewatchError, match=r"verdict\(chance=25\).*divide percentages by 100"):
        emergence.verdict(STEP, ACCURACY, LOG_P, chance=25)


def test_scores_that_are_right_from_the_start_have_no_elbow():
    loss, amount = (a.ravel() for a in np.meshgrid(np.linspace(3, 2, 8), [300, 3000, 30_000]))
    with pytest.raises(PhasewatchError, match=r"EmergenceLaw.fit\(score=...\) is 1 at every point"):
        emergence.EmergenceLaw.fit(loss, amount, np.ones(24), chance=0.25)


def test_no_models_are_not_all_right():
    with pytest.raises(PhasewatchError, match="at least 8 models; 0 came"):
        emergence.forecast(COLUMNS[:0], [], at=[[1, 2]], chance=0.25)


@pytest.mark.parametrize(("folder", "axis"), [(None, "step"), (3, "step"), (".", "flops")])
def test_reading_takes_a_path_and_an_axis(folder, axis):
    with pytest.raises(PhasewatchError, match=r"must be a path|must be 'step' or 'tokens'"):
        emergence.read_samples(folder, axis=axis)


@pytest.mark.parametrize("words", [("True", "False"), ("true", "false")])
def test_a_table_may_say_true_and_false(tmp_path, words):
    table = tmp_path / "items.csv"
    lines = [f"{step},{item},-1.5,{words[item]}" for step in (1, 10) for item in (0, 1)]
    table.write_text("step,item,log_p,correct\n" + "\n".join(lines))
    np.testing.assert_array_equal(emergence.read_samples(table).correct, [[1, 0], [1, 0]])


def test_a_table_that_repeats_or_has_two_right_answers_is_counted(tmp_path):
    table = tmp_path / "items.csv"
    table.write_text("step,item,choice,log_p,right\n1,0,0,-1,1\n1,0,1,-2,0\n1,0,1,-1.5,0\n1,1,0,-1,1\n1,1,1,-2,1\n")
    found = emergence.read_samples(table)
    np.testing.assert_array_equal(found.log_p, [[[-1, -2]]])
    assert found.left_out == {"further lines of a choice": 1, "items with more than one right choice": 1}


def test_an_elbow_takes_three_checkpoints_of_one_amount():
    with pytest.raises(PhasewatchError, match="no amount of data has three checkpoints"):
        emergence.EmergenceLaw.fit([1, 2, 3, 4, 5], [10, 20, 30, 40, 50], [0.9, 0.7, 0.5, 0.3, 0.25], chance=0.25)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"log_p": "abc"}, r"Items\(log_p=...\) must be an array of numbers"),
        ({"log_p": [[[-1], [-2, -3]]] * 4}, r"Items\(log_p=...\) must be an array of numbers"),
        ({"log_p": np.where(np.arange(3) == 1, -np.inf, FOUR)}, "item 0 has the log probability -inf"),
        ({"log_p": FOUR * 1e300}, "no text has one below -1e.12"),
        ({"target": ["a"] * 6}, r"Items\(target=...\) must be an array of numbers"),
        ({"target": [0.7] * 6}, "index of a choice"),
        ({"target": [np.nan] * 6}, "index of a choice"),
        ({"correct": np.full((4, 6), 100.0)}, r"Items\(correct=...\) has the value 100"),
        ({"correct": np.full((4, 6), -1)}, r"Items\(correct=...\) has the value -1"),
        ({"tokens": [1]}, r"Items\(tokens=...\) must have the shape \(6, 3\)"),
        ({"tokens": "a"}, r"Items\(tokens=...\) must be an array of numbers"),
        ({"x": [1e-320, 2e-320, 3e-320, 4e-320]}, "nearer to 0"),
    ],
)
def test_items_that_are_none_are_refused_in_words(argument, words):
    with pytest.raises(PhasewatchError, match=words):
        Items(**{"x": [1, 10, 100, 1000], "log_p": FOUR, **argument})


@pytest.mark.parametrize("call", ["scores", "attribute"])
@pytest.mark.parametrize("came", [None, [1], {"x": 1}])
def test_only_items_have_scores(call, came):
    with pytest.raises(PhasewatchError, match=rf"{call}\(items\) takes Items, .*; {type(came).__name__} came"):
        getattr(emergence, call)(came)


def test_one_item_has_scores_without_an_error():
    found = emergence.scores(Items([1, 10, 100, 1000], FOUR[:, :1]))
    assert "nan" not in str(found)
    assert "±" in str(emergence.scores(Items([1, 10, 100, 1000], FOUR)))


def test_items_that_are_half_right_are_not_all_right():
    found = emergence.attribute(Items([1, 10, 100, 1000], FOUR, correct=np.full((4, 6), 0.5)))
    assert found.undefined["accuracy"] == 1


@pytest.mark.parametrize("came", ["a", None, [[1], [1, 2]], [1j]])
def test_a_link_and_exact_match_take_numbers(came):
    link = emergence.Link.fit(LOG_P, ACCURACY, chance=0.25)
    with pytest.raises(PhasewatchError, match=r"Link\(smooth="):
        link(came)
    with pytest.raises(PhasewatchError, match=r"exact_match\(token_log_p="):
        emergence.exact_match(came)


def test_numbers_of_other_types_are_numbers():
    expected = emergence.verdict(STEP, ACCURACY, LOG_P, chance=0.25)
    found = emergence.verdict([Decimal(str(x)) for x in STEP], ACCURACY.tolist(), [str(v) for v in LOG_P], chance=0.25)
    assert found.probability == pytest.approx(expected.probability)
