"""The run that pictures of the report are taken of shows what there is to look at."""

import phasewatch as pw


def test_seven_stages_of_both_kinds_with_doubts_and_hostile_names(script):
    trajectory = script("screens").seven_stages()
    kinds = [transition.kind.name for transition in pw.find_transitions(trajectory)]
    assert len(kinds) == 7
    assert set(kinds) == {"A", "B"}
    healths = {point.llc.health for point in trajectory}
    assert {pw.Health.OK, pw.Health.UNMIXED, pw.Health.DIVERGED} <= healths
    assert any("<" in name for name in trajectory[0].metrics)
