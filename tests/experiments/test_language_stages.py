"""The runs of the language model at a size of their own: left and gone on with, measured again, and their tables."""

import json
import sys
import time

import numpy as np
import pytest
import torch

from phasewatch import Trajectory
from phasewatch.toy_tasks.english import EnglishData
from phasewatch.toy_tasks.language import LanguageModel, Shape

SHAPE = Shape(layers=1, heads=2, width=16, vocabulary=40, context=16)


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "tokens.bin"
    file.write_bytes(np.random.default_rng(0).integers(40, size=8_000).astype("<u2").tobytes())
    return file


@pytest.fixture
def smallest(script, monkeypatch, corpus):
    """The quick size, of a small vocabulary."""
    runs, size = script("language_runs"), script("language_runs").smallest_size

    def smaller(file, steps):
        found = size(file, steps)
        data = EnglishData(file, vocabulary=40, context=16)
        small = {"shape": SHAPE, "data": data, "held_out": 4, "scored": 4, "batch_size": 4}
        return runs.replace(found, **small)

    monkeypatch.setattr(script("language_stages"), "smallest_size", smaller)
    monkeypatch.setattr(script("language_runs"), "text_questions", lambda data, count=4: questions(data, count))
    monkeypatch.setattr(script("language_runs"), "repeat_questions", lambda data, count=4: questions(data, count))
    return script("language_stages")


def questions(data, count):
    from phasewatch import Question

    rows = data.held_out(count)[:, :6].tolist()
    return [Question(row[:4], [[row[4]], [row[5]]]) for row in rows]


def call(main, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["language_stages.py", "--quick", *map(str, arguments)])
    precision = torch.get_float32_matmul_precision()
    try:
        main()
    finally:
        torch.set_float32_matmul_precision(precision)


def trained(script, corpus, folder, *, steps, deadline=float("inf"), stop_at=None):
    """A training up to some steps, or left at one of them."""
    model = LanguageModel(SHAPE, seed=1)
    due = []

    def after(step):
        if step == stop_at:
            due.append("stop")

    left = script("language_training").train(
        model,
        EnglishData(corpus, vocabulary=40, context=16),
        seed=5,
        steps=steps,
        batch_size=4,
        state=folder / "run",
        after_each=after,
        at=lambda step: step % 20 == 0,
        on_due=due.append,
        deadline=deadline,
    )
    return model, left, due


def test_a_training_that_was_left_goes_on_where_it_was(script, corpus, tmp_path):
    straight, left, due = trained(script, corpus, tmp_path / "a", steps=120)
    assert left.step == 120
    assert due == [0, 20, 40, 60, 80, 100, 120]
    _, first, due = trained(script, corpus, tmp_path / "b", steps=120, deadline=time.monotonic())
    assert first.step == 50
    assert due == [0, 20, 40]
    again, second, due = trained(script, corpus, tmp_path / "b", steps=120)
    assert second.step == 120
    assert second.seconds > first.seconds
    assert due == [60, 80, 100, 120]
    start = LanguageModel(SHAPE, seed=1)
    moved = sum((p - q).square().sum() for p, q in zip(straight.parameters(), start.parameters(), strict=True)) ** 0.5
    apart = sum((p - q).square().sum() for p, q in zip(straight.parameters(), again.parameters(), strict=True)) ** 0.5
    assert apart < 0.02 * moved  # the moments were kept in bfloat16


def test_batches_depend_on_the_seed_and_the_step_alone(script, corpus):
    training, data = script("language_training"), EnglishData(corpus, vocabulary=40, context=16)
    cpu = torch.device("cpu")
    first, same, other = (training.starts_of(data, *given, 4, cpu) for given in ((5, 0), (5, 0), (5, 1)))
    assert first.shape == (1000, 4)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() <= data.trained_on - data.context


