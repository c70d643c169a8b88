"""Mutated tables: csv, jsonl, the logs of other programs, and the samples of lm_eval (see tests/hostile.py)."""

import csv
import io
import json
from pathlib import Path

import pytest
from hostile import NUMBERS, WORDS, Mutator, cell, check_answer, command, hunt, watched
from log_files import event, event_file, field, framed, history, log_blocks

COLUMNS = [
    "step",
    "loss",
    "llc",
    "llc_error",
    "llc_chain0",
    "llc_chain1",
    "accuracy",
    "Step",
    "phase/llc",
    "a - llc__MIN",
]
ENCODINGS = ["utf-8"] * 9 + ["utf-8-sig", "utf-16", "utf-32-le", "latin-1", "cp1252"]
PUBLISHED = Path(__file__).parents[1] / "data" / "published" / "lr_seed1.csv"


def cell_of(mutator, column, i):
    if mutator.maybe(0.04):
        return mutator.some([*NUMBERS, *WORDS, "", "1_000", " 7 ", "+3", "٣", "1e400", "-0", "1,5", "0x1F"])
    if column.lower().endswith("step"):
        return i * 10
    return round(10 / (1 + i) + mutator.random.gauss(0, 0.1), 6)


def a_table(mutator):
    columns = COLUMNS[:3] + mutator.random.sample(COLUMNS[3:], mutator.random.randrange(3))
    if mutator.maybe(0.2):
        columns[mutator.random.randrange(len(columns))] = mutator.some([*WORDS, *COLUMNS])
    if mutator.maybe(0.01):
        columns += [f"m{i}" for i in range(mutator.some((300, 6000)))]
    rows = [[cell_of(mutator, c, i) for c in columns] for i in range(mutator.some((0, 1, 5, 12, 30)))]
    offset = mutator.some((0, 0, 0, 0, 10**12, 1_700_000_000_000_000_000, 2**63 - 50, 2**63, -5))
    size = mutator.some((1, 1, 1, 1, 1e150, 1e300, 1e-300, 5e-324))
    for row in rows:
        row[:] = [
            v + offset if "step" in c.lower() and isinstance(v, int) else v * size if isinstance(v, float) else v
            for c, v in zip(columns, row, strict=True)
        ]
    if mutator.maybe(0.5):
        text = io.StringIO()
        writer = csv.writer(
            text, delimiter=mutator.some(",,,,,;\t|"), lineterminator=mutator.some(["\n", "\r\n", "\r"])
        )
        writer.writerows([columns, *rows])
        suffix, content = ".csv", text.getvalue()
    else:
        suffix = ".jsonl"
        content = "".join(json.dumps(mutator.json(dict(zip(columns, row, strict=True)), 0.01)) + "\n" for row in rows)
    content = content.encode(mutator.some(ENCODINGS), "backslashreplace")
    return suffix, mutator.bytes(content) if mutator.maybe(0.3) else content


def test_mutated_tables(tmp_path):
    whole = PUBLISHED.read_bytes()

    def attempt(seed):
        mutator = Mutator(seed)
        suffix, content = a_table(mutator) if mutator.maybe(0.99) else (".csv", mutator.bytes(whole))
        with cell(tmp_path) as folder:
            file = folder / f"table{mutator.some((suffix, suffix.upper(), suffix, suffix, '.json', ''))}"
            file.write_bytes(content)
            options = mutator.some([[], [], ["--json"], ["--signal", mutator.some(["loss", "accuracy", *WORDS[4:]])]])
            if mutator.maybe(0.01):
                options += ["--plot", folder / "a.png"]
            if mutator.maybe(0.01):
                mutator.replace(file, links=False)
            with watched(folder):
                if mutator.maybe(0.2):
                    answer = command(
                        "emergence", file, "--sharp", "accuracy", "--smooth", mutator.some(["loss", "llc"])
                    )
                else:
                    answer = command("transitions", file, *options)
            check_answer(*answer)

    hunt(150, attempt)


STEPS = [0, 1, 10, 10, 2**31, 2**63 - 1, -1]
TAGS = ["train/loss", "loss", "llc", "a", "step", *WORDS]


