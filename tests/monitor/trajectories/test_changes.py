import json
import math
from dataclasses import replace

import pytest

from phasewatch.monitor.trajectories.changes import Change, Transition
from phasewatch.monitor.trajectories.kinds import Kind

LOSS, LLC = Change(1.89, 1.78, 0.02, "down"), Change(169.7, 112.8, 3.1, "down")
B = Transition(
    Kind.B, "llc", 40_404, 318_181, (39_000, 41_000), (315_000, 320_000), 0.999, False, {"loss": LOSS, "llc": LLC}
)


def changed(transition, **changes):
    return replace(transition, changes={**transition.changes, **changes})


def test_changes_by_name():
    assert B.change is LLC
    assert (B.loss_change, B.llc_change) == (LOSS.value, LLC.value) == (1.78 - 1.89, 112.8 - 169.7)
    score = replace(B, signal="score", changes={"score": Change(0.5, 0.75, 0.01, "up")})
    assert score.change.value == 0.25
    assert math.isnan(score.loss_change)
    assert math.isnan(score.llc_change)
    assert hash(B) == hash(changed(B))


def test_str():
    assert str(B) == "B  steps 40 404 -> 318 181  loss 1.890 -> 1.780 (down)  llc 169.7 -> 112.8 (down, 99.9 %)"
    up = changed(B, loss=Change(1.89, 1.9, 0.02, "up"), llc=Change(169.7, 180.0, 3.1, "up"))
    other = replace(up, kind=Kind.OTHER, provisional=True, confidence=0.9567)
    assert str(other) == (
        "OTHER (loss up, llc up)  steps 40 404 -> 318 181  loss 1.890 -> 1.900 (up)"
        "  llc 169.7 -> 180.0 (up, 95.6 %) provisional"
    )
    assert str(replace(other, points=14, doubtful=12)).endswith("(up, 95.6 %) provisional, 12 of 14 points doubtful")
    assert str(replace(B, points=1400, doubtful=1)).endswith("(down, 99.9 %) 1 of 1 400 points doubtful")


def test_str_never_claims_certainty():
    for confidence in (0.9991, 0.999999, 1.0):
        assert "(down, > 99.9 %)" in str(replace(B, confidence=confidence))
        assert "100" not in str(replace(B, confidence=confidence))


def test_str_tells_small_numbers_apart():
    small = changed(B, loss=Change(1e-5, 0.9e-5, 0.0, "down"), llc=Change(0.253, 0.251, 0.0, "down"))
    assert "steps 7 -> " in str(replace(small, start=7))
    assert "loss 0.0000100 -> 0.0000090" in str(small)
    assert "llc 0.2530 -> 0.2510" in str(small)
    assert "llc 0.0 -> -57.0" in str(changed(B, llc=Change(-0.01, -57.0, 1.0, "down")))


def test_sentence():
    assert B.sentence() == (
        "Between steps 40 404 and 318 181 the loss fell slightly, 1.890 to 1.780, "
        "while the complexity λ̂ fell from 169.7 to 112.8: a type B transition, the model simplified itself. "
        "The sign of the complexity's change is right with probability 99.9 %."
    )
    a = changed(B, loss=replace(LOSS, before=4.1), llc=replace(LLC, after=200.0, trend="up"))
    a = replace(a, kind=Kind.A, provisional=True)
    assert "the loss fell, 4.100 to 1.780, while the complexity λ̂ rose from 169.7 to 200.0: a type A" in a.sentence()
    assert a.sentence().endswith("Later points may still move it.")
    assert "the loss stayed flat at 1.780" in changed(B, loss=replace(LOSS, trend="flat")).sentence()
    assert "neither a type A nor a type B" in replace(B, kind=Kind.OTHER).sentence()
    assert (
        replace(a, points=1400, doubtful=1000)
        .sentence()
        .endswith(
            "is right with probability 99.9 %. This does not account for doubtful estimates, which are at 1 000 of the "
            "1 400 points in between. Later points may still move it."
        )
    )


def test_another_signal_in_words():
    score = changed(replace(B, signal="score"), score=Change(0.5, -0.25, 0.01, "down"))
    assert str(score) == (
        "B  steps 40 404 -> 318 181  score 0.500 -> -0.250 (down, 99.9 %)  loss 1.890 -> 1.780 (down)"
        "  llc 169.7 -> 112.8 (down)"
    )
    assert score.sentence() == (
        "Between steps 40 404 and 318 181 score fell from 0.500 to -0.250, while the loss fell slightly, 1.890 to "
        "1.780 and the complexity λ̂ fell from 169.7 to 112.8: a type B transition, the model simplified itself. "
        "The sign of score's change is right with probability 99.9 %."
    )
    alone = replace(score, kind=Kind.OTHER, changes={"score": score.change})
    assert str(alone) == "OTHER  steps 40 404 -> 318 181  score 0.500 -> -0.250 (down, 99.9 %)"
    assert alone.sentence() == (
        "Between steps 40 404 and 318 181 score fell from 0.500 to -0.250. "
        "The sign of score's change is right with probability 99.9 %."
    )
    loss = replace(B, signal="loss")
    assert "loss 1.890 -> 1.780 (down, 99.9 %)  llc 169.7 -> 112.8 (down)" in str(loss)
    assert "The sign of the loss's change" in loss.sentence()
    assert "λ̂ stayed flat at 112.8" in changed(score, llc=replace(LLC, trend="flat")).sentence()


@pytest.mark.parametrize(
    "transition",
    [
        B,
        replace(B, provisional=True, points=14, doubtful=12, confidence=1 / 3),
        changed(replace(B, signal="näme"), näme=Change(1 / 3, -1e-300, math.inf, "flat")),
    ],
)
def test_the_json_round_trip_is_exact(transition):
    text = json.dumps(transition.as_json(), allow_nan=False)
    back = Transition.from_json(json.loads(text))
    assert back == transition
    assert repr(back) == repr(transition)
    assert json.dumps(back.as_json()) == text


def test_a_number_that_is_not_finite_is_a_word_in_json():
    record = changed(B, llc=replace(LLC, error=math.nan)).as_json()
    assert record["changes"]["llc"] == {"before": 169.7, "after": 112.8, "error": "nan", "trend": "down"}
    assert (record["kind"], record["signal"], record["start"], record["end"]) == ("B", "llc", 40_404, 318_181)
    assert math.isnan(Transition.from_json(record).change.error)
