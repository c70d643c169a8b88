"""Measure phasewatch.emergence on held-back data, beside its targets.

    python experiments/bench_emergence.py DATA            # DATA: the folder with the csv files named below

Every forecast is made without the values that it is compared with: small models to larger ones, low compute to high,
one task of a run to the others. Rows whose file isn't in the folder are left out.
"""

import argparse
import csv
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from reversals import falls, false_alarms
from scipy.special import ndtr
from verdict_cases import KINDS, case

from phasewatch import PhasewatchError, emergence

CHANCE = {"piqa": 0.5, "socialiqa": 1 / 3, "csqa": 0.2}
"""Of tasks with other than four choices."""

THRESHOLDS = {"mmlu": (30, 45, 60), "conceptual_combinations": (40, 60, 90), "parsinlu_qa_mc": (90, 160)}
"""Compute (1e21 FLOPs) below which a task's models are shown: before and early in its rise."""

CONTROLS = {"hellaswag": (15, 40, 80)}

GENERATIVE = ("arithmetic_3ds", "arithmetic_2dm", "arithmetic_2da")

BENCHMARKS = ("mmlu", "arc_challenge", "hellaswag", "winograd", "truthfulqa", "gsm8k", "xwinograd", "humaneval")

CUTS = (84, 42)

MODELS = (8, 10, 12)
"""Of the ladder of 21 models, the first that forecasts of the others are made from."""


@dataclass(frozen=True)
class Row:
    """A line of the table: what, how much of it, and the target."""

    what: str
    measured: str
    target: str


Rows = list[dict[str, str]]


def read(folder: Path, name: str) -> Rows:
    """The lines of one csv file."""
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pivot(rows: Rows, by: str) -> dict[tuple[str, str], dict[str, float]]:
    """Values by (task, metric) and then by a column."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        found[row["task"], row["metric"]][row[by]] = float(row["value"])
    return found


def summary(errors: list[np.ndarray], inside: list[np.ndarray], halves: list[np.ndarray]) -> str:
    """Mean absolute error, coverage and half-width over cases, each case counted once."""
    mean = [float(np.mean([np.mean(one) for one in values])) for values in (errors, inside, halves)]
    return f"error {mean[0]:.3f}, coverage {mean[1]:.2f}, half-width {mean[2]:.3f}"


def compared(found: emergence.Forecast, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Absolute errors, whether the intervals cover, and their half-widths."""
    return np.abs(found.mean - truth), (found.low <= truth) & (truth <= found.high), (found.high - found.low) / 2


def ladder(folder: Path) -> Iterator[Row]:
    """Fit on 190M to 1B; predict 3B, and the end of a 7B run."""
    rows = read(folder, "olmo_ladder_small.csv")
    small, large = pivot(rows, "run"), pivot(read(folder, "olmo_ladder_3b.csv"), "run")
    size = {row["run"]: 6 * float(row["params"]) * float(row["tokens"]) for row in rows}
    size |= {r["run"]: 6 * float(r["params"]) * float(r["tokens"]) for r in read(folder, "olmo_ladder_3b.csv")}
    run = pivot(read(folder, "training_olmo2_7b.csv"), "tokens")
    last = sorted({float(token) for values in run.values() for token in values})[-5:]
    for what, target in (("3B, practice", ""), ("7B at the end of its run", "error <= 0.035, 0.80 to 0.97, <= 0.10")):
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for task in sorted({task for task, metric in small if metric == "acc"}):
            names = sorted(small[task, "acc"], key=size.__getitem__)
            x, sharp, smooth = (
                np.array([table[n] for n in names]) for table in (size, small[task, "acc"], small[task, "bpb"])
            )
            if what.startswith("3B"):
                at, truth = np.array([size[n] for n in large[task, "acc"]]), np.array([*large[task, "acc"].values()])
            elif (task, "acc") in run:
                ends = [value for tokens, value in run[task, "acc"].items() if float(tokens) in last]
                at, truth = np.array([6 * 7.3e9 * last[-1]]), np.array([np.mean(ends)])
            else:
                continue
            chance = CHANCE.get(task, 0.25)
            found.append(compared(emergence.forecast(x, sharp, smooth, at=at, chance=chance, series=names), truth))
        yield Row(f"ladder, {what}", summary(*map(list, zip(*found, strict=True))), target)


