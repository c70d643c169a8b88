import json
import math
from pathlib import Path

import numpy as np
import pytest

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimate import Estimate, Health
from phasewatch.monitor.trajectory import Point, Trajectory

PUBLISHED = Path(__file__).parents[1] / "data" / "published"


def point(step, loss=2.0, llc=10.0, per_chain=(9.0, 11.0), health=Health.OK, **metrics):
    estimate = Estimate(llc, 1.0, per_chain, nbeta=66.7, rhat=1.01, ess=321.5, acceptance=0.93, health=health)
    return Point(step, loss, estimate, metrics)


def awkward_points():
    rng = np.random.default_rng(0)
    points = []
    for step in range(20):
        loss, llc, *per_chain = (1e-3 * rng.normal(size=5)).tolist()
        points.append(point(step, loss, llc, tuple(per_chain), accuracy=rng.random()))
    failed = Estimate(math.nan, math.inf, (math.nan, -math.inf, 1 / 3), 0.1, math.nan, 0.0, 0.0, Health.DIVERGED)
    return [*points, Point(20, math.inf, failed, {'näme, "quoted"': -0.0})]


def test_points_come_out_in_order_of_step():
    trajectory = Trajectory([point(30), point(0), point(7)])
    assert list(trajectory.steps) == [0, 7, 30]
    assert [p.step for p in trajectory] == [0, 7, 30]
    assert len(trajectory) == 3
    assert trajectory[-1].step == 30
    assert list(trajectory[1:].steps) == [7, 30]


def test_arrays_hold_what_the_points_hold():
    trajectory = Trajectory([point(1, 3.0, 5.0, (4.0, 6.0)), point(2, 2.5, 7.0, (6.0, 8.0))])
    np.testing.assert_array_equal(trajectory.loss, [3.0, 2.5])
    np.testing.assert_array_equal(trajectory.llc, [5.0, 7.0])
    np.testing.assert_array_equal(trajectory.llc_error, [1.0, 1.0])
    np.testing.assert_array_equal(trajectory.per_chain, [[4.0, 6.0], [6.0, 8.0]])


@pytest.mark.parametrize("others", [(), (1.0,), (1.0, 2.0, 3.0)])
def test_unequal_numbers_of_chains_have_no_array(others):
    assert Trajectory([point(1), point(2, per_chain=others)]).per_chain is None


def test_no_points_is_a_trajectory_too():
    empty = Trajectory([])
    assert (len(empty), empty.steps.shape, empty.llc.shape, empty.per_chain) == (0, (0,), (0,), None)


def test_an_equal_point_is_kept_once_even_with_nan():
    failed = [point(3, llc=math.nan, health=Health.DIVERGED) for _ in range(2)]
    assert len(Trajectory([*failed, point(1), point(1)])) == 2


def test_two_different_points_of_one_step_are_refused():
    with pytest.raises(PhasewatchError, match=r"two different points at step 4, with λ̂ 10 and 12 .* one setting"):
        Trajectory([point(4), point(4, llc=12.0)])


def test_negative_steps_are_refused():
    with pytest.raises(PhasewatchError, match=r"step -1; steps count from 0"):
        Trajectory([point(-1)])