def a_log(mutator):
    """A log with its name: whole, damaged as a file, or written anew from damaged records, with right checksums."""
    values = [
        (
            mutator.some(STEPS) if mutator.maybe(0.1) else 10 * i,
            {
                mutator.some(TAGS) if mutator.maybe(0.1) else tag: mutator.some(NUMBERS[:10])
                if mutator.maybe(0.1)
                else 2 - i / 9
                for tag in ("train/loss", "acc")
            },
        )
        for i in range(mutator.some((0, 1, 6, 30)))
    ]
    rows = [{"_step": step, "trainer/global_step": 5 * step, **scalars} for step, scalars in values]
    kind = mutator.random.randrange(3)
    if kind == 2:
        entries = [{"step": step, **scalars} for step, scalars in values]
        return "trainer_state.json", mutator.document({"global_step": 9, "log_history": entries})
    deep = mutator.maybe(0.5)
    if kind == 0:
        name, content = "events.out.tfevents.1700000000.host", event_file([])
        records = [
            event(step, {tag.encode("utf-8", "replace"): float(v) for tag, v in s.items()}) for step, s in small(values)
        ]
        content += b"".join(framed(mutator.bytes(r) if deep and mutator.maybe(0.2) else r) for r in records)
    else:
        name = "run-a.wandb"
        rows = [mutator.json(row, 0.02) for row in rows]
        records = [history(i, row) for i, row in enumerate(rows) if isinstance(row, dict)]
        content = log_blocks(
            [field(21, b""), *(mutator.bytes(r) if deep and mutator.maybe(0.2) else r for r in records)]
        )
    return name, content if deep else mutator.bytes(content)


def small(values):
    """Without what a float of four bytes can't hold."""
    return [(s, {t: v for t, v in row.items() if not 3e38 < abs(v) < float("inf")}) for s, row in values]


def test_mutated_logs(tmp_path):
    def attempt(seed):
        mutator = Mutator(seed)
        name, content = a_log(mutator)
        with cell(tmp_path) as folder:
            file = folder / name
            file.write_bytes(content)
            if mutator.maybe(0.05):
                mutator.replace(file, links=False)
            target = mutator.some([folder, file, file])
            if target is folder and mutator.maybe(0.2):
                mutator.replace(file)
            with watched(folder):
                answer = command(
                    "transitions", target, "--signal", mutator.some(["train/loss", "acc", "llc", *WORDS[4:8]])
                )
            check_answer(*answer)

    hunt(150, attempt)


def a_line(doc, right):
    return {
        "doc_id": doc,
        "target": str(right),
        "arguments": {f"gen_args_{i}": {"arg_0": "Q", "arg_1": f" answer {i}"} for i in range(4)},
        "resps": [[[-1.0 - i, False]] for i in range(4)],
        "filtered_resps": [[-1.0 - i - doc % 3, False] for i in range(4)],
        "acc": float(right == 0),
    }


def test_mutated_samples(tmp_path):
    def attempt(seed):
        mutator = Mutator(seed)
        with cell(tmp_path) as folder:
            for step in (1, 10, 100)[: mutator.some((1, 3))]:
                own = folder / f"step_{step}"
                own.mkdir()
                file = own / "samples_arc_2024-01-01T00-00-00.jsonl"
                lines = [json.dumps(mutator.json(a_line(i, i % 4), 0.02)) for i in range(6)]
                content = "\n".join(lines).encode("utf-8", "surrogatepass")
                file.write_bytes(mutator.bytes(content) if mutator.maybe(0.3) else content)
                results = own / "results_2024-01-01T00-00-00.json"
                config = {"config": {"model_args": f"pretrained=a,revision=step{step}"}, "model_name": "a"}
                results.write_bytes(mutator.document(config))
                if mutator.maybe(0.1):
                    mutator.replace(mutator.some([file, results, own]))
            if mutator.maybe(0.3):
                rows = [
                    mutator.json({"step": s, "item": i, "choice": c, "log_p": -1.5 - c, "right": int(c == 0)}, 0.02)
                    for s in (1, 2, 3)
                    for i in range(3)
                    for c in (0, 1)
                ]
                target = folder / "items.jsonl"
                target.write_text("\n".join(map(json.dumps, rows)))
                if mutator.maybe(0.2):
                    target.write_bytes(mutator.bytes(target.read_bytes()))
                if mutator.maybe(0.03):
                    mutator.replace(target, links=False)
            else:
                target = folder
            with watched(folder):
                answer = command("emergence", target)
            check_answer(*answer)

    hunt(60, attempt)


@pytest.fixture(autouse=True)
def _anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