def ladder_cuts(folder: Path) -> Iterator[Row]:
    """Fit on the first few models of the ladder, along compute or a loss; predict all later ones, up to 3B."""
    rows = [*read(folder, "olmo_ladder_small.csv"), *read(folder, "olmo_ladder_3b.csv")]
    values = pivot(rows, "run")
    compute = {row["run"]: 6 * float(row["params"]) * float(row["tokens"]) for row in rows}
    losses = values["c4", "loss"]
    for axis, places, later in (("compute", compute, 1), ("a loss", losses, -1)):
        for count in MODELS:
            found = []
            for task in sorted({task for task, metric in values if metric == "acc"}):
                sharp, smooth = values[task, "acc"], values[task, "bpb"]
                names = sorted(sharp, key=lambda name, order=places, sign=later: sign * order[name])
                known, rest = names[:count], names[count:]
                x, score, guide = (np.array([table[name] for name in known]) for table in (places, sharp, smooth))
                at, truth = (np.array([table[name] for name in rest]) for table in (places, sharp))
                chance = CHANCE.get(task, 0.25)
                found.append(compared(emergence.forecast(x, score, guide, at=at, chance=chance, series=known), truth))
            text = summary(*map(list, zip(*found, strict=True)))
            yield Row(f"ladder, the first {count} models along {axis}", text, "coverage 0.80 to 0.97")


def public_models(folder: Path) -> Iterator[Row]:
    """Below a threshold of compute to above it, with and without models trained on far more tokens than usual."""
    rows = read(folder, "models_emergent_dev.csv")
    values, compute = pivot(rows, "model"), {row["model"]: float(row["flops_1e21"]) for row in rows}
    overtrained = {row["model"] for row in rows if row["overtrained"] == "1"}
    for what, cases, target in (
        ("emergent", THRESHOLDS, "error <= 0.13, coverage >= 0.80"),
        ("control", CONTROLS, "error <= naive + 0.01"),
    ):
        for left_out in (overtrained, set()):
            found, naive = [], []
            for task, thresholds in cases.items():
                names = sorted(set(values[task, "acc"]) - left_out, key=lambda name: (compute[name], name))
                x = np.array([compute[n] for n in names])
                sharp, smooth = (np.array([values[task, m][n] for n in names]) for m in ("acc", "brier_target"))
                for threshold in thresholds:
                    low = x < threshold
                    later = emergence.forecast(
                        x[low], sharp[low], smooth[low], at=x[~low], chance=0.25, series=np.array(names)[low].tolist()
                    )
                    found.append(compared(later, sharp[~low]))
                    naive.append(np.abs(sharp[low][-1] - sharp[~low]).mean())
            text = summary(*map(list, zip(*found, strict=True)))
            models = "all models" if not left_out else "without overtrained models"
            yield Row(f"public models, {what}, {models}", f"{text}; naive {np.mean(naive):.3f}", target)


def generative(folder: Path) -> Iterator[Row]:
    """Below a cut-off of compute to above it, from the other benchmarks' scores and the compute."""
    rows = read(folder, "models_generative.csv")
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        values[row["task"]][row["model"]] = float(row["value"])
    compute = {row["model"]: float(row["flops_1e21"]) for row in rows if row["flops_1e21"]}
    for cut, target in zip(CUTS, ("error <= 0.08", "error <= 0.12"), strict=True):
        found, one_axis = [], []
        for task in GENERATIVE:
            names = [n for n in values[task] if n in compute]
            x = np.array([compute[n] for n in names])
            columns = np.array(
                [[values[b].get(n, math.nan) for b in BENCHMARKS] + [math.log(compute[n])] for n in names]
            )
            sharp, low = np.array([values[task][n] for n in names]), x <= cut
            found.append(
                compared(emergence.forecast(columns[low], sharp[low], at=columns[~low], chance=0.0), sharp[~low])
            )
            plain = emergence.forecast(x[low], sharp[low], at=x[~low], chance=0.0, series=np.array(names)[low].tolist())
            one_axis.append(np.abs(plain.mean - sharp[~low]).mean())
        text = summary(*map(list, zip(*found, strict=True)))
        yield Row(f"generative, cut at {cut}e21", f"{text}; by compute alone {np.mean(one_axis):.3f}", target)


