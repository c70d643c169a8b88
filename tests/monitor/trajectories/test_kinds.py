from itertools import product

from phasewatch.monitor.trajectories.kinds import Kind


def test_the_kind_follows_from_the_signs_of_loss_and_complexity():
    found = {(loss, llc): Kind.of(loss=loss, llc=llc) for loss, llc in product(["up", "flat", "down"], repeat=2)}
    assert found == {
        ("down", "up"): Kind.A,
        ("down", "down"): Kind.B,
        ("flat", "down"): Kind.B,
        ("up", "down"): Kind.OTHER,
        ("flat", "up"): Kind.OTHER,
        ("up", "up"): Kind.OTHER,
        ("down", "flat"): Kind.OTHER,
        ("flat", "flat"): Kind.OTHER,
        ("up", "flat"): Kind.OTHER,
    }


def test_each_kind_has_a_label_and_a_verdict():
    assert [kind.label for kind in Kind] == ["A", "B", "other"]
    assert len({kind.verdict for kind in Kind}) == len(Kind)
