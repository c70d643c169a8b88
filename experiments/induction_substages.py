"""Is the induction bump two transitions? Previous-token heads first, induction heads later, and what λ̂ does between.

In a published language model it is: a type B while previous-token heads form, then a type A while induction heads do
(Hoogland et al., arXiv 2402.02364, stages LM3 and LM4). Here the tasks, widths, depths and data mixtures below are run
with four seeds each, at a size that takes minutes.

A bump counts where prefix matching rises above 0.3. It is split where the best previous-token score has made half of
its rise before the best prefix-matching score begins its own. What λ̂ does in between is its change from the beginning
of the first rise to the beginning of the second, a paired difference: down or up by more than twice its error, or flat.
Each head's own λ̂, with all other weights held fast (Wang et al., arXiv 2410.02984), is given for the two heads that
have the best scores at the end, as its change over the whole bump.

Claim: the rates, whichever they are, over at least 30 runs.

Measured so far: 14 runs, of the settings "triggers", "4-triggers", "markov" and, two seeds, "text". Twelve have a bump,
and none of these is split: the best previous-token score makes half of its rise after that of prefix matching, by up to
36 % of the step. λ̂ rises over the bump in all twelve, with a small type B before it in two and after it in one. The
own λ̂ of the previous-token head rises by 8 to 53, several times its error, and that of the induction head changes by
-1 to +9. In 10,000 steps of text no induction head formed (prefix matching 0.04). The other settings haven't been run.

Costs about 40 minutes on 32 CPU cores and one GPU: 2 to 4 seconds a point there while others share it, 20 for text. On
a CPU alone it is about 45 minutes a run.

    python experiments/induction_substages.py --device cuda [--seeds 4] [--jobs 32] [--only text --train-on cuda]
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from campaign import Options, Run, keep_table, markdown, measured, options
from induction_bump import LEAST
from jumps import jumps, largest
from torch import Generator, nn

from phasewatch import SGLD, Probe, Trajectory, difference, find_transitions, heads, log_spaced
from phasewatch.toy_tasks import attention_only, induction, markov_chains, text
from phasewatch.toy_tasks.head_scores import prefix_matching_scores, previous_token_scores

EXPERIMENT = "induction_substages"
SAMPLER = SGLD(step_size=1e-4, localization=100, nbeta=200, chains=4, draws=20, burn_in=20, batch_size=32)
QUICK = SGLD(step_size=1e-4, localization=100, nbeta=200, chains=2, draws=4, burn_in=2, batch_size=8)


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
}


def best_head(scores: Callable[[nn.Module, Any], Any], data: Any) -> Callable[[nn.Module, Any], float]:
    """A metric: the number of the head with the best score, counted through the layers."""
    return lambda model, batch: float(scores(model, data).argmax())


def make_probe(model: nn.Module, device: str, *, setting: str, sampler: SGLD) -> Probe:
    """λ̂ of the whole and of each head, and the scores."""
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
        weights=heads(model),
        threads=1,
        device=device,
    )


def runs(given: Options) -> list[Run]:
    """Every setting, each seed."""
    names = ["triggers"] if given.quick else list(SETTINGS)
    return [
        Run(
            name=f"{name}-seed-{seed}",
            seed=seed,
            make_model=partial(attention_only.make_model, seed, **SETTINGS[name].model),
            training=partial(attention_only.training, data=SETTINGS[name].data, seed=seed),
            make_probe=partial(make_probe, setting=name, sampler=QUICK if given.quick else SAMPLER),
            at=log_spaced(1, 12, num=5) if given.quick else log_spaced(50, SETTINGS[name].steps, num=20, linear=16),
        )
        for name in names
        for seed in given.seeds
    ]


def row(name: str, trajectory: Trajectory) -> dict[str, object]:
    """What a run shows, as a row of the table."""
    setting, _, seed = name.partition("-seed-")
    scores = {metric: trajectory.signal(metric) for metric in ("previous_token", "prefix_matching")}
    rises = [largest(jumps(trajectory, metric, "up", least=0.0)) for metric in scores]
    shown: dict[str, object] = {
        "setting": setting,
        "seed": seed,
        "bump": "yes" if scores["prefix_matching"].max() > LEAST and all(rises) else "no",
        **{metric.replace("_", " "): f"{s[0]:.2f} to {s.max():.2f}" for metric, s in scores.items()},
    }
    if shown["bump"] == "no":
        return shown
    (first, first_half), (second, second_half) = ((jump.transition, jump.half) for jump in rises if jump)
    shown |= {
        "from step": f"{first.start}, {second.start}",
        "half by step": f"{first_half:.0f}, {second_half:.0f}",
        "previous token first": "yes" if first_half < second_half else "no",
        "split": "yes" if first_half < second.start else "no",
    }
    steps = trajectory.steps
    at = [int(np.searchsorted(steps, step)) for step in (first.start, second.start, max(first.end, second.end))]
    if at[0] < at[1]:
        between = difference(trajectory[at[1]].llc, trajectory[at[0]].llc)
        trend = "flat" if abs(between.value) <= 2 * between.error else "up" if between.value > 0 else "down"
        shown["Δλ̂ between"] = f"{between.value:+.1f} ± {2 * between.error:.1f} ({trend})"
    inside = [
        t.kind.label for t in find_transitions(trajectory) if t.start < steps[at[2]] and t.end > steps[min(at[:2])]
    ]
    shown["kinds over the bump"] = " ".join(inside)
    per_layer = len(trajectory[0].refined) // (1 + max(int(part[1]) for part in trajectory[0].refined))
    for metric in scores:
        layer, head = divmod(int(trajectory.signal(f"{metric}_head")[-1]), per_layer)
        own = trajectory.of(f"L{layer}H{head}")
        change = difference(own[at[2]].llc, own[min(at[:2])].llc)
        shown[f"Δλ̂ of its head, {metric.replace('_', ' ')}"] = (
            f"L{layer}H{head} {change.value:+.1f} ± {2 * change.error:.1f}"
        )
    return shown


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
    rows = [row(name, trajectory) for name, trajectory in found.items()]
    groups = [(setting, list(group)) for setting, group in groupby(rows, key=lambda row: str(row["setting"]))]
    summary = [rates(group, setting) for setting, group in [*groups, ("all", rows)]]
    lines = [*markdown(summary), "", *markdown(rows)]
    keep_table(given, EXPERIMENT, lines)


if __name__ == "__main__":
    main()
