"""Is the induction bump two transitions? Previous-token heads first, induction heads later, and what λ̂ does between.

In a published language model it is: a type B while previous-token heads form, then a type A while induction heads do
(Hoogland et al., arXiv 2402.02364, stages LM3 and LM4). Here the tasks, widths, depths and data mixtures below are run
with four seeds each, at a size that takes minutes.

A bump counts where prefix matching rises by more than 0.1, and the rises of both scores are found. It is split where
the best previous-token score has made half of its rise before the best prefix-matching score begins its own. What λ̂
does in between is its change from the beginning of the first rise to the beginning of the second, a paired difference:
down or up by more than twice its error, or flat. The heads that have the best scores at the end are given their own λ̂,
with all other weights held fast (Wang et al., arXiv 2410.02984): how it changes over the whole bump, or over the run
where there is none.

Claim: the rates, whichever they are, over at least 30 runs.

Measured: 34 runs, four of each setting and two of "text", of which 31 have a bump. None of them is split. λ̂ rises over
it in all, a type A.

- The tasks (28 runs, all with a bump): which score makes half of its rise first depends on the width. With triggers and
  width 32 it is previous token in three of four, by 5 to 16 % of the step; of the other 24 prefix matching in all but
  two, by up to 36 %. A small type B comes before the bump in three, with 4 triggers, and after it in twelve, all of
  width 128 and all with 16 triggers among them. Where previous token begins first, λ̂ rises meanwhile in eight of ten.
  The own λ̂ of the previous-token head rises by 2 to 83, that of the induction head changes by -11 to +9.
- Text: the standard library (2 million tokens) is learnt without induction heads, prefix matching is 0.04 after 10,000
  steps in both runs. On all packages that are installed (76 million tokens there) they form in four of four; in one
  they begin to at step 3,400 and its rise isn't found by the end, so that three count. The two settings differ in the
  model too, and what decides wasn't taken apart. Both scores leave their plateaus together,
  previous token in a head that was not the best before, and a type B follows when the bump is over, from step 3,600 on
  in two and 4,100 in one. There is none before it. That previous token is half-way first in two says little: it had
  made a third to a half of its rise in other heads long before. λ̂ of single heads wasn't measured there. The limit of
  0.1 was 0.3 until these four runs came to 0.16 to 0.30; no other run is judged differently by it.

Half of these points are called DRIFTING: chains of 20 + 20 steps are too short to settle, all the more in wide models.
Two runs were measured anew at every second point by chains of 200 + 20, of which none drifts: λ̂ comes to 1.4 to 2.1
times as much, with the same kinds in the same order. The rise of the narrow model is +104 and not +120, those of the
wide one +36 and +85 and not +24 and +74, and the type B after them is a third as large, -16 and not -46.

Costs 6 to 15 minutes a run of a task on one CPU core; text takes a GPU, and four minutes a run there. The runs of
"triggers", "4-triggers", "markov", "text" and "installed" were measured on a GPU, the first fourteen of them with the λ̂
of each head at every point.

    python experiments/induction_substages.py [--seeds 4] [--jobs 2] [--only wide] [--device cuda --train-on cuda]
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from campaign import Options, Run, measured, options
from jumps import Jump, jumps, largest
from tables import keep_table, kinds, llc_changes, markdown, with_error
from torch import Generator, nn

from phasewatch import Health, Langevin, Probe, Trajectory, Transition, difference, find_transitions, heads, log_spaced
from phasewatch.callbacks.trainers.schedule import Steps
from phasewatch.toy_tasks import attention_only, induction, markov_chains, text
from phasewatch.toy_tasks.head_scores import prefix_matching_scores, previous_token_scores

EXPERIMENT = "induction_substages"
HEADS = "induction_substages_heads"
LONGER = "induction_substages_longer"
SAMPLER = Langevin(step_size=1e-4, localization=100, nbeta=200, chains=4, draws=20, burn_in=20, batch_size=32)
SETTLED = replace(SAMPLER, burn_in=200)

SCORES = ("previous_token", "prefix_matching")
LEAST_RISE = 0.1
"""Of prefix matching, for there to be a bump. On random tokens text has lower scores than the tasks made for it."""


@dataclass(frozen=True)
class Setting:
    """A task and a model.

    Attributes:
        data: of the task.
        model: arguments of `attention_only.make_model`.
        steps: of training.
    """

    data: Any
    model: Mapping[str, int]
    steps: int = 2500


SETTINGS = {
    "triggers": Setting(induction.InductionData(), {}),
    "narrow": Setting(induction.InductionData(), {"width": 32}, steps=6000),
    "wide": Setting(induction.InductionData(), {"width": 128}, steps=2000),
    "3-layers": Setting(induction.InductionData(), {"layers": 3}),
    "4-triggers": Setting(induction.InductionData(triggers=4), {}, steps=4000),
    "16-triggers": Setting(induction.InductionData(triggers=16), {}),
    "markov": Setting(
        markov_chains.MarkovData(), {"heads": 2, "width": 32, "vocabulary": 8, "context": 100}, steps=2000
    ),
    "text": Setting(text.TextData(context=128), {"width": 128, "vocabulary": 512, "context": 128}, steps=10_000),
    "installed": Setting(
        text.TextData(vocabulary=4096, context=256, installed=True),
        {"heads": 8, "width": 256, "vocabulary": 4096, "context": 256},
        steps=6000,
    ),
}


def best_head(scores: Callable[[nn.Module, Any], Any], data: Any) -> Callable[[nn.Module, Any], float]:
    """A metric: the number of the head with the best score, counted through the layers."""
    return lambda model, batch: float(scores(model, data).argmax())


def make_probe(model: nn.Module, device: str, *, setting: str, sampler: Langevin, of_heads: bool = False) -> Probe:
    """λ̂ of the whole, and of each head if wanted, and the scores."""
    chosen = SETTINGS[setting]
    data = chosen.data
    return Probe(
        partial(attention_only.make_model, **chosen.model),
        attention_only.loss,
        data,
        eval_batch=data(Generator().manual_seed(1), 256),
        sampler=sampler,
        metrics={
            "icl_score": attention_only.icl_score,
            "previous_token": lambda model, batch: previous_token_scores(model, data).max().item(),
            "prefix_matching": lambda model, batch: prefix_matching_scores(model, data).max().item(),
            "previous_token_head": best_head(previous_token_scores, data),
            "prefix_matching_head": best_head(prefix_matching_scores, data),
        },
        parts=heads(model) if of_heads else None,
        threads=1,
        device=device,
    )


def runs(given: Options, *, of_heads: bool = False) -> list[Run]:
    """Every setting, each seed."""
    names = ["triggers"] if given.quick else list(SETTINGS)
    return [
        given.run(
            seed,
            setting=name,
            make_model=partial(attention_only.make_model, seed, **SETTINGS[name].model),
            training=partial(attention_only.training, data=SETTINGS[name].data),
            make_probe=partial(make_probe, setting=name, of_heads=of_heads),
            sampler=SAMPLER,
            at=log_spaced(50, SETTINGS[name].steps, num=20, linear=16),
        )
        for name in names
        for seed in given.seeds
    ]


@dataclass(frozen=True)
class Bump:
    """Where a run's induction bump lies.

    Attributes:
        rises: the largest of each score, previous token and prefix matching.
        first: the step at which the first of them begins.
        last: the step at which the last of them ends.
    """

    rises: tuple[Jump, Jump]
    first: int
    last: int


def bump_of(trajectory: Trajectory) -> Bump | None:
    """The bump, if prefix matching rises by more than `LEAST_RISE` and both scores' rises are found."""
    rises = [largest(jumps(trajectory, metric, "up", least=0.0)) for metric in SCORES]
    scores = trajectory.signal("prefix_matching")
    if scores.max() - scores[0] <= LEAST_RISE or rises[0] is None or rises[1] is None:
        return None
    both = [rise.transition for rise in rises if rise]
    return Bump((rises[0], rises[1]), min(t.start for t in both), max(t.end for t in both))


