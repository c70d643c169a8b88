import pytest

from phasewatch import Estimate, Health, Langevin, Point


@pytest.fixture
def curve(script):
    return script("cost_of_a_curve")


def point(step, *chains, health=Health.OK):
    return Point(step, 1.0, Estimate(sum(chains) / 2, 0.1 * step, chains, 100.0, 1.0, 50.0, health))


def test_errors_are_shares_of_the_range_of_points_with_a_level(curve):
    points = [
        point(1, -70.0, -70.0, health=Health.NEGATIVE),
        point(2, 9.0, 11.0),  # 10
        point(3, 19.0, 21.0),  # 20: the chains moved by 10 each
        point(4, 59.0, 61.0 + 2.0),  # 61: by 40 and by 42
    ]
    row = curve.row("some", points, Langevin(step_size=1e-3, chains=2, burn_in=7, draws=9), gradients=321)
    assert row["range of λ̂"] == 51
    assert row["chains"] == "2 x (7 + 9)"
    assert row["gradients of a point"] == 321
    assert row["error / range: median, worst"] == f"{0.3 / 51:.2%}, {0.4 / 51:.2%}"
    worst = 12.706 / 2 * 1.0  # two chains, whose differences are 1 from their mean
    assert row["of difference: median, worst"] == f"{worst / 2 / 51:.2%}, {worst / 51:.2%}"
    assert row["differences within 1 %"] == "1 of 2"


def test_snapshots_are_of_the_run_that_its_seed_has(curve):
    task = curve.TASKS["regression"]
    first, again, other = (task.snapshots(seed, 3) for seed in (0, 0, 1))
    assert [snapshot.step for snapshot in first] == [0, 1, 2, 3]
    for name, tensor in first[-1].tensors.items():
        assert tensor.equal(again[-1].tensors[name])
    assert any(not tensor.equal(other[-1].tensors[name]) for name, tensor in first[-1].tensors.items())
