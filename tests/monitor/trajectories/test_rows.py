"""Tables as other programs write them: which column is the step, and which rows are one point."""

import json
import math

import numpy as np
import pytest

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.trajectories.trajectory import Trajectory


def table(tmp_path, kind, records):
    """The same records as a csv, a jsonl, or a list in a JSON file."""
    path = tmp_path / f"table.{kind}"
    columns = list(dict.fromkeys(column for record in records for column in record))
    if kind == "csv":
        lines = [",".join(columns), *(",".join(str(record.get(c, "")) for c in columns) for record in records)]
        path.write_text("\n".join(lines))
    else:
        path.write_text(json.dumps(records) if kind == "json" else "\n\n".join(map(json.dumps, records)))
    return path


KINDS = ["csv", "jsonl", "json"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["_step", "global_step"], "global_step"),
        (["_step", "trainer/global_step"], "trainer/global_step"),
        (["_step", "train/global_step", "eval/global_step"], "train/global_step"),
        (["train/global_step", "trainer/global_step"], "trainer/global_step"),
        (["global_step", "step"], "step"),
        (["_step", "policy/global_step"], "policy/global_step"),
        (["Step", "Wall time"], "Step"),
        (["_step", "epoch"], "_step"),
        (["_step", "iteration"], "iteration"),
        (["epoch", "iter_num"], "iter_num"),
        (["Step", "train/step"], "train/step"),
        (["val/step", "_step"], "_step"),
        (["epoch", "Training Step"], "Training Step"),
    ],
)
def test_the_column_of_the_step(tmp_path, kind, names, chosen):
    records = [{**{name: 7 * i for name in names}, chosen: 100 * i, "acc": i / 4} for i in range(5)]
    trajectory = Trajectory.read(table(tmp_path, kind, records), signal="acc")
    assert trajectory.steps.tolist() == [0, 100, 200, 300, 400]
    np.testing.assert_array_equal(trajectory.signal("acc"), np.arange(5) / 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_the_first_column_that_all_rows_with_the_signal_have(tmp_path, kind):
    training = [{"_step": 2 * i, "trainer/global_step": 50 * i, "loss": 2 - i / 9} for i in range(4)]
    by_hand = [{"_step": 2 * i + 1, "score": i} for i in range(4)]
    path = table(tmp_path, kind, [row for pair in zip(training, by_hand, strict=True) for row in pair])
    assert Trajectory.read(path, signal="loss").usable("loss").steps.tolist() == [0, 50, 100, 150]
    assert Trajectory.read(path, signal="score").usable("score").steps.tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_named_by_the_user(tmp_path, kind):
    path = table(tmp_path, kind, [{"step": 1, "tokens": 1000 * i, "loss": 2 - i / 9} for i in range(4)])
    assert Trajectory.read(path, signal="loss", step="tokens").steps.tolist() == [0, 1000, 2000, 3000]
    with pytest.raises(PhasewatchError, match=r"no column 'words', and needs one; its columns are step, tokens, loss"):
        Trajectory.read(path, signal="loss", step="words")
    if kind != "json":  # in which the last one counts
        with pytest.raises(PhasewatchError, match=r"two different points at step 1, with loss 2 and 1\.88889"):
            Trajectory.read(path, signal="loss")


def test_no_column_of_steps(tmp_path):
    path = table(tmp_path, "csv", [{"epoch": 1, "loss": 2}])
    with pytest.raises(
        PhasewatchError, match=r"no column 'step', and needs one; .* epoch, loss; name the one that counts it \(--step"
    ):
        Trajectory.read(path, signal="loss")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_step_that_complete_each_other_are_one_point(tmp_path, kind):
    """Of different order, with an empty row between, and with other columns that differ."""
    records = []
    for i in range(5):
        pair = [{"step": i, "wall": i, "train_loss": 2 - i / 9}, {"step": i, "wall": i + 0.5, "val_loss": 3 - i / 9}]
        records += [*(pair if i % 2 else pair[::-1]), {"step": i, "epoch": 0}]
    path = table(tmp_path, kind, records)
    for name, first in (("train_loss", 2), ("val_loss", 3)):
        trajectory = Trajectory.read(path, signal=name)
        np.testing.assert_allclose(trajectory.signal(name), first - np.arange(5) / 9)
        assert trajectory.steps.tolist() == list(range(5))
    assert [point.metrics["epoch"] for point in trajectory] == [0] * 5


def test_loss_and_complexity_in_rows_of_their_own(tmp_path):
    records = [{"step": i, column: value} for i in (1, 2) for column, value in (("loss", 2 / i), ("llc", 3 * i))]
    trajectory = Trajectory.read(table(tmp_path, "csv", records))
    assert (trajectory.loss.tolist(), trajectory.llc.tolist()) == ([2, 1], [3, 6])


def test_equal_rows_are_one_and_contradicting_ones_are_named(tmp_path):
    same = [{"step": 1, "loss": 2.0}] * 2
    assert len(Trajectory.read(table(tmp_path, "csv", same), signal="loss")) == 1
    with pytest.raises(PhasewatchError, match="two different points at step 1, with loss 2 and 3"):
        Trajectory.read(table(tmp_path, "csv", [*same, {"step": 1, "loss": 3.0}]), signal="loss")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["", "NaN", "Infinity", "-inf", "1e400"])