def runs_of_heads(given: Options, found: Mapping[str, Trajectory]) -> list[Run]:
    """The two ends of each run's bump, or of the run where there is none, with the λ̂ of each head.

    It takes nine times as long as the λ̂ of the whole, and is needed nowhere else.
    """
    chosen = []
    for run in (run for run in runs(given, of_heads=True) if run.name in found):
        bump, steps = bump_of(found[run.name]), found[run.name].steps
        ends = (bump.first, bump.last) if bump else (int(steps[0]), int(steps[-1]))
        chosen.append(replace(run, at=Steps(frozenset(ends)), trained_by=EXPERIMENT))
    return chosen


def runs_with_longer_chains(given: Options, found: Mapping[str, Trajectory]) -> list[Run]:
    """Every second point, and the bump's two ends, of a narrow and a wide model, by chains with time to settle."""
    chosen = []
    for run in runs(given):
        setting, _, seed = run.name.partition("-seed-")
        if setting in {"narrow", "wide"} and seed == "0" and run.name in found and (bump := bump_of(found[run.name])):
            probe = partial(make_probe, setting=setting, sampler=SETTLED)
            at = Steps(frozenset({*sorted(run.at.steps)[::2], bump.first, bump.last}))
            chosen.append(replace(run, at=at, make_probe=probe, trained_by=EXPERIMENT))
    return chosen


