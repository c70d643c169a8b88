"""The tables of language_stages.py, made of the points that are kept."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from language_runs import EXPERIMENT, REPLAY
from live import call, replayed
from stages import as_stages
from tables import keep_table, kinds, llc_changes, markdown, not_ok, stretches, with_error

from phasewatch import Point, Trajectory, difference, find_transitions
from phasewatch.monitor.trajectories.smoothing import log_steps, smooth

PUBLISHED = (
    ("LM1", 900, "A", -2.33, +26.4),
    ("LM2", 6_500, "A", -1.22, +22.5),
    ("LM3", 8_500, "B", -0.18, -1.57),
    ("LM4", 17_000, "A", -0.40, +8.62),
)
"""The published stages that end within 20,000 steps: name, end, type, change of the loss and of λ̂ (2 layers)."""

FROM = 500
"""The first step from which scores' rises and falls of λ̂ are looked for: before, the model learns bigrams."""

WINDOW = 1.3
"""The factor of steps over which a rise is taken."""

FEWEST = 10
"""A whole run has more points than this; other ways are measured late in it, or at some of its steps."""

NEAR = 1.15
"""A point stands for a step that is less than this factor away."""

FIRST_LAYER = "previous_token_first_layer"
"""The best previous-token score of the heads that induction heads can read: those of the first layer."""

SCORES = {
    "previous token": "previous_token",
    "previous token, first layer": FIRST_LAYER,
    "K-composition": "k_composition",
    "prefix matching": "prefix_matching",
    "repeated tokens": "repeat_p_among_choices",
    "in-context score": "icl_score",
}
"""The scores whose rise (or fall, of the last) is timed. Of the repeated tokens, the probability of the right one."""

SHARES = (0.25, 0.5, 0.9)
"""Of a score's change; a rise begins at the first of them."""

LEARNT = 0.3
"""Rise of the probability of repeated tokens from which there is induction. One layer comes to 0.15."""

AS_SET = "as set"
"""Measured by `language_runs.SAMPLER`, or by `language_models.SAMPLER`."""


def read(results: Path, kept: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Trajectory]]:
    """The trajectories that are kept: by the way in which they were measured, and then by the names of their runs.

    Args:
        results: the folder of points.
        kept: what is kept of each run beside its points, for `FIRST_LAYER`.
    """

    def scored(name: str, point: Point) -> Point:
        if name not in kept or not point.metrics:
            return point
        heads = kept[name]["by head"].get(str(point.step))
        best = max(heads["previous_token"][0]) if heads else math.nan
        return replace(point, metrics={**point.metrics, FIRST_LAYER: best})

    ways = {}
    for folder in sorted((results / "points").glob(f"{EXPERIMENT}*")):
        found = {
            file.stem: Trajectory(scored(file.stem, point) for point in Trajectory.read(file))
            for file in sorted(folder.glob("*.jsonl"))
        }
        if found:
            ways[folder.name.removeprefix(EXPERIMENT).removeprefix("_") or AS_SET] = found
    return ways


def beside(results: Path) -> dict[str, dict[str, Any]]:
    """What is kept of each run beside its points."""
    folder = results / "points" / f"{EXPERIMENT}_beside"
    return {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))}


def each(ways: Mapping[str, Mapping[str, Trajectory]]) -> Iterator[tuple[str, str, Trajectory]]:
    """Run, way and trajectory, run by run."""
    for name in sorted({name for runs in ways.values() for name in runs}):
        yield from ((name, way, runs[name]) for way, runs in ways.items() if name in runs)


def change(trajectory: Trajectory, start: float, end: float) -> tuple[float, float] | None:
    """The change of λ̂ between the points nearest to two steps, and its error; None if there are none near them."""
    nearest = [min(trajectory, key=lambda point: abs(np.log((point.step + 1) / (step + 1)))) for step in (start, end)]
    for point, step in zip(nearest, (start, end), strict=True):
        if not 1 / NEAR < (point.step + 1) / (step + 1) < NEAR:
            return None
    found = difference(nearest[1].llc, nearest[0].llc)
    return found.value, found.error


def cell(found: tuple[float, float] | None) -> str:
    """A change with its error."""
    return "" if found is None else with_error(*found)


def reached(trajectory: Trajectory, metric: str) -> list[float]:
    """The steps at which a score has made `SHARES` of its change from step `FROM` to the end, smoothed over log step.

    The first is the last step at which it hadn't; the others are the first ones after it.
    """
    late = Trajectory(point for point in trajectory if point.step >= FROM).usable(metric)
    x = log_steps(late.steps)
    curve = smooth(x, late.signal(metric)).value
    done = (curve - curve[0]) / (curve[-1] - curve[0])
    begun = int(np.flatnonzero(done < SHARES[0])[-1])
    risen = np.maximum.accumulate(done[begun:])
    return [float(np.exp(np.interp(share, risen, np.log(late.steps[begun:])))) for share in SHARES]


