"""Measuring without a trace: random streams, threads and modes as they were before."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch


@contextmanager
def untouched_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global random streams inside, and put them back after.

    Args:
        seed: what they start from inside, so that a model that draws from them is measured the same way each time.
        device: the device whose stream torch uses besides the CPU's.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the user's stream, kept as it is
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.manual_seed(seed) if devices else torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def measuring(seed: int, device: torch.device, *, threads: int, matmul_precision: str) -> Iterator[None]:
    """The same arithmetic wherever a snapshot is measured: in a training loop, a worker or a replay.

    Args:
        seed: of the global random streams inside.
        device: where the measurement runs.
        threads: of torch's CPU operators, which decide the order of its sums.
        matmul_precision: as in `torch.set_float32_matmul_precision`.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.enter_context(untouched_randomness(seed, device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        try:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(matmul_precision)
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.set_float32_matmul_precision(before[1])
