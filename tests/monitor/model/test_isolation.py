import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from phasewatch.monitor.model.isolation import matmul_precision, measuring, repeatable

CPU = torch.device("cpu")


def draws():
    return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002


def test_streams_start_from_the_seed_inside_and_go_on_outside():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = [draws(), draws()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    outside = [draws()]
    inside = []
    for seed in (3, 3, 4):
        with measuring(seed, CPU, threads=torch.get_num_threads(), precision=None):
            inside.append(draws())
    outside.append(draws())
    assert outside == expected
    assert inside[0] == inside[1] != inside[2]


def test_the_same_thread_count_is_not_set_again(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    now = torch.get_num_threads()
    with measuring(0, CPU, threads=now, precision=None):
        pass
    assert set_to == []
    with measuring(0, CPU, threads=now + 1, precision=None):
        pass
    assert set_to == [now + 1, now]


def test_modes_are_plain_inside_and_back_outside():
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        with measuring(0, CPU, threads=1, precision=None):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.backends.mha.get_fastpath_enabled()
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.backends.mha.get_fastpath_enabled()


def test_everything_is_back_after_an_exception():
    torch.manual_seed(0)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()

    @measuring(0, CPU, threads=before[1] + 1, precision="high")
    def fails():
        torch.rand(1)
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()) == before[1:]


def test_two_threads_take_turns_and_leave_everything_as_it_was():
    before = torch.get_rng_state(), torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    inside, second_came, overlapping = [], threading.Event(), []

    def measure(number):
        if number:
            second_came.set()
        with measuring(number, CPU, threads=before[1] + 1 + number, precision=None):
            inside.append(number)
            second_came.wait(5)
            for _ in range(100):
                overlapping.append(inside != [number])
                torch.rand(1000)
            overlapping.append(torch.get_num_threads() != before[1] + 1 + number)
            inside.remove(number)

    threads = [threading.Thread(target=measure, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(overlapping)
    assert len(overlapping) == 202
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()) == before[1:]


def test_precision_set_for_one_backend_has_no_one_word():
    assert matmul_precision() == torch.get_float32_matmul_precision()
    script = (
        "import torch; torch.backends.mkldnn.matmul.fp32_precision = 'bf16'\n"
        "from phasewatch.monitor.model.isolation import measuring, matmul_precision\n"
        "with measuring(0, torch.device('cpu'), threads=1, precision='high'): pass\n"
        "print(matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["None", "bf16"]


def test_attention_adds_in_the_same_order_and_nothing_else_is_refused():
    flags, plain = torch.is_deterministic_algorithms_warn_only_enabled, F.scaled_dot_product_attention
    q, k, v = (torch.randn(2, 2, 8, 12, requires_grad=True) for _ in range(3))
    inside, after = [], []
    with repeatable():
        mixed = F.scaled_dot_product_attention(q, k, v)
        assert flags()
        mixed.grad_fn.register_prehook(lambda *_: inside.append(flags()))
        q.register_hook(lambda _: after.append(flags()))
        mixed.sum().backward()
        compiled = torch.compile(lambda *x: F.scaled_dot_product_attention(*x), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(q, k, v), mixed)
        with pytest.raises(RuntimeError, match="size"):
            F.scaled_dot_product_attention(q, k[..., :5], v)
        assert flags()
    assert (inside, after) == ([False], [True])
    assert F.scaled_dot_product_attention is plain
    assert not torch.are_deterministic_algorithms_enabled()