def whole(trajectory: Trajectory) -> bool:
    """Whether points lie all through a run."""
    return trajectory.steps[0] <= 1 and len(trajectory) > FEWEST


def rates(ways: Mapping[str, Mapping[str, Trajectory]]) -> list[dict[str, object]]:
    """In how many runs λ̂ falls where it does in print, a type B is found, or a boundary lies where one does."""
    rows: list[dict[str, object]] = []
    for way, layers in ((way, layers) for way in ways for layers in (2, 1)):
        runs = [t for name, t in ways[way].items() if name.startswith(f"{layers}-layers") and whole(t)]
        if not runs:
            continue
        changes = [found for t in runs if (found := change(t, PUBLISHED[1][1], PUBLISHED[2][1]))]
        stages = [find_transitions(t) for t in runs]
        end = PUBLISHED[1][1]
        rows.append(
            {
                "layers": layers,
                "measured": way,
                "runs": len(runs),
                "λ̂ falls from 6,500 to 8,500": share_of(sum(v < -2 * e for v, e in changes), len(changes)),
                "it rises": share_of(sum(v > 2 * e for v, e in changes), len(changes)),
                f"a type B from step {FROM} on": share_of(
                    sum(any(t.kind.label == "B" and t.start >= FROM for t in found) for found in stages), len(runs)
                ),
                "a stage ends within 20 % of 6,500": share_of(
                    sum(any(end / 1.2 <= t.end <= 1.2 * end for t in found) for found in stages), len(runs)
                ),
            }
        )
    return rows


def share_of(count: int, of: int) -> str:
    """A rate with its interval of 95 % (Wilson)."""
    if not of:
        return ""
    z, p = 1.96, count / of
    middle, half = p + z**2 / (2 * of), z * np.sqrt(p * (1 - p) / of + z**2 / (4 * of**2))
    low, high = ((middle + sign * half) / (1 + z**2 / of) for sign in (-1, 1))
    return f"{count} of {of} ({max(low, 0):.0%} to {high:.0%})"


def stage_row(name: str, way: str, trajectory: Trajectory) -> dict[str, object]:
    """A run's stages, as `find_transitions` finds them."""
    found = find_transitions(trajectory)
    looks = replayed(trajectory)
    calls = [call(looks, stage) for stage in as_stages(found)]
    return {
        "run": name,
        "measured": way,
        "points": len(trajectory),
        "last step": int(trajectory.steps[-1]),
        "loss there": float(trajectory.loss[-1]),
        "kinds": kinds(found),
        "steps": stretches(found),
        "seen at the point of step": ", ".join(str(seen.called or "-") for seen in calls),
        "confirmed at that of": ", ".join(str(seen.confirmed or "-") for seen in calls),
        "Δλ̂": llc_changes(found),
        "Δloss": ", ".join(f"{t.loss_change:+.2f}" for t in found),
    }


def published_row() -> dict[str, object]:
    """The published changes, as a row of the next table."""
    row: dict[str, object] = {"run": "published, 2 layers", "measured": "by its authors"}
    for name, end, kind, loss, llc in PUBLISHED:
        row[f"{name}, to {end}"] = f"{kind}: {llc:+.1f}; {loss:+.2f}"
    return row


def ends_row(name: str, way: str, trajectory: Trajectory) -> dict[str, object]:
    """How λ̂ and the loss change between the published ends, and where λ̂ falls furthest."""
    row: dict[str, object] = {"run": name, "measured": way}
    ends = [1, *(end for _, end, *_ in PUBLISHED)]
    x = log_steps(trajectory.steps)
    for (label, end, *_), (before, after) in zip(PUBLISHED, pairwise(ends), strict=True):
        if found := change(trajectory, before, after):
            loss = np.interp(log_steps(np.array([before, after])), x, trajectory.loss)
            row[f"{label}, to {end}"] = f"{cell(found)}; {loss[1] - loss[0]:+.2f}"
    if whole(trajectory):
        row["rise for each e-fold of steps: most, least, most"] = pace(trajectory)
    return row | {"largest fall of λ̂": largest_fall(trajectory), "points not OK": not_ok(trajectory)}


def pace(trajectory: Trajectory) -> str:
    """How fast λ̂ rises for each e-fold of steps, smoothed: most before the end of LM2, least from there, most after."""
    x = log_steps(trajectory.steps)
    curve = smooth(x, trajectory.signal("llc")).value
    steps = np.geomspace(2 * FROM, trajectory.steps[-1] / WINDOW, 200)
    first, last = (np.interp(log_steps(ends), x, curve) for ends in (steps, WINDOW * steps))
    rise = (last - first) / math.log(WINDOW)
    before = int(rise[steps < PUBLISHED[1][1]].argmax())
    least = before + int(rise[before : int(np.argmax(steps > PUBLISHED[2][1]))].argmin())
    after = least + int(rise[least:].argmax())
    return ", ".join(f"{rise[i]:.1f} at {steps[i]:.0f}" for i in (before, least, after))


