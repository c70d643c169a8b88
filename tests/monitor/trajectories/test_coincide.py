import math
import random
import subprocess
import sys

import pytest

import phasewatch as pw
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.trajectories import coincide as matching
from phasewatch.monitor.trajectories.changes import Transition
from phasewatch.monitor.trajectories.coincide import coincide
from phasewatch.monitor.trajectories.kinds import Kind


def a_transition(start, end, signal="llc", starts=None, ends=None):
    return Transition(Kind.A, signal, start, end, starts or (start, start), ends or (end, end), 0.99, False, {})


def stages(seed, signal, unit=1):
    """One to six stages in order, some with a plateau between them, with intervals of their own."""
    rng = random.Random(seed)
    marks = sorted(rng.sample(range(1, 2000), 2 * rng.randint(1, 6)))
    marks = [0, *marks[1:]] if rng.random() < 0.3 else marks

    def around(mark):
        return (max(0, mark - rng.randint(0, 60)) * unit, (mark + rng.randint(0, 90)) * unit)

    return [
        a_transition(a * unit, b * unit, signal, around(a), around(b))
        for a, b in zip(marks[::2], marks[1::2], strict=True)
    ]


def test_each_goes_with_the_one_that_it_overlaps_most_and_the_rest_are_alone():
    llc = [a_transition(1_000, 40_000), a_transition(40_000, 126_000), a_transition(330_000, 500_000)]
    score = [
        a_transition(20, 60, "score"),
        a_transition(2_000, 30_000, "score"),
        a_transition(35_000, 140_000, "score"),
    ]
    found = coincide(llc, score)
    assert [(pair.first, pair.second) for pair in found.pairs] == [(llc[0], score[1]), (llc[1], score[2])]
    assert found.only_first == (llc[2],)
    assert found.only_second == (score[0],)


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        ((100, 10_000), (100, 10_000), 1.0),
        ((100, 10_000), (1_000, 10_000), 1 / 2),
        ((100, 10_000), (1_000, 100_000), 1 / 3),
        ((10, 100_000), (100, 1_000), 1 / 4),
    ],
)
def test_overlap_is_what_both_share_of_what_either_covers(monkeypatch, a, b, overlap):
    monkeypatch.setattr(matching, "MIN_OVERLAP", overlap - 1e-12)
    (pair,) = coincide([a_transition(*a)], [a_transition(*b, "loss")]).pairs
    assert pair.overlap == pytest.approx(overlap)
    monkeypatch.setattr(matching, "MIN_OVERLAP", min(1, overlap + 1e-6))
    assert coincide([a_transition(*a)], [a_transition(*b, "loss")]).pairs == ((pair,) if overlap == 1 else ())


@pytest.mark.parametrize("b", [(100, 1_000), (200, 300), (1, 9), (1, 10)])
def test_what_only_touches_or_lies_apart_never_goes_together(monkeypatch, b):
    monkeypatch.setattr(matching, "MIN_OVERLAP", 1e-9)
    assert coincide([a_transition(10, 100)], [a_transition(*b, "loss")]).pairs == ()


def test_boundaries_that_cannot_be_told_apart_count_as_one():
    exact = a_transition(1_000, 2_000), a_transition(1_800, 4_000, "loss")
    assert coincide(exact[:1], exact[1:]).pairs == ()
    unsure = a_transition(1_000, 2_000, starts=(900, 1_400)), a_transition(1_800, 4_000, "loss", starts=(1_400, 2_100))
    (pair,) = coincide(unsure[:1], unsure[1:]).pairs
    assert pair.overlap == pytest.approx(1 - math.log(2) / math.log(4))


def test_of_pairs_that_overlap_alike_the_closer_go_together():
    wide = a_transition(1_000, 4_000, starts=(100, 4_000), ends=(1_000, 40_000))
    others = [a_transition(500, 1_900, "loss"), a_transition(2_000, 5_000, "loss")]
    (pair,) = coincide([wide], others).pairs
    assert pair.overlap == 1
    assert pair.second == others[1]


def test_lags_and_their_intervals_by_hand():
    a = a_transition(1_000, 9_000, starts=(970, 1_040), ends=(8_000, 9_500))
    b = a_transition(1_100, 8_500, "loss", starts=(1_070, 1_140), ends=(8_400, 8_600))
    (pair,) = coincide([a], [b]).pairs
    assert (pair.start_lag, pair.start_lag_interval) == (100, (50, 150))  # 30 and 40 on either side
    assert pair.end_lag == -500
    assert pair.end_lag_interval == (math.floor(-500 - math.hypot(100, 500)), math.ceil(-500 + math.hypot(100, 1_000)))
    assert (pair.starts_first, pair.ends_first) == ("first", "unclear")


def test_the_lag_s_interval_holds_the_true_lag_in_95_of_100_cases():
    rng = random.Random(0)
    held = 0
    for _ in range(4_000):
        marks = [rng.gauss(1_000, 40), rng.gauss(1_150, 90), 5_000, 5_000]
        a, b = (
            a_transition(round(s), e, metric, starts=(round(s - 1.96 * sd), round(s + 1.96 * sd)))
            for s, e, sd, metric in zip(marks[:2], marks[2:], (40, 90), ("llc", "loss"), strict=True)
        )
        (pair,) = coincide([a], [b]).pairs
        held += pair.start_lag_interval[0] <= 150 <= pair.start_lag_interval[1]
    assert held / 4_000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4_000))


