"""The tables of language_stages.py, made of the points that are kept."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from induction_substages import Bump, bump_of, sequence
from language_runs import EXPERIMENT, EXTRAS
from stages import change_between
from tables import keep_table, kinds, llc_changes, markdown, not_ok, stretches, with_error

from phasewatch import Point, Trajectory, difference, find_transitions

PUBLISHED = (
    ("LM1", 900, "A", -2.33, +26.4),
    ("LM2", 6_500, "A", -1.22, +22.5),
    ("LM3", 8_500, "B", -0.18, -1.57),
    ("LM4", 17_000, "A", -0.40, +8.62),
)
"""The published stages that end within 20,000 steps: name, end, type, change of the loss and of λ̂ (2 layers)."""

WHOLE = ("longer", "replay")
"""The ways in which a whole run is measured again."""

FALLS_FROM = 500
"""The first step from which falls of λ̂ are looked for: before, it only rises."""


def read(results: Path, of: str = "") -> dict[str, Trajectory]:
    """The trajectories that are kept, by the names of their runs."""
    folder = results / "points" / (f"{EXPERIMENT}_{of}" if of else EXPERIMENT)
    return {file.stem: Trajectory.read(file) for file in sorted(folder.glob("*.jsonl"))}


def beside(results: Path) -> dict[str, dict[str, Any]]:
    """What is kept of each run beside its points."""
    folder = results / "points" / f"{EXPERIMENT}_beside"
    return {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))}


def nearest(trajectory: Trajectory, step: float) -> Point:
    """The point that was measured nearest to a step, in log step."""
    return min(trajectory, key=lambda point: abs(np.log((point.step + 1) / (step + 1))))


def stage_row(name: str, trajectory: Trajectory, way: str = "live") -> dict[str, object]:
    """A run's stages, as `find_transitions` finds them."""
    found = find_transitions(trajectory)
    return {
        "run": name,
        "measured": way,
        "points": len(trajectory),
        "last step": int(trajectory.steps[-1]),
        "loss there": float(trajectory.loss[-1]),
        "kinds": kinds(found),
        "steps": stretches(found),
        "Δλ̂": llc_changes(found),
        "Δloss": ", ".join(f"{t.loss_change:+.2f}" for t in found),
        "largest fall of λ̂": largest_fall(trajectory),
        "points not OK": not_ok(trajectory),
    }


def largest_fall(trajectory: Trajectory, least: int = FALLS_FROM) -> str:
    """How far λ̂ falls at most from one point to a later one, as a paired difference, with where it does."""
    late = [point for point in trajectory.usable() if point.step >= least]
    pairs = [(after.llc.value - before.llc.value, before, after) for before, after in combinations(late, 2)]
    if not pairs:
        return ""
    fall, before, after = min(pairs, key=lambda pair: pair[0])
    if fall >= 0:
        return "none"
    change = difference(after.llc, before.llc)
    return f"{with_error(change.value, change.error)}, {before.step} to {after.step}"


def published_row() -> dict[str, object]:
    """The published changes, as a row of the next table."""
    row: dict[str, object] = {"between the published ends": "published, 2 layers"}
    for name, end, kind, loss, llc in PUBLISHED:
        row[f"{name}, to {end}"] = f"{kind}: {llc:+.1f}; {loss:+.2f}"
    return row


def ends_row(name: str, trajectory: Trajectory) -> dict[str, object]:
    """How λ̂ and the loss change between the published ends, smoothed."""
    row: dict[str, object] = {"between the published ends": name}
    ends = [trajectory.steps[0], *(end for _, end, *_ in PUBLISHED)]
    for (label, end, *_), (before, after) in zip(PUBLISHED, pairwise(ends), strict=True):
        if end <= trajectory.steps[-1]:
            llc = change_between(trajectory, "llc", before, after)
            loss = change_between(trajectory, "loss", before, after)
            row[f"{label}, to {end}"] = f"{llc:+.1f}; {loss:+.2f}"
    return row


def bump_row(name: str, trajectory: Trajectory, bump: Bump | None) -> dict[str, object]:
    """Whether there is a bump, what comes first in it and what λ̂ does."""
    row: dict[str, object] = {"run": name, "bump": "yes" if bump else "no"}
    for metric in ("previous_token", "prefix_matching", "k_composition", "icl_score", "bigram", "trigram_loss"):
        values = trajectory.signal(metric)
        row[metric.replace("_", " ")] = f"{values[0]:.2f} to {values[-1]:.2f}"
    return row | (sequence(trajectory, bump) if bump else {})


