import json

import numpy as np
import pytest

from phasewatch import PhasewatchError, emergence

RIGHT = [0, 1, 1]
LOG_P = {1000: [[-2.0, -1.0], [-3.0, -2.0], [-1.5, -1.6]], 3000: [[-1.0, -2.5], [-3.0, -0.5], [-1.5, -1.2]]}


def line(item, log_p, target, **other):
    """As version 0.4.13 writes it: numbers and flags are strings."""
    record = {
        "doc_id": item,
        "doc": {"target": "unlike", "arguments": "none"},
        "target": str(target),
        "arguments": {f"gen_args_{i}": {"arg_0": "Q", "arg_1": " é" * (i + 1)} for i in range(len(log_p))},
        "resps": [[[str(value), "False"]] for value in log_p],
        "filtered_resps": [[str(value), "False"] for value in log_p],
        "filter": "none",
        "metrics": ["acc"],
        "acc": float(np.argmax(log_p) == target),
    }
    return record | other


def folder_of(tmp_path, change=lambda record: record, task="arc", model_args="pretrained=org/model,revision=step{}"):
    """Two revisions in one folder, told apart by the results of the same time."""
    folder = tmp_path / "org__model"
    folder.mkdir(exist_ok=True)
    for day, (step, rows) in enumerate(LOG_P.items()):
        time = f"2026-08-0{day + 1}T10-00-00.1234"
        (folder / f"results_{time}.json").write_text(json.dumps({"config": {"model_args": model_args.format(step)}}))
        lines = [json.dumps(change(line(i, row, RIGHT[i]))) for i, row in enumerate(rows)]
        (folder / f"samples_{task}_{time}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def check(items):
    assert items.x.tolist() == [1000, 3000]
    np.testing.assert_allclose(items.log_p, [LOG_P[1000], LOG_P[3000]])
    assert items.correct.tolist() == [[0, 1, 0], [1, 1, 1]]
    assert items.target.tolist() == RIGHT


def test_revisions_that_share_a_folder_are_told_apart_by_their_results(tmp_path):
    folder_of(tmp_path)
    items = emergence.read_samples(tmp_path, "arc")
    check(items)
    assert items.tokens.tolist() == [[3, 6]] * 3
    assert items.unit == "bytes"
    assert items.left_out == {}


def without(*names):
    return lambda record: {name: value for name, value in record.items() if name not in names}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(without("filter", "metrics"), id="0.4.4"),
        pytest.param(lambda r: r | {"arguments": [["Q", " a"], ["Q", " b"]]}, id="0.4.0"),
        pytest.param(
            lambda r: r | {"arguments": [["Q", "a"], ["Q", "b"]], "target": int(r["target"])},
            id="lists and whole numbers",
        ),
        pytest.param(lambda r: r | {"target": f"[{r['target']}]"}, id="a list as text"),
        pytest.param(lambda r: r | {"target": " é" * (int(r["target"]) + 1)}, id="the answer's text"),
        pytest.param(lambda r: r | {"filtered_resps": [float(v) for v, _ in r["filtered_resps"]]}, id="bare numbers"),
        pytest.param(without("filtered_resps"), id="resps alone"),
        pytest.param(lambda r: without("acc")(r) | {"metrics": {"acc": r["acc"]}}, id="metrics in a mapping"),
        pytest.param(without("acc"), id="no accuracy"),
        pytest.param(without("arguments"), id="no arguments"),
        pytest.param(
            lambda r: (
                r
                | {"acc_mutual_info": 1.0, "filtered_resps": r["filtered_resps"] + [["-9.0", "False"]] * 2}
                | {"arguments": dict(enumerate([*r["arguments"].values()] * 2))}
            ),
            id="unconditional requests behind",
        ),
    ],
)
def test_every_versions_lines_are_read(tmp_path, change):
    check(emergence.read_samples(folder_of(tmp_path, change), "arc"))


def test_one_answer_is_right_if_greedy_decoding_gives_it(tmp_path):
    def single(record):
        answer = {"gen_args_0": {"arg_0": "Q", "arg_1": " word"}}
        return without("acc", "target")(record) | {"filtered_resps": [["-0.25", "True"]], "arguments": answer}

    items = emergence.read_samples(folder_of(tmp_path, single), "arc")
    assert items.log_p.shape == (2, 3, 1)
    assert items.correct.all()
    assert items.chance == 0


@pytest.mark.parametrize(
    ("text", "x"),
    [("revision=stage1-step{}-tokens5B", [1000, 3000]), ("pretrained=out/checkpoint-{},dtype=x", [1000, 3000])],
)
def test_the_step_comes_from_the_models_arguments(tmp_path, text, x):
    assert emergence.read_samples(folder_of(tmp_path, model_args=text)).x.tolist() == x


def test_tokens_can_be_the_axis(tmp_path):
    folder = folder_of(tmp_path, model_args="pretrained=m,revision=step{0}-tokens{0}M")
    assert emergence.read_samples(folder, "arc", axis="tokens").x.tolist() == [1e9, 3e9]


def test_mangled_lines_are_counted_and_their_items_left_out(tmp_path):
    folder = folder_of(tmp_path)
    file = sorted(folder.glob("samples*"))[1]
    lines = file.read_text().splitlines()
    lines[0] = lines[0][:50]
    lines.append(json.dumps(line(7, [0.5, -1.0], 0)))
    lines.append(json.dumps(line(8, [-0.5, -1.0], 2)))
    lines.append(json.dumps({"something": "else"}))
    file.write_text("\n".join(lines))
    items = emergence.read_samples(folder, "arc")
    assert items.log_p.shape == (2, 2, 2)
    assert sum(items.left_out.values()) == 5
    assert "not JSON" in str(items)
    assert "above 0" in str(items)
    assert "right choice is missing" in str(items)