def row(name: str, trajectory: Trajectory, of_heads: Trajectory | None) -> dict[str, object]:
    """What a run shows, as a row of the table."""
    setting, _, seed = name.partition("-seed-")
    bump = bump_of(trajectory)
    shown: dict[str, object] = {"setting": setting, "seed": seed, "bump": "yes" if bump else "no"}
    for metric in SCORES:
        score = trajectory.signal(metric)
        shown[metric.replace("_", " ")] = f"{score[0]:.2f} to {score.max():.2f}"
    if bump:
        shown |= sequence(trajectory, bump)
    if of_heads:
        shown |= {f"Δλ̂ of its head, {m.replace('_', ' ')}": change_of_head(of_heads, m) for m in SCORES}
    return shown


def sequence(trajectory: Trajectory, bump: Bump) -> dict[str, object]:
    """What comes first in a bump, and what λ̂ does in it."""
    first, second = (rise.transition for rise in bump.rises)
    first_half, second_half = (rise.half for rise in bump.rises)
    shown: dict[str, object] = {
        "from step": f"{first.start}, {second.start}",
        "half by step": f"{first_half:.0f}, {second_half:.0f}",
        "previous token first": "yes" if first_half < second_half else "no",
        "split": "yes" if first_half < second.start else "no",
    }
    if first.start < second.start:
        at = {point.step: point.llc for point in trajectory}
        between = difference(at[second.start], at[first.start])
        trend = "flat" if abs(between.value) <= 2 * between.error else "up" if between.value > 0 else "down"
        shown["Δλ̂ between"] = f"{with_error(between.value, between.error)} ({trend})"
    return shown | {"kinds over the bump": kinds(over(bump, trajectory))}


def over(bump: Bump, trajectory: Trajectory) -> list[Transition]:
    """λ̂'s transitions that share steps with a bump."""
    return [t for t in find_transitions(trajectory) if t.start < bump.last and t.end > bump.first]


def change_of_head(ends: Trajectory, score: str) -> str:
    """The head that has the best score at the end, and the change of its own λ̂."""
    per_layer = len(ends[0].parts) // (1 + max(int(part[1]) for part in ends[0].parts))
    layer, head = divmod(int(ends.signal(f"{score}_head")[-1]), per_layer)
    own = ends.part(f"L{layer}H{head}")
    change = difference(own[-1].llc, own[0].llc)
    return f"L{layer}H{head} {with_error(change.value, change.error)}"


def settled_rows(name: str, short: Trajectory, longer: Trajectory) -> list[dict[str, object]]:
    """What chains of two lengths say of the same points of a run with a bump, as rows of their comparison."""
    bump, steps = bump_of(short), set(longer.steps.tolist())
    assert bump is not None
    rows: list[dict[str, object]] = []
    for sampler, points in ((SAMPLER, [point for point in short if point.step in steps]), (SETTLED, list(longer))):
        inside = over(bump, Trajectory(points))
        drifting = sum(point.llc.health is Health.DRIFTING for point in points)
        rows.append(
            {
                "run": name,
                "burn-in": sampler.burn_in,
                "drifting": f"{drifting} of {len(points)} points",
                "kinds over the bump": kinds(inside),
                "Δλ̂ of each": llc_changes(inside),
            }
        )
    return rows


def rates(rows: list[dict[str, object]], setting: str) -> dict[str, object]:
    """How often each thing was seen, as a row of the summary."""
    seen = [row for row in rows if row["bump"] == "yes"]

    def count(column: str, word: str) -> str:
        return f"{sum(word in str(row.get(column, '')).split() for row in seen)} of {len(seen)}"

    return {
        "setting": setting,
        "bump": f"{len(seen)} of {len(rows)}",
        "previous token first": count("previous token first", "yes"),
        "split": count("split", "yes"),
        **{f"λ̂ {trend} between": count("Δλ̂ between", f"({trend})") for trend in ("down", "flat", "up")},
        "a type B in it": count("kinds over the bump", "B"),
        "a type A in it": count("kinds over the bump", "A"),
    }


def main() -> None:
    """Train and measure what is missing, and print the tables."""
    given = options(__doc__, EXPERIMENT, seeds=4)
    found = measured(EXPERIMENT, runs(given), given)
    of_heads = measured(HEADS, runs_of_heads(given, found), given)
    longer = measured(LONGER, runs_with_longer_chains(given, found), given)
    rows = [row(name, trajectory, of_heads.get(name)) for name, trajectory in found.items()]
    groups = [(setting, list(group)) for setting, group in groupby(rows, key=lambda row: str(row["setting"]))]
    summary = [rates(group, setting) for setting, group in [*groups, ("all", rows)]]
    settled = [line for name in longer for line in settled_rows(name, found[name], longer[name])]
    lines = [*markdown(summary), "", *markdown(rows)]
    if settled:
        lines += ["", *markdown(settled)]
    keep_table(given.results, EXPERIMENT, lines)


if __name__ == "__main__":
    main()