def test_a_queue_ends_with_points_tables_and_a_package_and_does_nothing_twice(
    smallest, monkeypatch, corpus, tmp_path, capsys
):
    given = ["--corpus", corpus, "--steps", 40, "--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    queue = ["--queue", "2:0+heads+averaged+published,1:0", "--out", tmp_path / "out", "--label", "gpu0"]
    call(smallest.main, monkeypatch, *given, *queue)
    printed = capsys.readouterr().out
    assert "2-layers-seed-0: 40 of 40 steps" in printed
    assert "2-layers-seed-0, averaged: " in printed
    points = tmp_path / "results" / "points"
    whole = Trajectory.read(points / "language_stages" / "2-layers-seed-0.jsonl")
    assert whole.steps[0] == 0
    assert whole.steps[-1] == 40
    assert {"icl_score", "previous_token", "k_composition", "text_log_p", "repeat_accuracy"} <= set(whole[0].metrics)
    of_heads = Trajectory.read(points / "language_stages_heads" / "2-layers-seed-0.jsonl")
    assert set(of_heads[0].parts) == {"L0H0", "L0H1", "L1H0", "L1H1"}
    kept = json.loads((points / "language_stages_beside" / "2-layers-seed-0.json").read_text("utf-8"))
    assert kept["steps"] == 40
    assert len(kept["monitoring seconds"]) == len(whole) + 1
    assert set(kept["by head"]) == {str(step) for step in whole.steps}
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["gpu0.tar.gz"]

    before = {file: file.stat().st_mtime_ns for file in points.rglob("*.json*")}
    call(smallest.main, monkeypatch, *given, *queue)
    assert {file: file.stat().st_mtime_ns for file in before} == before

    capsys.readouterr()
    call(smallest.main, monkeypatch, "--table", "--results", tmp_path / "results")
    table = capsys.readouterr().out
    assert "| published, 2 layers |" in table
    assert table.count("| 2-layers-seed-0 |") >= 4
    assert (tmp_path / "results" / "language_stages.md").read_text("utf-8") == table.removesuffix("\n")


def test_a_run_that_time_ends_is_packed_and_gone_on_with(smallest, monkeypatch, corpus, tmp_path, capsys):
    given = ["--corpus", corpus, "--steps", 60, "--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    call(smallest.main, monkeypatch, *given, "--queue", "1:3", "--minutes", 0.005, "--out", tmp_path / "out")
    assert "50 of 60 steps" in capsys.readouterr().out
    parts = {"1-layers-seed-3-moments.pt", "1-layers-seed-3-weights.pt", "part.tar.gz"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == parts
    call(smallest.main, monkeypatch, *given, "--queue", "1:3")
    assert "60 of 60 steps" in capsys.readouterr().out
    points = Trajectory.read(tmp_path / "results" / "points" / "language_stages" / "1-layers-seed-3.jsonl")
    assert points.steps[-1] == 60


def test_extras_that_are_not_there_are_refused_before_anything_is_trained(script):
    parts = script("language_stages").parts
    assert parts("2:0+heads,llama:1,") == [("2:0", ""), ("2:0", "heads"), ("llama:1", "")]
    with pytest.raises(SystemExit, match=r"\+hats isn't there"):
        parts("1:0,2:0+hats")
    with pytest.raises(SystemExit, match=r"llama:0\+heads: \+heads isn't there. Use none"):
        parts("llama:0+heads")


def test_a_share_of_training_keeps_every_snapshot_and_measures_some(
    smallest, script, monkeypatch, corpus, tmp_path, capsys
):
    small = smallest.smallest_size
    monkeypatch.setattr(
        smallest, "smallest_size", lambda *given: script("language_runs").replace(small(*given), share=0.1)
    )
    given = ["--corpus", corpus, "--steps", 40, "--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    call(smallest.main, monkeypatch, *given, "--queue", "1:0+everywhere")
    points = tmp_path / "results" / "points"
    live = Trajectory.read(points / "language_stages" / "1-layers-seed-0.jsonl")
    everywhere = Trajectory.read(points / "language_stages_everywhere" / "1-layers-seed-0.jsonl")
    assert 0 < len(live) < len(everywhere)
    assert set(live.steps) < set(everywhere.steps)
    assert set(everywhere.steps) == small(corpus, 40).at.steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "pythia"])
def test_other_architectures_are_watched_through_their_trainer(
    name, smallest, script, monkeypatch, corpus, tmp_path, capsys
):
    models = script("language_models")
    monkeypatch.setattr(models, "EnglishData", lambda file, context: EnglishData(file, vocabulary=40, context=16))
    monkeypatch.setattr(models, "text_questions", lambda data: questions(data, 4))
    given = ["--corpus", corpus, "--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    call(smallest.main, monkeypatch, *given, "--other-steps", 12, "--queue", f"{name}:1")
    assert f"{name}-seed-1: " in capsys.readouterr().out
    points = Trajectory.read(tmp_path / "results" / "points" / "language_stages" / f"{name}-seed-1.jsonl")
    assert points.steps[-1] == 12
    assert {"icl_score", "text_brier"} <= set(points[0].metrics)


@pytest.mark.parametrize(
    ("paragraph", "kept"),
    [
        ("The packages of a distribution are signed by its archive, and the key that signs them is kept.", True),
        ("The packages of a distribution.", False),
        ("int main(int argc, char **argv) { for (i = 0; i < 10; i++) printf('%d', x[i] + y[i] * z[i]); }", False),
        ("Die Pakete einer Verteilung sind von ihrem Archiv signiert, und der Schlüssel liegt daneben.", False),
        ("0.1 0.2 0.3 0.4 0.5 the 0.6 0.7 0.8 of 0.9 1.0 1.1 1.2 and 1.3 1.4 1.5 1.6 to 1.7 1.8 in", False),
    ],
)  # fmt: skip
def test_prose_is_sentences_of_english(script, paragraph, kept):
    assert script("english_corpus").is_prose(paragraph) is kept


def test_text_is_taken_out_of_pages_and_manuals(script):
    corpus = script("english_corpus")
    page = (
        "<head><title>x</title></head><p>One &amp; <b>two</b>.</p><pre>code</pre><li>three\n four<script>s()</script>"
    )
    assert [p for p in corpus.paragraphs("html", page) if p] == ["One & two.", "three four"]
    manual = ".TH X 1\n.SH NAME\n.B ls\nlists \\fIfiles\\fR.\n.PP\nNext \\-a."
    assert [p for p in corpus.paragraphs("roff", manual) if p] == ["ls lists files.", "Next -a."]
    assert [corpus.form_of(name) for name in ("./usr/share/doc/a/x.html", "./usr/share/doc/RFC/std/rfc1.html.gz",
            "./usr/share/man/man1/ls.1.gz", "./usr/share/doc/RFC/std/rfc1.txt.gz", "./usr/share/doc/a/changelog.gz",
            "./usr/lib/x.so")] == ["html", "", "roff", "text", "", ""]  # fmt: skip


def test_long_documents_are_cut_at_paragraphs(script, monkeypatch):
    corpus = script("english_corpus")
    paragraphs = [f"{i}" * 300 for i in range(1, 8)]
    monkeypatch.setattr(corpus, "MOST_DOCUMENT", 700)
    assert list(corpus.cut("\n\n".join(paragraphs))) == [
        "\n\n".join(paragraphs[:3]),
        "\n\n".join(paragraphs[3:6]),
    ]  # the last 300 characters are too few