def test_a_step_that_was_evaluated_again_counts_as_it_was_last(tmp_path):
    folder = folder_of(tmp_path)
    time = "2026-08-05T10-00-00.1"
    (folder / f"results_{time}.json").write_text(json.dumps({"config": {"model_args": "revision=step3000"}}))
    rows = [json.dumps(line(i, [-5.0, -6.0], RIGHT[i])) for i in range(3)]
    (folder / f"samples_arc_{time}.jsonl").write_text("\n".join(rows))
    items = emergence.read_samples(folder)
    assert items.log_p[1].tolist() == [[-5.0, -6.0]] * 3
    assert "evaluated again" in str(items)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_table_is_read(tmp_path, suffix):
    rows = [
        {"step": step, "item": i, "choice": c, "log_p": value, "right": int(c == RIGHT[i])}
        for step, table in LOG_P.items()
        for i, row in enumerate(table)
        for c, value in enumerate(row)
    ]
    file = tmp_path / f"items.{suffix}"
    if suffix == "csv":
        file.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    check(emergence.read_samples(file))


def test_what_cannot_be_read_is_a_sentence(tmp_path):
    with pytest.raises(PhasewatchError, match="no such folder or file"):
        emergence.read_samples(tmp_path / "nowhere")
    with pytest.raises(PhasewatchError, match="--log_samples"):
        emergence.read_samples(tmp_path)
    folder = folder_of(tmp_path)
    with pytest.raises(PhasewatchError, match="no such task, but arc"):
        emergence.read_samples(folder, "piqa")
    with pytest.raises(PhasewatchError, match="tells the tokens"):
        emergence.read_samples(folder, "arc", axis="tokens")
    with pytest.raises(PhasewatchError, match="6 lines with generated text"):
        emergence.read_samples(folder_of(tmp_path, lambda r: r | {"filtered_resps": ["some text", "more"]}), "arc")
    folder_of(tmp_path, task="boolq")
    with pytest.raises(PhasewatchError, match="holds the tasks arc, boolq; name one"):
        emergence.read_samples(folder)


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "1e400", "1" + 400 * "0"])
def test_numbers_that_are_no_log_p_are_counted_wherever_they_stand(tmp_path, bad):
    change = {"filtered_resps": [["-1.0", "False"], "BAD"]}
    folder = folder_of(tmp_path, lambda record: record | change if record["doc_id"] == 0 else record)
    for path in folder.glob("samples*"):
        path.write_text(path.read_text().replace('"BAD"', f"[{bad}, false]"))
    items = emergence.read_samples(tmp_path, "arc")
    assert items.log_p.shape == (2, 2, 2)
    assert sum(items.left_out.values()) == 2


def test_an_item_with_endless_choices_does_not_widen_the_table_of_all(tmp_path):
    folder = folder_of(tmp_path)
    for path in folder.glob("samples*"):
        path.write_text(path.read_text() + json.dumps(line(7, [-9.0] * 1001, 0)) + "\n")
    items = emergence.read_samples(tmp_path, "arc")
    check(items)
    assert items.left_out == {"items with more than 1000 choices": 1}


def test_a_line_that_nests_without_end_is_counted(tmp_path):
    folder = folder_of(tmp_path)
    for path in folder.glob("samples*"):
        path.write_text(path.read_text() + 100_000 * "[" + "\n")
    items = emergence.read_samples(tmp_path, "arc")
    assert items.left_out == {"lines that are not JSON (cut off, or two written into one)": 2}


def test_files_of_others_are_read_by_the_door(tmp_path):
    folder = folder_of(tmp_path)
    (tmp_path / "secret").write_text(json.dumps(line(9, [-1.0, -2.0], 0)))
    file = sorted(folder.glob("samples*"))[0]
    whole = file.read_bytes()
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(PhasewatchError, match="leads out of"):
        emergence.read_samples(folder)
    file.unlink()
    file.write_bytes(whole)
    for results in folder.glob("results*"):  # a link that leads out tells no step
        results.unlink()
        results.symlink_to(tmp_path / "secret")
    with pytest.raises(PhasewatchError, match="tells the step"):
        emergence.read_samples(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r | {"filtered_resps": [["NaN", "False"], ["-1", "False"]]}, "log probability"),
        (lambda r: r | {"filtered_resps": [["-1", "False"], [-1e308, "False"]]}, "log probability"),
        (lambda r: without("acc")(r) | {"target": float("nan")}, "neither the right choice"),
        (lambda r: r | {"target": float("inf"), "acc": 0.0}, "no step tells"),
    ],
)
def test_a_line_of_extreme_values_is_left_out(tmp_path, change, reason):
    with pytest.raises(PhasewatchError, match=reason):
        emergence.read_samples(folder_of(tmp_path, change), "arc")


@pytest.mark.parametrize("step", ["1e400", "nan", "-1", "1e19", "[]"])
def test_a_table_whose_steps_are_none_has_no_items(tmp_path, step):
    file = tmp_path / "items.csv"
    file.write_text(f"step,item,choice,log_p,right\n{step},0,0,-1.0,1\n{step},0,1,-2.0,0\n")
    with pytest.raises(PhasewatchError, match="lines without numbers for the step"):
        emergence.read_samples(file)


def test_a_cell_larger_than_python_reads_is_a_sentence(tmp_path):
    file = tmp_path / "items.csv"
    file.write_text("step,item,choice,log_p,right\n1,0,0,-1.0," + "9" * 200_000 + "\n")
    with pytest.raises(PhasewatchError, match="can't be read as comma-separated text"):
        emergence.read_samples(file)
