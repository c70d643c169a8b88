"""λ̂ of language models from 14 million to 6.9 billion parameters on one GPU: what a point takes, and both paths of one.

- Cost: for each of Pythia's shapes, a point of 4 chains x 150 steps, in time and memory beside a raw pass. The weights
  are random, which is all the same to the cost (bench_large.py, which also compares it with other loops).
- Truth: a model of Pythia 14M's shape is trained on English text for some minutes, and each of its snapshots measured
  twice, by stacked chains and by chains in place. Both take the same noise in float32, so that λ̂ may differ by rounding
  alone.

    python experiments/english_corpus.py                          # makes the text
    python experiments/large_models.py                            # on a GPU
    python experiments/large_models.py --quick                    # the smallest, on a CPU
    python experiments/large_models.py --models 6.9B --minutes 0  # one size's cost alone
"""

import time
from functools import partial
from pathlib import Path

import bench_large
import torch
from bench_large import SHAPES, measure
from command_line import command_line
from torch import nn

import phasewatch as pw
from phasewatch.toy_tasks.english import EnglishData

SHAPES["14M"] = (6, 128, 4)
SAMPLER = pw.Langevin(step_size=3e-4, localization=300.0, nbeta=30.0, chains=4, draws=80, burn_in=40, batch_size=16)
SAVED = 6
"""Snapshots of the training; from the second on, each at a third of the next one's time."""


def train(make: partial[nn.Module], data: EnglishData, minutes: float, device: str) -> list[pw.Snapshot]:
    """Train for some minutes, and keep snapshots at times that grow threefold.

    Args:
        make: builds the model.
        data: the text.
        minutes: of training.
        device: where to train.

    Returns:
        The snapshots.
    """
    torch.manual_seed(0)
    model, generator = make().train(), torch.Generator(device).manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    snapshots, began, step = [pw.Snapshot.of(model, 0)], time.perf_counter(), 0
    while len(snapshots) < SAVED:
        with torch.autocast(device, torch.bfloat16):
            value = bench_large.loss(model, data(generator, 32))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        step += 1
        if time.perf_counter() - began > 60 * minutes / 3 ** (SAVED - 1 - len(snapshots)):
            snapshots.append(pw.Snapshot.of(model, step))
    return snapshots


def compare_paths(snapshots: list[pw.Snapshot], make: partial[nn.Module], data: EnglishData) -> None:
    """Measure each snapshot by stacked chains and in place.

    Args:
        snapshots: of the training.
        make: builds the model.
        data: the text.
    """
    paths = {}
    for name in ("stacked", "in place"):
        paths[name] = pw.Probe(make, bench_large.loss, data, eval_batch=data.held_out(32), sampler=SAMPLER)
    loss = paths["in place"].subject.loss
    if not loss.mask_forms:
        print(f"Nothing to compare: {loss.path}")
        return
    paths["stacked"].subject.loss.vectorised, loss.vectorised = True, False
    print(f"{loss.model.size / 1e6:.1f}M parameters, trained on {data.file}; chosen here: {loss.path}")
    for snapshot in snapshots:
        began = time.perf_counter()
        stacked = paths["stacked"](snapshot)
        between = time.perf_counter()
        in_place = paths["in place"](snapshot)
        apart = abs(stacked.llc.value - in_place.llc.value) / abs(stacked.llc.value)
        print(
            f"  step {snapshot.step}: loss {stacked.loss:.3f}, λ̂ {stacked.llc.value:.4g} ± {stacked.llc.error:.2g} "
            f"({stacked.llc.health.name}), in place {apart:.1e} away; {between - began:.1f} s stacked, "
            f"{time.perf_counter() - between:.1f} s in place",
            flush=True,
        )


def main() -> None:
    """Measure."""
    parser = command_line(__doc__, quick="the smallest model and a few steps")
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=["70M", "160M", "410M", "1.4B", "2.8B", "6.9B"])
    parser.add_argument("--minutes", type=float, default=4.0, help="of training; 0 for none (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, default=EnglishData.file, help="default: %(default)s")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.quick:
        SHAPES["14M"] = SHAPES["70M"] = (1, 16, 2)
        bench_large.LENGTH, bench_large.VOCABULARY = 8, 5_000
        arguments.models, arguments.minutes = ["70M"], 0.1
    steps = 54 if arguments.quick else bench_large.STEPS
    for name in arguments.models:
        measure(name, device, compare=False, chains=bench_large.CHAINS, steps=steps, also=[])
    if arguments.minutes:
        data = EnglishData(arguments.corpus, context=4 if arguments.quick else 256)
        bench_large.VOCABULARY = data.vocabulary
        make = partial(bench_large.make_model, "14M", device)
        compare_paths(train(make, data, arguments.minutes, device), make, data)


if __name__ == "__main__":
    main()
