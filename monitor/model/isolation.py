"""Measuring without a trace: random streams, threads and modes as they were before."""

import functools
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

_ALONE = threading.RLock()


@contextmanager
def untouched_randomness(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global random streams inside, and put them back after.

    Args:
        seed: what they start from inside, so that a model that draws from them is measured the same way each time.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the user's stream, kept as it is
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def measuring(seed: int, device: torch.device, *, threads: int, precision: str | None) -> Iterator[None]:
    """The same arithmetic wherever a snapshot is measured: in a training loop, a worker or a replay.

    What it sets belongs to the whole process, so a second thread that measures waits for the first.

    Args:
        seed: of the global random streams inside.
        device: where the measurement runs.
        threads: of torch's CPU operators, which decide the order of its sums.
        precision: what `matmul_precision` returned when the probe was made; None leaves it as it is.
    """
    with ExitStack() as stack:
        stack.enter_context(_ALONE)
        stack.enter_context(untouched_randomness(seed))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_no_autocast(device.type))
        # It would raise at the first NaN, where chains that diverge are a verdict.
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(_threads(threads))
        stack.enter_context(_matmul_precision(precision))
        stack.enter_context(_plain_attention())
        stack.enter_context(_parametrizations_uncached())
        # Where warnings are errors, it would decide whether the chains are vectorised.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        # Of reentrant checkpoints, where a loss is taken without a gradient.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True", category=UserWarning)
        yield


@contextmanager
def repeatable() -> Iterator[None]:
    """The kernels of a GPU that add in the same order each time, where torch has them.

    They cost little beside a pass of a model that runs alone, and much in vectorised passes of small ones. Attention
    that torch compiles is left as it is.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic
    filled, options.fill_uninitialized_memory = options.fill_uninitialized_memory, False
    attention = F.scaled_dot_product_attention
    _where_torch_has_them()
    F.scaled_dot_product_attention = _repeatable_attention(attention)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*deterministic", category=UserWarning)
            yield
    finally:
        F.scaled_dot_product_attention = attention
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        options.fill_uninitialized_memory = filled


def _where_torch_has_them(*_: Any) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)


def _at_any_rate(*_: Any) -> None:
    """Raise where torch has none. With the usual environment, cuBLAS is refused then."""
    torch.use_deterministic_algorithms(True)


def _repeatable_attention(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention whose backward pass adds in the same order each time, which torch only has where nothing else will do.

    Args:
        attention: `torch.nn.functional.scaled_dot_product_attention`.
    """

    @functools.wraps(attention)
    def repeatable_attention(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return attention(*args, **kwargs)
        try:
            _at_any_rate()
            mixed = attention(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # by matrix products one after another, which cuBLAS adds up
            _where_torch_has_them()
            return attention(*args, **kwargs)
        finally:
            _where_torch_has_them()
        node = mixed.grad_fn
        if node is not None and node.name().startswith("Slice"):  # of padded heads
            node = node.next_functions[0][0]
        if node is not None and node.name().startswith("ScaledDotProduct"):
            node.register_prehook(_at_any_rate)
            node.register_hook(_where_torch_has_them)
        return mixed

    return repeatable_attention


def matmul_precision() -> str | None:
    """As `torch.get_float32_matmul_precision`; None where it was set a backend at a time, which has no one word."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    """Call `set_num_threads` only for another number: even the same one changes how MKL shares out its work."""
    before = torch.get_num_threads()
    if wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _matmul_precision(wanted: str | None) -> Iterator[None]:
    before = matmul_precision()
    if before is None or wanted is None or wanted == before:
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _no_autocast(device_type: str) -> Iterator[None]:
    """Autocast off, and no cache of half-precision weights, without a region of autocast's own.

    Autocast keeps its copies of the weights until the outermost region ends. With one around a whole measurement, every
    loss inside that uses autocast would see the first chain's first weights for ever.
    """
    before = torch.is_autocast_enabled(device_type), torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled(device_type, False)
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_cache_enabled(before[1])


@contextmanager
def _parametrizations_uncached() -> Iterator[None]:
    """Without training's `torch.nn.utils.parametrize.cached()`, in which weights would stay those of one chain."""
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the kernels that torch's transformer layers use where no gradient is asked for.

    L(w) and L(w*) are paired, so they come from the same kernels, and these can't be vectorised.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
