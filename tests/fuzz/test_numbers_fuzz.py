"""Any numbers that a table may hold give stages or a sentence. FUZZ_EXAMPLES=10000 searches for longer."""

import os
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import phasewatch as pw
from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

MAGNITUDES = st.sampled_from([0.0, 5e-324, 1e-310, 1e-200, 1e-9, 1.0, 3e38, 1e100, 1e150, 1e155, 1e300, 1.7e308])
NUMBERS = st.one_of(
    st.floats(), st.floats(-10, 10), st.builds(lambda m, sign: m * sign, MAGNITUDES, st.sampled_from([-1, 1]))
)
STARTS = st.sampled_from([0, 1, 10**12, 10**15, 1_700_000_000_000_000_000, LARGEST_STEP - 2000])


def series(count):
    """Noise, ramps and constants of any size, with numbers of any other size among them."""
    rng = np.random.default_rng(count)

    def build(scale, slope, noise, wrong):
        values = [scale * (slope * i / count + noise * float(rng.normal()) / 10) for i in range(count)]
        for i, value in wrong.items():
            values[i % count] = value
        return values

    return st.builds(
        build,
        MAGNITUDES,
        st.sampled_from([-1.0, 0.0, 1.0]),
        st.sampled_from([0.0, 1e-12, 0.1, 1.0]),
        st.dictionaries(st.integers(0, 100), NUMBERS, max_size=3),
    )


@st.composite
def trajectories(draw):
    count = draw(st.sampled_from([1, 4, 5, 6, 30, 80]))
    start = draw(STARTS)
    steps = start + np.cumsum(draw(st.sampled_from([1, 2, 20])) * np.ones(count, dtype=np.int64))
    if draw(st.booleans()) and start < 10**13:
        steps = np.unique(np.geomspace(max(start, 1), LARGEST_STEP // 2, count).astype(np.int64))
    count = len(steps)
    llc, loss, metric = (draw(series(count)) for _ in range(3))
    return steps.tolist(), llc, loss, metric


def check(steps, llc, loss, metric):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            trajectory = pw.Trajectory.from_values(steps, loss=loss, llc=llc, metrics={"metric": metric})
            for signal in ("llc", "loss", "metric"):
                found = pw.find_transitions(trajectory, signal=signal)
                for transition in found:
                    assert transition.start < transition.end
                    assert 0.5 <= transition.confidence <= 1
                    assert str(transition)
                    assert transition.sentence()
                    assert pw.Transition.from_json(transition.as_json()).as_json() == transition.as_json()
        except PhasewatchError:
            pass


@fuzz
@given(trajectories())
@example(
    ([*range(30)], [float(i) for i in range(30)], [1e150 if i == 20 else 1 / (1 + i) for i in range(30)], [0.0] * 30)
)
@example(([*range(30)], [1e300] * 30, [1.0] * 30, [5e-324 * i for i in range(30)]))
@example(([LARGEST_STEP - 30 + i for i in range(30)], [1.7e308 * (-1) ** i for i in range(30)], [1.0] * 30, [0.0] * 30))
def test_any_series_has_stages_or_a_sentence(numbers):
    check(*numbers)


@pytest.mark.parametrize("scale", [2.0**-900, 2.0**-100, 2.0**100, 2.0**900])
def test_the_size_of_numbers_changes_no_stage(scale):
    rng = np.random.default_rng(0)
    steps = np.unique(np.geomspace(1, 10_000, 60).astype(int))
    learned = 1 / (1 + (100 / steps) ** 3)
    loss, llc = 3 - learned + 0.01 * rng.normal(size=len(steps)), 10 + 80 * learned + 0.3 * rng.normal(size=len(steps))
    plain = pw.find_transitions(pw.Trajectory.from_values(steps, loss=loss, llc=llc))
    scaled = pw.find_transitions(pw.Trajectory.from_values(steps, loss=scale * loss, llc=scale * llc))
    assert len(plain) == 1
    assert [(t.kind, t.start, t.end, t.confidence) for t in scaled] == [
        (t.kind, t.start, t.end, t.confidence) for t in plain
    ]
    assert scaled[0].change.value == scale * plain[0].change.value