def test_jsonl_round_trip_is_exact(tmp_path):
    trajectory = Trajectory(awkward_points())
    trajectory.write(tmp_path / "points.jsonl")
    back = Trajectory.read(tmp_path / "points.jsonl")
    assert [repr(p) for p in back] == [repr(p) for p in trajectory]
    for line in (tmp_path / "points.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_csv_round_trip_keeps_numbers_chains_and_metrics(tmp_path):
    trajectory = Trajectory([*awkward_points()[:-1], point(99, per_chain=(1.0, 2.0, 3.0))])
    trajectory.write(tmp_path / "points.csv")
    back = Trajectory.read(str(tmp_path / "points.csv"))
    for name in ("steps", "loss", "llc", "llc_error", "per_chain"):
        np.testing.assert_array_equal(getattr(back, name), getattr(trajectory, name))
    assert [p.metrics for p in back] == [p.metrics for p in trajectory]


def test_a_torn_last_line_is_left_out_wherever_it_was_torn(tmp_path):
    path = tmp_path / "points.jsonl"
    Trajectory([point(1), point(2, näme=1.0)]).write(path)
    first, second, _ = path.read_bytes().split(b"\n")
    for cut in range(len(second)):
        path.write_bytes(first + b"\n" + second[:cut])
        assert list(Trajectory.read(path).steps) == [1]
    path.write_bytes(first + b"\n" + second)
    assert list(Trajectory.read(path).steps) == [1, 2]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"step": 1, "lo', "line 2, which is not JSON"),
        (b"\xff\xfe", "line 2, which is not JSON"),
        (b"[1, 2]", "line 2, which is not a point"),
        (b'{"step": 5}', r"line 2, which is not a point \(KeyError: 'loss'\)"),
    ],
)
def test_any_other_unreadable_line_is_named(tmp_path, line, complaint):
    good = json.dumps(point(1).as_json()).encode()
    (tmp_path / "points.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(PhasewatchError, match=complaint):
        Trajectory.read(tmp_path / "points.jsonl")


def test_the_published_csv():
    trajectory = Trajectory.read(PUBLISHED / "lr_seed1.csv")
    assert len(trajectory) == 190
    chains = trajectory.per_chain
    assert chains is not None
    assert chains.shape == (190, 10)
    np.testing.assert_allclose(chains.mean(axis=1), trajectory.llc, atol=1e-3)
    student = 2.262157  # for 9 degrees of freedom
    np.testing.assert_allclose(
        trajectory.llc_error, chains.std(axis=1, ddof=1) / math.sqrt(10) * student / 2, rtol=1e-6
    )
    assert trajectory[0].llc.health is Health.OK
    assert trajectory[0].metrics == {}


def read_csv(tmp_path, text):
    (tmp_path / "run.csv").write_text(text, encoding="utf-8")
    return Trajectory.read(tmp_path / "run.csv")


def test_a_plain_csv(tmp_path):
    trajectory = read_csv(tmp_path, "\ufeffllc, step,loss,accuracy\n5.5,100,2.0,0.5\nnan,1e3,1.5,\n\n")
    assert list(trajectory.steps) == [100, 1000]
    assert [p.llc.health for p in trajectory] == [Health.OK, Health.DIVERGED]
    assert [p.metrics for p in trajectory] == [{"accuracy": 0.5}, {}]
    assert trajectory.per_chain is None
    assert np.isnan(trajectory.llc_error).all()
    assert math.isnan(trajectory[0].llc.rhat)


def test_an_error_column_goes_before_the_chains_spread(tmp_path):
    text = "step,loss,llc,llc_error,llc_chain1,llc_chain0,llc_chain10\n1,2,5,0.25,4,5,6\n"
    estimate = read_csv(tmp_path, text)[0].llc
    assert estimate.error == 0.25
    assert estimate.per_chain == (5.0, 4.0, 6.0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "found no points"),
        ("step,loss,llc\n", "found no points"),
        ("step,loss\n1,2\n", "needs one column 'llc' and found 0; the columns are step, loss"),
        ("step,loss,llc,llc\n1,2,3,4\n", "needs one column 'llc' and found 2"),
        ("step,loss,llc,a,a\n1,2,3,4,5\n", "column 'a' twice"),
        ("step,loss,llc\n1,2,3\n2,two,3\n", "line 3, column 'loss' holds 'two', which is no number"),
        ("step,loss,llc\n1,,3\n", "line 2, column 'loss' holds '', which is no number"),
        ("step,loss,llc\n1,2,inf\n", "line 2, column 'llc' holds 'inf'"),
        ("step,loss,llc\n1.5,2,3\n", "column 'step' holds '1.5'; a training step is a whole number"),
        ("step,loss,llc\nnan,2,3\n", "column 'step' holds 'nan'; a training step is a whole number"),
        ("step,loss,llc\n1,2\n", "2 values in line 2 for 3 columns"),
    ],
)
def test_csv_that_cannot_be_read_is_a_sentence(tmp_path, text, complaint):
    with pytest.raises(PhasewatchError, match=complaint):
        read_csv(tmp_path, text)


def test_a_csv_that_is_no_text(tmp_path):
    (tmp_path / "run.csv").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(PhasewatchError, match="comma-separated text"):
        Trajectory.read(tmp_path / "run.csv")


def test_missing_files_and_unknown_suffixes(tmp_path):
    with pytest.raises(PhasewatchError, match=r"points\.jsonl'\) can't open the file: No such file"):
        Trajectory.read(tmp_path / "points.jsonl")
    with pytest.raises(PhasewatchError, match=r"reads \.jsonl and \.csv, not '\.parquet'"):
        Trajectory.read(tmp_path / "run.parquet")
    with pytest.raises(PhasewatchError, match=r"writes \.jsonl and \.csv, not ''"):
        Trajectory([point(1)]).write(tmp_path / "run")


def test_an_empty_jsonl_is_a_run_that_has_not_measured_yet(tmp_path):
    (tmp_path / "points.jsonl").touch()
    assert len(Trajectory.read(tmp_path / "points.jsonl")) == 0