@pytest.mark.parametrize("seed", range(60))
def test_swapping_the_signals_mirrors_the_result(seed):
    first, second = stages(seed, "llc"), stages(seed + 1_000, "loss")
    there, back = coincide(first, second), coincide(second, first)
    assert (there.only_first, there.only_second) == (back.only_second, back.only_first)
    mirrored = {(pair.second.start, pair.first.start): pair for pair in back.pairs}
    assert len(there.pairs) == len(mirrored)
    for pair in there.pairs:
        other = mirrored[pair.first.start, pair.second.start]
        assert (pair.first, pair.second, pair.overlap) == (other.second, other.first, other.overlap)
        assert (pair.start_lag, pair.end_lag) == (-other.start_lag, -other.end_lag)
        assert pair.start_lag_interval == tuple(-x for x in reversed(other.start_lag_interval))
        assert pair.end_lag_interval == tuple(-x for x in reversed(other.end_lag_interval))


@pytest.mark.parametrize("seed", range(60))
def test_another_unit_of_the_step_scales_the_lags_and_nothing_else(seed):
    ones, thousands = (coincide(stages(seed, "llc", unit), stages(seed + 1_000, "loss", unit)) for unit in (1, 1_000))
    assert [t.start * 1_000 for t in ones.only_first] == [t.start for t in thousands.only_first]
    assert [t.start * 1_000 for t in ones.only_second] == [t.start for t in thousands.only_second]
    for one, thousand in zip(ones.pairs, thousands.pairs, strict=True):
        assert thousand.first.start == 1_000 * one.first.start
        assert thousand.overlap == pytest.approx(one.overlap)
        assert thousand.start_lag == 1_000 * one.start_lag
        assert thousand.end_lag == 1_000 * one.end_lag
        assert thousand.start_lag_interval == pytest.approx([1_000 * x for x in one.start_lag_interval], abs=1_000)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_lost_doubled_moved_or_dependent_on_the_order(seed):
    first, second = stages(seed, "llc"), stages(seed + 1_000, "loss")
    before = list(first), list(second)
    found = coincide(first, second)
    assert (first, second) == before
    assert sorted([p.first for p in found.pairs] + list(found.only_first), key=lambda t: t.start) == first
    assert sorted([p.second for p in found.pairs] + list(found.only_second), key=lambda t: t.start) == second
    assert coincide(reversed(first), reversed(second)) == found
    for a in found.only_first:  # what is alone has no free partner that it overlaps
        assert coincide([a], found.only_second).pairs == ()
    for pair in found.pairs:
        assert 1 / 3 <= pair.overlap <= 1
        assert pair.start_lag_interval[0] <= pair.start_lag <= pair.start_lag_interval[1]
        assert pair.end_lag_interval[0] <= pair.end_lag <= pair.end_lag_interval[1]


def test_a_trajectory_s_transitions_coincide_with_themselves():
    first = stages(3, "llc")
    found = coincide(first, first)
    assert [(p.first, p.second, p.overlap, p.start_lag) for p in found.pairs] == [(t, t, 1.0, 0) for t in first]


def test_step_zero_is_a_step():
    (pair,) = coincide([a_transition(0, 1_000)], [a_transition(0, 900, "loss")]).pairs
    assert pair.overlap == pytest.approx(1 - math.log(10 / 9) / (math.log(10 / 9) + 1))
    assert (pair.start_lag, pair.end_lag) == (0, -100)
    assert coincide([a_transition(0, 0)], [a_transition(0, 0, "loss")]).pairs[0].overlap == 1


def test_nothing_coincides_with_nothing():
    found = coincide([], iter([]))
    assert (found.pairs, found.only_first, found.only_second) == ((), (), ())
    assert str(found) == "No transition of one goes with one of the other."


def test_in_words():
    a = a_transition(1_000, 9_000, starts=(970, 1_040), ends=(8_000, 9_500))
    b = a_transition(1_100, 8_500, "score", starts=(1_070, 1_140), ends=(8_400, 8_600))
    late = a_transition(20_000, 50_000)
    assert str(coincide([a, late], [b])).splitlines() == [
        "llc 1 000 -> 9 000 goes with score 1 100 -> 8 500: score starts 100 steps later (95 %: 50 to 150) and ends "
        "500 steps earlier (95 %: 1 010 earlier to 505 later).",
        "Alone: llc 20 000 -> 50 000.",
    ]
    assert str(coincide([late], [late])) == (
        "the first 20 000 -> 50 000 goes with the second 20 000 -> 50 000: the second starts at the same step "
        "(95 %: 0 earlier to 0 later) and ends at the same step (95 %: 0 earlier to 0 later)."
    )
    assert str(coincide([late], [b])) == (
        "No transition of one goes with one of the other.\nAlone: llc 20 000 -> 50 000, score 1 100 -> 8 500."
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ([a_transition(1, 2)], 3),
            r"coincide\(second=...\) takes the transitions .* returns, and got a int",
        ),
        (("ab", []), r"coincide\(first=...\) takes the transitions .* got a str"),
        (([a_transition(1, 2), a_transition(3, 4, "loss")], []), r"coincide\(first=...\) got .* of llc and loss; pass"),
    ],
)
def test_what_is_no_list_of_one_signal_s_transitions_is_refused(arguments, says):
    with pytest.raises(PhasewatchError, match=says):
        coincide(*arguments)


def test_it_is_public_and_needs_no_torch():
    assert pw.coincide is coincide
    code = "import phasewatch as pw, sys; pw.coincide([], []); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
