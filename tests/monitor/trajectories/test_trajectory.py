import json
import math
from pathlib import Path

import numpy as np
import pytest

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory

PUBLISHED = Path(__file__).parents[2] / "data" / "published"


def point(step, loss=2.0, llc=10.0, per_chain=(9.0, 11.0), health=Health.OK, **metrics):
    estimate = Estimate(llc, 1.0, per_chain, nbeta=66.7, rhat=1.01, ess=321.5, health=health)
    return Point(step, loss, estimate, metrics)


def awkward_points():
    rng = np.random.default_rng(0)
    points = []
    for step in range(20):
        loss, llc, *per_chain = (1e-3 * rng.normal(size=5)).tolist()
        points.append(point(step, loss, llc, tuple(per_chain), accuracy=rng.random()))
    failed = Estimate(math.nan, math.inf, (math.nan, -math.inf, 1 / 3), 0.1, math.nan, 0.0, Health.DIVERGED)
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
    with pytest.raises(PhasewatchError, match=r"two different points at step 4, with λ̂ 10 and 12; .* one setting"):
        Trajectory([point(4), point(4, llc=12.0)])
    with pytest.raises(PhasewatchError, match=r"with loss 2 and 3, a 1 and 2, b nan and 0; pass"):
        Trajectory([point(4, a=1.0), point(4, 3.0, a=2.0, b=0.0)])
    with pytest.raises(PhasewatchError, match=r"with different chains or diagnostics; pass"):
        Trajectory([point(4), point(4, health=Health.UNMIXED)])


def test_negative_steps_are_refused():
    with pytest.raises(PhasewatchError, match=r"step -1; a step is a whole number from 0 to"):
        Trajectory([point(-1)])