def lambada(folder: Path) -> Iterator[Row]:
    """The link of small models on larger ones; reversals."""
    rows = read(folder, "pythia_lambada_small.csv")
    values: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        values[row["model"], row["metric"]][int(row["step"])] = float(row["value"])
    models = sorted({row["model"] for row in rows})
    steps = np.array(sorted(values[models[0], "acc"]))
    acc, log_p = ({m: np.array([values[m, k][s] for s in steps]) for m in models} for k in ("acc", "log_likelihood"))
    late = steps >= 1000

    def size(model: str) -> float:
        text = model.removesuffix("-deduped").rpartition("-")[2]
        return float(text[:-1]) * (1e9 if text.endswith("b") else 1e6)

    errors = []
    for least in sorted({size(m) for m in models})[2:]:
        known = [m for m in models if size(m) < least]
        smooth, sharp = (np.concatenate([table[m][late] for m in known]) for table in (log_p, acc))
        link = emergence.Link.fit(smooth, sharp, chance=0.0)
        errors += [np.abs(link(log_p[m][late]) - acc[m][late]).mean() for m in models if size(m) >= least]
    text = f"error {np.mean(errors):.3f} on average, {max(errors):.3f} at worst"
    yield Row("log-likelihood to accuracy, small to larger", text, "<= 0.03, worst <= 0.05")
    found = {m: emergence.reversal(steps, log_p[m]) for m in models}
    depths = {m: np.max(log_p[m]) - log_p[m][-1] for m in models}
    rang = [m for m in models if found[m] is not None]
    own = [one.alarm - one.peak for one in found.values() if one is not None]
    delays = [one.alarm - steps[np.argmax(log_p[m])] for m, one in found.items() if one is not None]
    text = f"found {sum(depths[m] > 0.3 for m in rang)} of {sum(f > 0.3 for f in depths.values())}, "
    text += f"false alarms {sum(depths[m] <= 0.3 for m in rang)} of {sum(f <= 0.3 for f in depths.values())}, "
    text += f"median delay {np.median(own):,.0f} after the turn, {np.median(delays):,.0f} after the highest point"
    yield Row("reversal", text, "all, none, median <= 30,000")


def toy_addition(folder: Path) -> Iterator[Row]:
    """Exact match from the tokens' log p, inside the jump."""
    rows = read(folder, "toy_add3.csv")
    by_step: dict[int, list[tuple[list[float], bool]]] = defaultdict(list)
    for row in rows:
        tokens = [float(row[name]) for name in row if name.startswith("lp")]
        by_step[int(row["step"])].append((tokens, "0" not in row["greedy"]))
    errors, halves = [], []
    for items in by_step.values():
        truth = np.mean([right for _, right in items])
        if 0.02 < truth < 0.98:
            log_p = np.array([tokens for tokens, _ in items])
            errors.append(abs(emergence.exact_match(log_p) - truth))
            halves.append(abs((log_p > math.log(0.5)).all(axis=1).mean() - truth))
    text = f"error {np.mean(errors):.3f} on average; share with every p > 1/2 {np.mean(halves):.3f}"
    yield Row("exact match inside the jump", text, "<= 0.03")


def jump_in_another(folder: Path) -> Iterator[Row]:
    """One task's onset in loss, used for the step of another task's, in one run."""
    run = pivot(read(folder, "training_olmo2_7b.csv"), "step")
    loss = run["c4", "loss"]
    steps = np.array(sorted(int(step) for step in loss if int(step) > 0))
    losses = np.minimum.accumulate([loss[str(step)] for step in steps])
    falling = np.append(True, np.diff(losses) < 0)
    thresholds, onsets = {}, {}
    for task in sorted({task for task, metric in run if metric == "acc_mc"}):
        sharp = np.array([run[task, "acc_mc"][str(step)] for step in steps])
        smooth = np.array([run[task, "bpb"][str(step)] for step in steps])
        chance = CHANCE.get(task, 0.25)
        through = emergence.forecast(losses[falling], sharp[falling], smooth[falling], at=[losses[-1]], chance=chance)
        direct = emergence.forecast(steps, sharp, smooth, at=[steps[-1]], chance=chance)
        if through.onset is not None and direct.onset is not None:
            thresholds[task], onsets[task] = through.onset.median, direct.onset.median
    pairs = [(a, b) for a in onsets for b in onsets if a != b]
    factors = [abs(math.log(np.interp(-thresholds[a], -losses, steps) / onsets[b])) for a, b in pairs]
    nats = [abs(thresholds[a] - thresholds[b]) for a, b in pairs]
    text = f"within a factor 1.4 in {np.mean(np.exp(factors) < 1.4):.0%}, thresholds within {max(nats):.3f} nats"
    yield Row("step of a jump through the loss, another task", text, "1.4 in 80%, 0.05 nats")


def verdicts(count: int) -> Iterator[Row]:
    """Simulated cases of a seed that no weight was fitted to."""
    rng = np.random.default_rng(2)
    right, sure = [], []
    for kind in KINDS:
        for _ in range(count):
            z, sharp, smooth, chance = case(rng, kind)
            found = emergence.verdict(np.exp(z * 7), sharp, smooth, chance=chance)
            right.append(found.kind == kind)
            if found.probability >= 0.9:
                sure.append(found.kind == kind)
    text = f"right {np.mean(right):.3f}; of {len(sure)} called at 90 %, right {np.mean(sure):.3f}"
    yield Row("verdict, simulated", text, ">= 0.90, >= 0.90")


