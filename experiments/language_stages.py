"""A language model's own stages at the published size: is the induction bump a type B and then a type A?

So it is in print: a 2-layer attention-only transformer of 3 million parameters, on natural text, has λ̂ falling by 1.57
between steps 6,500 and 8,500, while previous-token heads form, and rising by 8.62 from there to 17,000, while induction
heads do; one layer doesn't have the fall (Hoogland et al., arXiv 2402.02364, stages LM3 and LM4). Here the same model
is trained with the same optimizer and batches on other text, English prose from Debian's packages of documentation
(english_corpus.py), under PhaseMonitor.

Each run is trained under a monitor; then its snapshots are measured again in the ways that its item of the queue names:
the published step size, another nβ, longer chains, averaged weights, λ̂ of each head, the published sampler, a replay by
coarse to fine. Two other architectures, Llama's and Pythia's, are trained by Hugging Face's Trainer with
HuggingFaceCallback.

Claim: whichever it is, seed by seed.

Measured: two layers, seeds 0 to 5, seed 5 twice, the first time to step 14,650; one layer, seeds 0 and 1; on H200s, by
torch 2.11.

- The behaviour comes in the published order and at the published steps. Previous-token heads of the first layer, which
  induction heads can read, make a quarter of their rise at steps 7,300 to 9,400; the probability of tokens that came
  before does at 9,400 to 11,000, and nine tenths of it at 13,300 to 17,600. In seed 5 it is 10,900 and 12,100.
  (Attention to the previous token rises in the second layer from step 1,400 on, where it is no part of that circuit.)
  The loss falls by 0.07 to 0.14 from step 6,500 to 8,500, published 0.18, and by 0.32 to 0.42 to 17,000, published
  0.40.
- λ̂ doesn't fall. From 6,251 to 8,751, the points next to 6,500 and 8,500, it rises in each of six runs by the published
  step size, and by 2.4 to 5.3 (each ± 0.9 to 1.9, 95 %) in the five that were measured by smaller steps; from the first
  layer's previous-token heads to induction by 1.5 to 4.7, and over induction by 9 to 12. By the published sampler, with
  4 chains for 20, it rises by 4.7 ± 0.3 to step 9,056 in the one run that was measured so, seed 5; there also by
  averaged weights (2.8 ± 1.0) and by nβ = 30 (1.9 ± 1.7). The only type B of 2 layers is at steps 3 to 16. After step
  500 the largest fall is 2.0 ± 0.8, at one point of one seed.
- What there is near that place is a slower rise: by 22 to 24 for each e-fold of steps at first, by 6 to 14 at least
  (from step 3,700 to 6,200 on), and by 22 to 44 again from 9,600 to 11,900 on, with induction. In 4 of 5 runs a stage
  ends and another begins at 5,626 to 7,501; the published boundary is 6,500. One layer has neither.
- The published step size isn't small enough here: κ = ε (nβ h + γ) comes to 113, where chains are stable up to 2.
  Differences of neighbouring points then have errors of 0.5 to 0.75 in the median, and up to 8. Steps of 1e-4 with
  momentum 0.8 have 0.20 (largest 0.39 to 0.67); chains four times as long, without momentum, give the same λ̂ within
  2 %. By the published steps λ̂ is up to 13 % larger. Of the points by smaller steps nearly all are LOCALIZED: the
  level is γ's. By nβ = 30, 1.38 times as much, λ̂ is 1.34 to 1.37 times as large.
- Each head's own λ̂ rises from step 2,501 to 20,000 or doesn't change: most, by 30 to 32, in the first layer's
  previous-token head.
- Monitoring took 40 to 46 % of training's time at first (1.45 s a point), and 31 to 37 % by the same chains with CUDA
  graphs, and weights that metrics find on the GPU (1.0 s a point, 0.8 s with one layer). The table's 17 and 21 % leave
  out the first points of seeds 4 and 3, which were there. `Budget` held seed 5's to 19.6 %, of which a quarter went
  into compiling: 18 of 57 snapshots, 1.5 s each by the longer chains. The boundary at 5,626 is found so as by all
  snapshots, and the type B at steps 3 to 16 isn't.
- Llama's and Pythia's shapes have one type A, to the end or nearly. Both were watched without a budget.

Not measured yet: one layer and seed 4 by smaller steps, other nβ, longer chains. Seeds 3 and 4 were begun twice: their
points up to steps 1,251 and 4,376 are of the first time.

An item of the queue is LAYERS:SEED with +EXTRA for each of: EXTRAS; +all for all. A run is left when the minutes are
over, and the next call goes on with it; nothing that is done is done again. Or it is llama:SEED or pythia:SEED, which
have no extras. With `--out`, points, reports and what else is small are
packed to one file there, and the states of unended runs beside it.

    python experiments/english_corpus.py
    CUDA_VISIBLE_DEVICES=0 python experiments/language_stages.py --device cuda --minutes 9 --queue 2:0+all,1:0
    python experiments/language_stages.py --table
"""

import argparse
import tarfile
import time
import traceback
from pathlib import Path

