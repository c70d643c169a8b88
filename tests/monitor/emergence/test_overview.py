import json

import numpy as np
import pytest
from scipy.special import expit
from typer.testing import CliRunner

from phasewatch import PhasewatchError
from phasewatch.cli import app
from phasewatch.monitor.emergence.overview import overview

STEPS = np.geomspace(100, 100_000, 30).round().astype(int)


def table(tmp_path, **extra):
    """A format that is learned at step 8,000 while the likelihood rises gradually."""
    z = np.linspace(0, 1, 30)
    rng = np.random.default_rng(0)
    columns = {
        "step": STEPS,
        "acc": 0.25 + 0.6 * expit((z - 0.63) / 0.01) + 0.005 * rng.normal(size=30),
        "log_p": -3 + 2 * z + 0.01 * rng.normal(size=30),
    } | extra
    file = tmp_path / "scores.csv"
    rows = zip(*columns.values(), strict=True)
    file.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]))
    return file


def test_a_table_gets_a_verdict_a_forecast_and_no_red_flag(tmp_path):
    found = overview(table(tmp_path), sharp="acc", smooth="log_p", chance=0.25, at=[300_000])
    assert found.verdict.kind == "unseen by the smooth score"
    assert found.reversal is None
    assert found.forecast.onset.median == pytest.approx(8000 * 0.85, rel=0.25)
    assert "RED FLAG" not in str(found)
    assert "100 000" in str(found)


def test_a_table_may_count_tokens(tmp_path):
    file = table(tmp_path)
    by_step = str(overview(file, sharp="acc", smooth="log_p", chance=0.25))
    file.write_text(file.read_text().replace("step", "tokens", 1))
    with pytest.raises(PhasewatchError, match=r"no column 'step'.*--step"):
        overview(file, sharp="acc", smooth="log_p", chance=0.25)
    assert str(overview(file, sharp="acc", smooth="log_p", chance=0.25, step="tokens")) == by_step


def test_a_smooth_score_that_turns_raises_a_red_flag_whatever_its_sign(tmp_path):
    z = np.linspace(0, 1, 30)
    noise = 0.01 * np.random.default_rng(1).normal(size=30)
    turned = -3 + 2 * z - 0.1 * np.maximum(np.arange(30) - 20, 0) + noise
    for name, values in (("log_p", turned), ("bits", -turned)):
        found = overview(table(tmp_path, **{name: values}), sharp="acc", smooth=name, chance=0.25)
        assert found.reversal is not None
        assert f"RED FLAG: {name} has turned" in str(found)


def test_complexity_is_set_beside_the_scores(tmp_path):
    z = np.linspace(0, 1, 30)
    rng = np.random.default_rng(2)
    file = table(tmp_path, llc=10 + 30 * expit((z - 0.3) / 0.03) + 0.1 * rng.normal(size=30), loss=4 - 2 * z)
    found = overview(file, sharp="acc", smooth="log_p", chance=0.25)
    assert any("llc" in remark or "complexity" in remark for remark in found.remarks)


def samples(tmp_path):
    rng = np.random.default_rng(0)
    for step in (1000, 2000, 4000, 8000):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        odds = rng.normal(np.log(step / 1000), 0.5, 50)
        rows = [
            {
                "doc_id": i,
                "target": 0,
                "filtered_resps": [[str(-1 - np.exp(-o)), "False"], [str(-1 - np.exp(o)), "False"]],
            }
            for i, o in enumerate(odds)
        ]
        (folder / "samples_made.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_logged_samples_get_their_chain_and_where_it_loses(tmp_path):
    found = overview(samples(tmp_path))
    assert list(found.scores) == ["log_p", "p", "p_among_choices", "brier", "accuracy"]
    assert found.attribution is not None
    assert "A verdict takes at least 8 steps, and there are 4" in str(found)


def test_the_command_prints_it_and_draws_it(tmp_path):
    picture = tmp_path / "picture.png"
    arguments = ["emergence", str(table(tmp_path)), "--sharp", "acc", "--smooth", "log_p", "--chance", "0.25"]
    result = CliRunner().invoke(app, [*arguments, "--at", "200000", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert "At 2e+05" in result.output
    assert picture.stat().st_size > 1000


def test_bad_calls_are_sentences(tmp_path):
    file = table(tmp_path)
    with pytest.raises(PhasewatchError, match="needs --sharp and --smooth"):
        overview(file, sharp="acc")
    with pytest.raises(PhasewatchError, match="chance isn't given"):
        overview(file, sharp="acc", smooth="log_p")
    with pytest.raises(PhasewatchError, match="'f1'"):
        overview(file, sharp="f1", smooth="log_p", chance=0.25)
    with pytest.raises(PhasewatchError, match="there is no score 'f1', but log_p"):
        overview(samples(tmp_path), sharp="f1")


def test_a_table_of_items_needs_no_names_of_scores_and_a_table_of_scores_needs_chance(tmp_path):
    table = tmp_path / "items.csv"
    rows = [
        f"{step},{item},{choice},{-1 - choice},{1 - choice}" for step in (1, 2) for item in "ab" for choice in (0, 1)
    ]
    table.write_text("step,item,choice,log_p,right\n" + "\n".join(rows) + "\n")
    assert list(overview(table).scores) == ["log_p", "p", "p_among_choices", "brier", "accuracy"]
    whole = tmp_path / "scores.csv"
    whole.write_text("step,acc,log_p\n1,0.3,-2\n2,0.4,-1\n")
    with pytest.raises(PhasewatchError, match="--chance isn't given"):
        overview(whole, sharp="acc", smooth="log_p")
    with pytest.raises(PhasewatchError, match="there is no such folder or file"):
        overview(tmp_path / "nothing")


def test_a_log_p_above_0_is_a_sentence_and_steps_without_both_scores_are_counted(tmp_path):
    with pytest.raises(PhasewatchError, match="a log probability is at most 0"):
        overview(table(tmp_path, log_p=np.linspace(0.2, 1.4, 30)), sharp="acc", smooth="log_p", chance=0.25)
    surprise = table(tmp_path, neg_log_prob=np.linspace(3, 1, 30))  # above 0 as it should be
    assert overview(surprise, sharp="acc", smooth="neg_log_prob", chance=0.25).verdict is not None
    holes = [("" if i % 10 == 0 else -3 + i / 15) for i in range(30)]
    found = overview(table(tmp_path, log_p=holes), sharp="acc", smooth="log_p", chance=0.25)
    assert "3 of 30 steps lack one of the two scores" in str(found)
