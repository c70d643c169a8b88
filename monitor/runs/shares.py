"""What each of several measuring processes of one machine gets of it: a GPU, cores, and a cache of compiled code."""

import getpass
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch

from phasewatch.monitor.errors import say
from phasewatch.monitor.probing.probe import Probe

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def environments(probe: Probe, workers: int) -> list[dict[str, str]]:
    """The environments of workers on this machine; says so where they would wait for each other's threads.

    Args:
        probe: that they measure with.
        workers: how many there are.

    Returns:
        One for each.
    """
    device, threads, cores = probe.subject.model.device, probe.threads, usable_cores()
    on_gpu = device.type == "cuda"
    if not on_gpu and workers > 1 and workers * threads > cores:
        say(
            f"{workers} workers of {threads} threads each share {cores} cores. "
            f"Probe(threads={max(1, cores // workers)}) is faster, and rounds sums in another order."
        )
    share: int | None = max(1, cores // workers)
    # On a CPU, a number of threads that torch starts with and the same one set later round differently.
    if not on_gpu and (share == threads) != (torch.get_num_threads() == threads):
        share = None
    gpus = [] if on_gpu and device.index else visible_gpus()  # the user chose one that isn't the first
    return [environment_of(place, environ=os.environ, gpus=gpus, threads=share) for place in range(workers)]


def environment_of(
    place: int, *, environ: Mapping[str, str], gpus: Sequence[str], threads: int | None
) -> dict[str, str]:
    """The environment of one of several workers.

    Args:
        place: which of the workers, from 0.
        environ: of the parent.
        gpus: that the parent sees, as `CUDA_VISIBLE_DEVICES` names them: numbers, UUIDs or MIG devices.
        threads: that it starts with; None for as many as the parent did.

    Returns:
        The parent's, with one GPU where it has any.

    Example:
        >>> environ = {"CUDA_VISIBLE_DEVICES": "2,GPU-8a1f"}
        >>> own = environment_of(3, environ=environ, gpus=["2", "GPU-8a1f"], threads=4)
        >>> own["CUDA_VISIBLE_DEVICES"], own["OMP_NUM_THREADS"]
        ('GPU-8a1f', '4')
    """
    own = dict(environ)
    if gpus:
        own["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    if threads is not None:
        own.update(dict.fromkeys(THREADS, str(threads)))
    with suppress(OSError, KeyError, ImportError):  # who has no name, shares nothing
        own.setdefault(CACHE, os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}"))  # torch's own
    return own


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process sees, as its mask names them, or else by their numbers. No GPU is touched.

    Args:
        environ: of this process.

    Returns:
        Their names for `CUDA_VISIBLE_DEVICES`, in order.

    Example:
        >>> visible_gpus({"CUDA_VISIBLE_DEVICES": "MIG-41b36014, 3,-1,0"})
        ['MIG-41b36014', '3']
    """
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    names: list[str] = []
    for name in map(str.strip, mask.split(",")):
        if not name or name.startswith("-"):  # CUDA sees nothing from there on
            break
        names.append(name)
    return names


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