def test_jsonl_round_trip_is_exact(tmp_path):
    trajectory = Trajectory(awkward_points())
    trajectory.write(tmp_path / "points.jsonl")
    back = Trajectory.read(tmp_path / "points.jsonl")
    assert [repr(p) for p in back] == [repr(p) for p in trajectory]
    for line in (tmp_path / "points.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_csv_round_trip_keeps_numbers_chains_and_metrics(tmp_path):
    trajectory = Trajectory([*awkward_points()[:-1], point(99, math.nan, per_chain=(1.0, 2.0, 3.0))])
    trajectory.write(tmp_path / "points.csv")
    back = Trajectory.read(str(tmp_path / "points.csv"))
    for name in ("steps", "loss", "llc", "llc_error", "per_chain"):
        np.testing.assert_array_equal(getattr(back, name), getattr(trajectory, name))
    assert [p.metrics for p in back] == [p.metrics for p in trajectory]


def test_a_csv_has_no_infinities(tmp_path):
    Trajectory([point(1, math.inf, 5.0, (math.inf, 5.0), score=-math.inf)]).write(tmp_path / "points.csv")
    assert "inf" not in (tmp_path / "points.csv").read_text()
    (back,) = Trajectory.read(tmp_path / "points.csv")
    assert math.isnan(back.loss)
    assert (back.llc.value, back.metrics) == (5.0, {})


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
        (b'{"step": 1, "lo', "is not JSON .*; mend or delete it"),
        (b"\xff\xfe", "is not text in UTF-8; mend or delete it"),
        (b"[1, 2]", r"\(TypeError: .*\); correct it or delete it"),
        (b'{"step": 5}', r"\(KeyError: 'loss'\); correct it or delete it"),
    ],
)
def test_any_other_unreadable_line_is_named(tmp_path, line, complaint):
    good = json.dumps(point(1).as_json()).encode()
    (tmp_path / "points.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(PhasewatchError, match=r"^Line 2 of .*points\.jsonl .*" + complaint):
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


def read_csv(tmp_path, text, **options):
    (tmp_path / "run.csv").write_text(text, encoding="utf-8")
    return Trajectory.read(tmp_path / "run.csv", **options)


def test_a_plain_csv(tmp_path):
    trajectory = read_csv(tmp_path, "\ufeffllc, step,loss,accuracy\n5.5,100,2.0,0.5\nnan,1e3,1.5,\n\n, ,,\n")
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


def test_what_is_empty_or_nan_is_missing_and_the_rest_of_the_point_stays(tmp_path):
    trajectory = read_csv(tmp_path, "step,loss,llc,llc_chain0,llc_chain1\n1,,3,2,4\n2,2,,,\n3,nan,nan,1,2\n4,2,9,,9\n")
    np.testing.assert_array_equal(trajectory.loss, [np.nan, 2, np.nan, 2])
    np.testing.assert_array_equal(trajectory.llc, [3, np.nan, np.nan, 9])
    assert [len(p.llc.per_chain) for p in trajectory] == [2, 0, 0, 2]
    assert list(trajectory.usable().steps) == [4]
    assert list(trajectory.usable("loss").steps) == [2, 4]


def test_columns_that_are_not_wanted_may_hold_anything(tmp_path):
    text = "step,loss,llc,note,norm,when\n1,2,3,warm-up,inf,\n2,2,4,,7,2026-01-01\n"
    assert [p.metrics for p in read_csv(tmp_path, text)] == [{}, {"norm": 7.0}]
    np.testing.assert_array_equal(read_csv(tmp_path, text, signal="norm").signal("norm"), [np.nan, 7])
    with pytest.raises(PhasewatchError, match=r"Line 2 of .*csv, column 'note', holds 'warm-up', not a number"):
        read_csv(tmp_path, text, signal="note")


def test_a_metric_needs_neither_llc_nor_loss(tmp_path):
    trajectory = read_csv(tmp_path, "step,score\n1,0.5\n10,\n20,0.75\n", signal="score")
    np.testing.assert_array_equal(trajectory.signal("score"), [0.5, np.nan, 0.75])
    assert list(trajectory.usable("score").steps) == [1, 20]
    assert np.isnan([trajectory.llc, trajectory.loss]).all()
    assert len(read_csv(tmp_path, "step,loss\n1,2\n", signal="loss")) == 1


def test_signals_by_name(tmp_path):
    failed = point(3, llc=9.0, health=Health.DIVERGED)
    trajectory = Trajectory([point(1, a=1.0), point(2, 4.0, 11.0, b=2.0), failed])
    np.testing.assert_array_equal(trajectory.signal("llc"), [10, 11, np.nan])
    np.testing.assert_array_equal(trajectory.signal("loss"), [2, 4, 2])
    np.testing.assert_array_equal(trajectory.signal("a"), [1, np.nan, np.nan])
    assert Trajectory().signal("a").shape == (0,)
    for ask in (trajectory.signal, trajectory.usable):
        with pytest.raises(PhasewatchError, match=r"signal\('c'\): no point has it; the points have llc, loss, a, b\."):
            ask("c")


def test_names_as_w_and_b_exports_them(tmp_path):
    header = '"Step","a - b - phase/llc","a - b - phase/llc__MIN","a - b - phase/llc__MAX","a - b - phase/loss"'
    (one,) = read_csv(tmp_path, f"{header}\n10,5,4,6,2.5\n")
    assert (one.step, one.llc.value, one.loss) == (10, 5.0, 2.5)
    text = "_step,train_loss,phase/step,phase/llc,phase/loss,phase/score,phase/health\n0,9,,,,,\n1,,100,5,2.5,0.5,OK\n"
    (one,) = read_csv(tmp_path, text)
    assert (one.step, one.llc.value, one.loss, one.metrics) == (100, 5.0, 2.5, {"_step": 1.0, "score": 0.5})


def test_a_jsonl_of_flat_lines(tmp_path):
    lines = [
        '{"step": 1, "loss": 2.0, "llc": 5.0, "note": "x", "on": true, "deep": {"a": 1}}',
        '{"step": 10, "loss": null, "llc": NaN, "score": 0.5}',
        '{"step": 9007199254740993, "loss": "1.5", "llc": 6, "llc_error": 0.5}',
        '{"step": 99, "lo',
    ]
    path = tmp_path / "flat.jsonl"
    path.write_text("\n".join(lines))
    first, second, third = Trajectory.read(path)
    assert (first.step, first.loss, first.llc.value) == (1, 2.0, 5.0)
    assert (second.llc.health, second.metrics) == (Health.DIVERGED, {"score": 0.5})
    assert math.isnan(second.loss)
    assert (third.step, third.loss, third.llc.error) == (2**53 + 1, 1.5, 0.5)
    assert len(Trajectory.read(path, signal="score")) == 3
    path.write_text('{"step": 1, "score": 2}\n[1]\n')
    with pytest.raises(PhasewatchError, match=r"flat\.jsonl is not an object of named values"):
        Trajectory.read(path, signal="score")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has no points: a csv is a line with the columns step, loss, llc, then rows"),
        ("step,loss,llc\n", "has no points"),
        ("step,loss\n1,2\n", "has no column 'llc', and needs one; its columns are step, loss"),
        ("step,loss,llc,llc\n1,2,3,4\n", "has 2 columns 'llc', and needs one"),
        ("step,loss,llc,a,a\n1,2,3,4,5\n", "column 'a' twice"),
        ("step,loss,llc\n1,2,3\n2,two,3\n", "Line 3 of .*, column 'loss', holds 'two', not a number"),
        ("step,loss,llc,llc_chain0\n1,2,3,x\n", "column 'llc_chain0', holds 'x'"),
        ("step,loss,llc,llc_error\n1,2,3,-1\n", "Line 2 of .*, column 'llc_error', holds '-1'; .* isn't negative"),
        *(
            (f"step,loss,llc\n{step},2,3\n", rf"column 'step', holds '{step}'; a training step is a whole number")
            for step in ("1.5", "nan", "inf", "-1", "1e19", "", "ten")
        ),
        ("step,loss,llc\n1,2\n", "Line 2 of .* has 2 values for 3 columns"),
        (
            "step,loss,llc\n1,2,3\n1,2,4\n",
            "holds points that contradict each other. .* at step 1, with λ̂ 3 and 4",
        ),
    ],
)
def test_csv_that_cannot_be_read_is_a_sentence(tmp_path, text, complaint):
    with pytest.raises(PhasewatchError, match=complaint):
        read_csv(tmp_path, text)