def way_row(name: str, way: str, trajectory: Trajectory, bump: Bump) -> dict[str, object]:
    """What λ̂ does in a bump, by one way to measure it."""
    first, second = (rise.transition for rise in bump.rises)
    places = {
        "first to second start": (min(first.start, second.start), max(first.start, second.start)),
        "to the end": (max(first.start, second.start), bump.last),
    }
    row: dict[str, object] = {"run": name, "measured by": way}
    for label, (start, end) in places.items():
        before, after = nearest(trajectory, start), nearest(trajectory, end)
        change = difference(after.llc, before.llc)
        row[label] = f"{with_error(change.value, change.error)}, {before.step} to {after.step}"
    return row | {"largest fall of λ̂": largest_fall(trajectory), "points not OK": not_ok(trajectory)}


def heads_row(name: str, trajectory: Trajectory) -> dict[str, object]:
    """How each head's own λ̂ changes between the first and the last point that have it."""
    row: dict[str, object] = {"run": name, "steps": f"{trajectory.steps[0]} to {trajectory.steps[-1]}"}
    for part in trajectory[0].parts:
        own = trajectory.part(part)
        change = difference(own[-1].llc, own[0].llc)
        row[part] = with_error(change.value, change.error)
    return row


def cost_row(name: str, trajectory: Trajectory, kept: Mapping[str, Any], bump: Bump | None) -> dict[str, object]:
    """What a run's monitor cost, and how well neighbouring points are told apart."""
    low, high = (bump.first / 2, bump.last * 2) if bump else (1_000, trajectory.steps[-1])
    around = [point for point in trajectory.usable() if low <= point.step <= high]
    errors = [difference(after.llc, before.llc).error for before, after in pairwise(around)]
    training, measuring = kept["training seconds"], sum(kept["monitoring seconds"])
    return {
        "run": name,
        "steps a second": kept["steps"] / training,
        "training, s": training,
        "measuring, s": measuring,
        "share": f"{measuring / training:.0%}",
        "error of a neighbour's difference, median": float(np.median(errors)) if errors else "",
        "largest": max(errors, default=""),
        "confirmed live": confirmed(kept["called"]),
        "device": kept["device"],
    }


def confirmed(called: Sequence[Mapping[str, Any]]) -> str:
    """The transitions that were confirmed during training, and after which point."""
    return ", ".join(f"{c['kind']} {c['start']} to {c['end']} at {c['confirmed at']}" for c in called)


def rates(trajectories: Mapping[str, Trajectory], bumps: Mapping[str, Bump | None]) -> list[dict[str, object]]:
    """In how many seeds there is a bump, a split one, and a type B in it."""
    rows = []
    for layers in (2, 1):
        runs = {name: t for name, t in trajectories.items() if name.startswith(f"{layers}-layers")}
        seen = [sequence(runs[name], bump) for name in runs if (bump := bumps[name])]
        falls = [t for t in runs.values() if any(f.kind.label == "B" and f.start >= 1_000 for f in find_transitions(t))]
        rows.append(
            {
                "layers": layers,
                "runs": len(runs),
                "bump": share(len(seen), len(runs)),
                "split": share(sum(row["split"] == "yes" for row in seen), len(seen)),
                "a type B over the bump": share(sum("B" in str(row["kinds over the bump"]) for row in seen), len(seen)),
                "a type B that begins at step 1,000 or later": share(len(falls), len(runs)),
            }
        )
    return rows


def share(count: int, of: int) -> str:
    """A rate with its interval of 95 % (Wilson)."""
    if not of:
        return ""
    z, p = 1.96, count / of
    middle, half = p + z**2 / (2 * of), z * np.sqrt(p * (1 - p) / of + z**2 / (4 * of**2))
    low, high = ((middle + sign * half) / (1 + z**2 / of) for sign in (-1, 1))
    return f"{count} of {of} ({low:.0%} to {high:.0%})"


def main(results: Path) -> None:
    """Print the tables, and keep them."""
    trajectories, kept = read(results), beside(results)
    own = {name: t for name, t in trajectories.items() if "layers" in name}
    bumps = {name: bump_of(trajectory) for name, trajectory in own.items()}
    ways = {"live": trajectories} | {extra: read(results, extra) for extra in EXTRAS}
    stages = [
        stage_row(name, ways[way][name], way) for name in trajectories for way in ("live", *WHOLE) if name in ways[way]
    ]
    lines = [*markdown(rates(own, bumps)), "", *markdown(stages)]
    lines += ["", *markdown([published_row(), *(ends_row(*item) for item in own.items())])]
    lines += ["", *markdown([bump_row(name, t, bumps[name]) for name, t in own.items()])]
    by_way = [
        way_row(name, way, some[name], bump)
        for name, bump in bumps.items()
        if bump
        for way, some in ways.items()
        if name in some
    ]
    of_heads = [heads_row(*item) for item in ways["heads"].items()]
    lines += ["", *markdown(by_way)] * bool(by_way) + ["", *markdown(of_heads)] * bool(of_heads)
    costs = [cost_row(name, t, kept[name], bumps.get(name)) for name, t in trajectories.items() if name in kept]
    lines += ["", *markdown(costs)]
    keep_table(results, EXPERIMENT, lines)