def test_a_cell_without_a_finite_value_is_left_out(tmp_path, kind, word):
    records = [{"step": i, "loss": word if i == 3 else float(9 - i), "llc": 1.0} for i in range(6)]
    for signal in ("loss", "llc"):
        trajectory = Trajectory.read(table(tmp_path, kind, records), signal=signal)
        assert math.isnan(trajectory.loss[3])
        assert trajectory.usable(signal).steps.tolist() == [0, 1, 2, 4, 5]


def test_a_jsonl_has_the_names_that_w_and_b_exports_too(tmp_path):
    records = [{"phase/step": i, "phase/llc": 5 + i, "phase/loss": 2.5, "phase/health": "OK"} for i in (3, 4)]
    trajectory = Trajectory.read(table(tmp_path, "jsonl", records))
    assert (trajectory.steps.tolist(), trajectory.llc.tolist()) == ([3, 4], [8, 9])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_user_s_loss_beside_ours(tmp_path, kind):
    """A W&B run that a sink joined: both log a loss, in rows of their own."""
    own = [{"_step": i, "loss": 9 - i, "global_step": 10 * i} for i in range(4)]
    ours = [{"_step": i, "phase/step": 5 * i, "phase/loss": 2.0, "phase/llc": 30 + i} for i in range(4)]
    path = table(tmp_path, kind, own + ours)
    by_llc = Trajectory.read(path)
    assert (by_llc.steps.tolist(), by_llc.loss.tolist()) == ([0, 5, 10, 15], [2.0] * 4)
    by_loss = Trajectory.read(path, signal="loss").usable("loss")
    assert (by_loss.steps.tolist(), by_loss.loss.tolist()) == ([0, 10, 20, 30], [9, 8, 7, 6])
    assert Trajectory.read(path, signal="phase/loss").usable("phase/loss").signal("phase/loss").tolist() == [2.0] * 4


@pytest.mark.parametrize(("suffix", "mark"), [("tsv", "\t"), ("csv", "\t"), ("csv", ";")])
def test_tabs_and_semicolons_stand_between_columns_where_no_comma_does(tmp_path, suffix, mark):
    path = tmp_path / f"table.{suffix}"
    path.write_text("\n".join(["step;acc", *(f"{100 * i};{i / 4}" for i in range(5))]).replace(";", mark))
    np.testing.assert_array_equal(Trajectory.read(path, signal="acc").signal("acc"), np.arange(5) / 4)


@pytest.mark.parametrize("word", ["NA", "n/a", "null", "None", "1.#INF", "-1.#IND", "∞", "-Infinity", "nan"])
def test_what_other_programs_write_in_place_of_a_number_counts_as_empty(tmp_path, word):
    path = table(tmp_path, "csv", [{"step": 100 * i, "acc": word if i == 2 else i} for i in range(5)])
    assert Trajectory.read(path, signal="acc").usable("acc").steps.tolist() == [0, 100, 300, 400]


def test_objects_in_a_jsonl_are_columns(tmp_path):
    rows = [{"train": {"step": 100 * i, "loss": {"all": i}}, "table": {"_type": "table-file"}} for i in range(5)]
    trajectory = Trajectory.read(table(tmp_path, "jsonl", rows), signal="train/loss/all")
    assert trajectory.steps.tolist() == [0, 100, 200, 300, 400]