def largest_fall(trajectory: Trajectory) -> str:
    """How far λ̂ falls at most from one point to a later one, as a paired difference, with where it does."""
    late = [point for point in trajectory.usable() if point.step >= FROM]
    pairs = [(after.llc.value - before.llc.value, before, after) for before, after in combinations(late, 2)]
    if not pairs:
        return ""
    fall, before, after = min(pairs, key=lambda pair: pair[0])
    if fall >= 0:
        return "none"
    found = difference(after.llc, before.llc)
    return f"{with_error(found.value, found.error)}, {before.step} to {after.step}"


def times_row(name: str, scored: Trajectory, measured: Mapping[str, Trajectory]) -> dict[str, object]:
    """When each score makes its rise, and what λ̂ does between the heads' beginnings and over induction's rise."""
    row: dict[str, object] = {"run": name}
    at: dict[str, list[float]] = {}
    for label, metric in SCORES.items():
        values = scored.usable(metric).signal(metric)
        row[label] = f"{values[0]:.2f} to {values[-1]:.2f}"
        if np.ptp(values) > 0:
            at[label] = reached(scored, metric)
            row[label] = f"{row[label]}: {', '.join(f'{step:.0f}' for step in at[label])}"
    heads, induction = at["previous token, first layer"], at["repeated tokens"]
    metric = SCORES["repeated tokens"]
    if np.ptp(scored.usable(metric).signal(metric)) > LEARNT and heads[0] < induction[0]:
        for way, trajectory in measured.items():
            row[f"Δλ̂ from these heads to induction, {way}"] = cell(change(trajectory, heads[0], induction[0]))
            row[f"Δλ̂ over induction, {way}"] = cell(change(trajectory, induction[0], induction[-1]))
    return row


def heads_row(name: str, way: str, trajectory: Trajectory) -> dict[str, object]:
    """How each head's own λ̂ changes between the first and the last point that have it."""
    row: dict[str, object] = {"run": name, "measured": way, "steps": f"{trajectory.steps[0]} to {trajectory.steps[-1]}"}
    for part in trajectory[0].parts:
        own = trajectory.part(part)
        found = difference(own[-1].llc, own[0].llc)
        row[part] = with_error(found.value, found.error)
    return row


def cost_row(name: str, kept: Mapping[str, Any], measured: Mapping[str, Trajectory]) -> dict[str, object]:
    """What a run's monitor cost, and how well neighbouring points are told apart from a tenth of the run on."""
    training, measuring = kept["training seconds"], sum(kept["monitoring seconds"])
    row = {
        "run": name,
        "device": kept["device"],
        "steps a second": kept["steps"] / training,
        "training, s": training,
        "measuring, s": measuring,
        "points": kept["points"],
        "share": f"{measuring / training:.0%}",
    }
    for way, trajectory in measured.items():
        errors = neighbours([point for point in trajectory.usable() if point.step >= trajectory.steps[-1] / 10])
        row[f"error of a neighbour's difference, median and largest, {way}"] = (
            f"{np.median(errors):.2f}, {max(errors):.2f}"
        )
    return row


def neighbours(points: Sequence[Point]) -> list[float]:
    """The errors of the differences of neighbouring points."""
    return [difference(after.llc, before.llc).error for before, after in pairwise(points)]


def main(results: Path) -> None:
    """Print the tables, and keep them."""
    kept = beside(results)
    ways = read(results, kept)
    of_heads = {way: ways.pop(way) for way in list(ways) if way.endswith("heads")}
    all_through = [(name, way, t) for name, way, t in each(ways) if whole(t)]
    own = [(name, way, t) for name, way, t in each(ways) if "layers" in name]
    lines = [*markdown(rates(ways)), "", *markdown([stage_row(*some) for some in all_through])]
    lines += ["", *markdown([published_row(), *(ends_row(*some) for some in own)])]
    timed = []
    for name in dict.fromkeys(name for name, *_ in own):
        of_run = {way: t for other, way, t in own if other == name}
        scored = next((t for t in of_run.values() if set(SCORES.values()) <= set(t[0].metrics) and whole(t)), None)
        if scored:
            timed.append(
                times_row(name, scored, {way: t for way, t in of_run.items() if whole(t) and REPLAY not in way})
            )
    lines += ["", *markdown(timed)]
    lines += ["", *markdown([heads_row(*some) for some in each(of_heads)])] * bool(of_heads)
    costs = [cost_row(name, kept[name], {way: t for other, way, t in all_through if other == name}) for name in kept]
    lines += ["", *markdown(costs)]
    keep_table(results, EXPERIMENT, lines)