def law(count: int) -> Iterator[Row]:
    """Simulated finetuning: 5 amounts, 8 checkpoints, the nearest 0.1 nats before the elbow."""
    rng = np.random.default_rng(1)
    errors, inside, refused = [], [], 0
    for _ in range(count):
        amounts, alpha = np.geomspace(250, 60_000, 5), rng.uniform(0.6, 1.6)
        logs = np.log(amounts)
        k = rng.uniform(0.15, 0.5) / (logs[-1] ** alpha - logs[0] ** alpha)
        base = 2 - k * math.log(10) ** alpha
        checkpoints = 2.1 + np.linspace(0, rng.uniform(0.5, 0.9), 8)
        loss, amount = (a.ravel() for a in np.meshgrid(checkpoints, amounts))
        rise = rng.uniform(0.25, 1.0) * np.maximum(k * np.log(amount) ** alpha + base - loss, 0)
        score = np.clip(0.25 + rise + 0.015 * rng.normal(size=len(loss)), 0, 1)
        try:
            onset = emergence.EmergenceLaw.fit(loss, amount, score, chance=0.25).onset(amount=10)
        except PhasewatchError:
            refused += 1
            continue
        errors.append(abs(onset.median - 2))
        inside.append(onset.high <= 2 <= onset.low)
    text = f"within 0.1 nats {np.mean(np.array(errors) <= 0.1):.2f}, coverage {np.mean(inside):.2f}, refused {refused}"
    yield Row("emergence law, simulated", text, ">= 0.90, 0.85 to 0.95")


def two_choices() -> Iterator[Row]:
    """Items' log odds against the accuracy of the same items; and what their mean and spread alone would say."""
    odds = np.random.default_rng(0).standard_t(4, size=(20, 500)) + np.linspace(-0.3, 1.5, 20)[:, None]
    truth = (odds > 0).mean(axis=1)
    error = np.abs(emergence.choice_accuracy(odds) - truth).mean()
    spread = np.abs(ndtr(odds.mean(axis=1) / odds.std(axis=1)) - truth).mean()
    yield Row("two choices, simulated", f"error {error:.3f}; by mean and spread {spread:.3f}", "<= 0.02")


def simulated_reversals(count: int) -> Iterator[Row]:
    """How soon simulated falls are found, and how often series that don't fall ring: at any time, at their end."""
    for what, measured in (*falls(count), *false_alarms(count)):
        yield Row(what, measured, "")


def reading(lines: int) -> Iterator[Row]:
    """The time it takes to read logged samples."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "step_1000")
        folder.mkdir()
        log_p = np.log(rng.dirichlet(np.ones(5), size=lines)[:, :4])
        question = "which of these words is the longest one in the list " * 3
        with (folder / "samples_made_2026-01-01T00-00-00.1.jsonl").open("w") as file:
            for i, row in enumerate(log_p.round(4).tolist()):
                answers = [[str(value), "False"] for value in row]
                record = {"doc_id": i, "doc": {"question": question, "label": 1}, "target": "1"}
                record["arguments"] = {f"gen_args_{c}": {"arg_0": question, "arg_1": f" answer {c}"} for c in range(4)}
                record |= {"resps": [[one] for one in answers], "filtered_resps": answers, "acc": 0.0}
                file.write(json.dumps(record) + "\n")
        start, own = time.perf_counter(), time.process_time()
        emergence.read_samples(folder)
        took, own = time.perf_counter() - start, time.process_time() - own
    yield Row(f"reading {lines} lines", f"{took:.1f} s, of which {own:.1f} s of this process", "2 s")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cases", type=int, default=100, help="simulated cases of each kind")
    options = parser.parse_args()
    of_data = (ladder, ladder_cuts, public_models, generative, lambada, toy_addition, jump_in_another)
    parts = [part(options.data) for part in of_data]
    parts += [two_choices(), verdicts(options.cases), law(options.cases), reading(100_000)]
    parts += [simulated_reversals(options.cases // 2)]
    for part in parts:
        try:
            for row in part:
                print(f"{row.what:50s} {row.measured:75s} {row.target}", flush=True)
        except FileNotFoundError as missing:
            print(f"left out: {missing.filename} isn't there")


if __name__ == "__main__":
    main()