import language_table
import torch
from campaign import RESULTS
from language_runs import (
    EXPERIMENT,
    EXTRAS,
    Size,
    measure_again,
    published_size,
    run_of,
    smallest_size,
    train_run,
)

SHORTEST = 20.0
"""Seconds that must be left for anything else to be begun."""


def command_line() -> argparse.Namespace:
    """Read the command line."""
    description = (__doc__ or "").replace("EXTRAS", ", ".join(EXTRAS))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", default="", help="items, by commas, in the order in which they are done")
    parser.add_argument("--table", action="store_true", help="only print the tables of the points that are kept")
    parser.add_argument("--quick", action="store_true", help="the smallest size, to see that it runs")
    parser.add_argument("--steps", type=int, default=20_000, help="of training (default: %(default)s)")
    parser.add_argument("--other-steps", type=int, default=5_000, help="of Llama and Pythia (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which it ends (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda with one GPU visible (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus/tokens.bin"), help="default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs") / EXPERIMENT, help="default: %(default)s")
    parser.add_argument("--states", type=Path, default=None, help="of runs that were left (default: --runs/states)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where points go (default: results/)")
    parser.add_argument("--out", type=Path, default=None, help="where to pack what is to be carried away")
    parser.add_argument("--label", default="part", help="of the packed file's name (default: %(default)s)")
    return parser.parse_args()


def parts(queue: str) -> list[tuple[str, str]]:
    """Each item of a queue's run with "", and then with each of its extras.

    Raises:
        SystemExit: for an extra that there isn't, or that goes with no such run.
    """
    found = []
    for item in filter(None, queue.split(",")):
        run, *named = item.split("+")
        extras = list(EXTRAS) if named == ["all"] else named
        there = EXTRAS if run[0].isdigit() else ()
        if unknown := [extra for extra in extras if extra not in there]:
            raise SystemExit(
                f"--queue {item}: +{unknown[0]} isn't there. Use {', '.join(there) or 'none with this run'}."
            )
        found += [(run, extra) for extra in ("", *extras)]
    return found


def work(given: argparse.Namespace, size: Size, deadline: float) -> list[str]:
    """Do the queue.

    Returns:
        The parts that failed; the others went on.
    """
    failed = []
    for run, extra in parts(given.queue):
        left = deadline - time.monotonic()
        if left < SHORTEST * (not size.quick):
            print(f"{run}+{extra}: not begun, {left:.0f} s are left", flush=True)
            continue
        try:
            do(run, extra, given, size, deadline)
        except Exception:
            traceback.print_exc()
            failed.append(f"{run}+{extra}")
        print(f"{run}+{extra}: {left - deadline + time.monotonic():.0f} s in all", flush=True)
    return failed


def do(run: str, extra: str, given: argparse.Namespace, size: Size, deadline: float) -> None:
    """Train a run, if it isn't at its end, or measure it again."""
    kind, seed = run.split(":")
    where = {"runs": given.runs, "results": given.results, "device": given.device}
    if not kind.isdigit():
        from language_models import train_model

        train_model(kind, int(seed), size, steps=given.other_steps, deadline=deadline, **where)
        return
    states = given.states or given.runs / "states"
    name = run_of(int(kind), int(seed))
    ended = states / f"{name}.ended"
    if extra and ended.exists():
        measure_again(name, extra, size, **where)
    elif not ended.exists() and train_run(int(kind), int(seed), size, states=states, deadline=deadline, **where):
        ended.touch()


def pack(given: argparse.Namespace) -> None:
    """Pack points, reports and run folders without snapshots, and put the states of unended runs beside."""
    given.out.mkdir(parents=True, exist_ok=True)
    states = given.states or given.runs / "states"
    with tarfile.open(given.out / f"{given.label}.tar.gz", "w:gz") as archive:
        for file in sorted((given.results / "points").glob(f"{EXPERIMENT}*/*.json*")):
            archive.add(file, f"points/{file.parent.name}/{file.name}")
        for file in sorted(given.runs.rglob("*")):
            if file.is_file() and not {"snapshots", "averaged", "states"} & set(file.relative_to(given.runs).parts):
                archive.add(file, f"runs/{file.relative_to(given.runs)}")
    for file in sorted(states.glob("*-weights.pt")):
        name = file.name.removesuffix("-weights.pt")
        if not (states / f"{name}.ended").exists():
            for part in ("weights", "moments"):
                (given.out / f"{name}-{part}.pt").write_bytes((states / f"{name}-{part}.pt").read_bytes())


def main() -> None:
    """Do the queue, or print the tables."""
    given = command_line()
    if given.table:
        language_table.main(given.results)
        return
    deadline = time.monotonic() + 60 * given.minutes
    torch.set_float32_matmul_precision("high")
    size = smallest_size(given.corpus, given.steps) if given.quick else published_size(given.corpus, given.steps)
    failed: list[str] = []
    try:
        failed = work(given, size, deadline)
    finally:
        if given.out is not None:
            pack(given)
    if failed:
        raise SystemExit(f"These failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
