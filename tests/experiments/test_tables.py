"""The tables of the experiments."""

import pytest


@pytest.fixture
def tables(script):
    return script("tables")


def test_a_table_has_the_columns_that_any_row_has(tables):
    rows = [{"run": "seed-0", "λ̂": 12.3456}, {"run": "seed-1", "kinds": "A B", "λ̂": 7}]
    assert tables.markdown(rows) == [
        "| run | λ̂ | kinds |",
        "| --- | --- | --- |",
        "| seed-0 | 12.3 |  |",
        "| seed-1 | 7 | A B |",
    ]


def test_a_table_is_printed_and_kept(tables, tmp_path, capsys):
    tables.keep_table(tmp_path, "toy", ["| a |", "| --- |", "| λ̂ |"])
    text = "# Output of `python experiments/toy.py`\n\n| a |\n| --- |\n| λ̂ |\n"
    assert (tmp_path / "toy.md").read_text("utf-8") == text
    assert capsys.readouterr().out == text + "\n"