@pytest.mark.parametrize("content", [b"\xff\x00\xfe", b"step\0,loss\n1,2\n"])
def test_a_csv_that_is_no_text(tmp_path, content):
    (tmp_path / "run.csv").write_bytes(content)
    with pytest.raises(PhasewatchError, match=r"run\.csv can't be read as comma-separated text in UTF-8: "):
        Trajectory.read(tmp_path / "run.csv")


def test_a_metric_that_no_point_of_a_run_carries(tmp_path):
    Trajectory([point(1, a=1.0), point(2, b=1.0)]).write(tmp_path / "points.jsonl")
    with pytest.raises(PhasewatchError, match=r"points\.jsonl has no signal 'c'; it has loss, llc, a, b\."):
        Trajectory.read(tmp_path / "points.jsonl", signal="c")
    assert len(Trajectory.read(tmp_path / "points.jsonl", signal="a")) == 2


def test_missing_files_and_unknown_suffixes(tmp_path):
    with pytest.raises(PhasewatchError, match=r"points\.jsonl is not there; check the path"):
        Trajectory.read(tmp_path / "points.jsonl")
    with pytest.raises(PhasewatchError, match=r"can't be read: a trajectory is a .*, not '\.parquet'"):
        Trajectory.read(tmp_path / "run.parquet")
    with pytest.raises(PhasewatchError, match=r"writes \.jsonl and \.csv, not ''"):
        Trajectory([point(1)]).write(tmp_path / "run")


def test_an_empty_jsonl_is_a_run_that_has_not_measured_yet(tmp_path):
    (tmp_path / "points.jsonl").touch()
    assert len(Trajectory.read(tmp_path / "points.jsonl")) == 0
