# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernels: standard normal noise by its number in a stream, and the step of a chain for all parameters at once.

The noise of a stream is numbered in chunks, as `layout` says. Number i of a chunk is Philox4x32-7 (Salmon et al. 2011)
of the stream's key and a counter, and Box and Muller's transform, so that a kernel can make any part of it where it is
needed, and make it again. This module is imported where a GPU is used.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from phasewatch.monitor.sampling.layout import Layout


def fill_with_noise(flat: Tensor, sizes: Sequence[int], key: int, first: int) -> Tensor:
    """Write the noise of parameters that follow each other into one vector.

    Args:
        flat: contiguous, of the sum of the sizes.
        sizes: of the parameters.
        key: of the stream.
        first: chunk of the stream with which the first parameter begins.

    Returns:
        The vector.
    """
    layout = Layout.of(tuple((size, 0, size) for size in sizes), flat.device)
    with torch.cuda.device(flat.device):
        launch: Any = _noise[(layout.programs,)]  # pyright: ignore[reportIndexIssue]
        launch(flat, layout.offsets, layout.sizes, layout.starts, layout.owners, key, first)
    return flat


@triton.jit
def _normals(key, counter):
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, low, high, low * 0, low * 0, 7)
    a, b = _pair_of_normals(tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b))
    c, d = _pair_of_normals(tl.uint_to_uniform_float(c), tl.uint_to_uniform_float(d))
    return a, b, c, d


@triton.jit
def _pair_of_normals(one, other):
    """Two independent ones, as `tl.pair_uniform_to_normal`, by the GPU's sine and cosine.

    Those are right to about 2^-20 between -π and π, so the angle is turned by half a circle, and with it the signs.
    """
    length = -tl.sqrt(-2.0 * tl.log(tl.maximum(one, 1e-7)))
    angle = 6.283185307179586 * (other - 0.5)
    sine: tl.constexpr = "sin.approx.f32 $0, $1;"
    cosine: tl.constexpr = "cos.approx.f32 $0, $1;"
    x = tl.inline_asm_elementwise(cosine, "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1)
    y = tl.inline_asm_elementwise(sine, "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1)
    return length * x, length * y


@triton.jit(do_not_specialize=["key", "first"])
def _noise(flat, offsets, sizes, starts, owners, key, first):
    chunk = tl.program_id(0).to(tl.int64)
    k = tl.load(owners + chunk)
    lane = tl.arange(0, 256)
    within = (chunk - tl.load(starts + k)) * 1024 + lane
    size, into = tl.load(sizes + k), flat + tl.load(offsets + k)
    a, b, c, d = _normals(key, (first + chunk) * 256 + lane)
    tl.store(into + within, a, mask=within < size)
    tl.store(into + within + 256, b, mask=within + 256 < size)
    tl.store(into + within + 512, c, mask=within + 512 < size)
    tl.store(into + within + 768, d, mask=within + 768 < size)


@triton.jit
def _moved(
    at, z, last, size, w_at, half_at, anchor_at, grad_at, velocity_at, mask_at,
    of_away, of_grad, of_velocity, of_noise, of_last,
    v_of_away, v_of_grad, v_of_velocity, v_of_noise,
    START: tl.constexpr, VELOCITY: tl.constexpr, ROUNDED: tl.constexpr, MASKED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    inside = (at >= 0) & (at < size)
    if MASKED:
        moves = tl.load(mask_at.to(tl.pointer_type(tl.int8)) + at, mask=inside & (at * 0 + mask_at != 0), other=1)
        z, last = tl.where(moves != 0, z, 0.0), tl.where(moves != 0, last, 0.0)
    w = w_at.to(tl.pointer_type(tl.float32)) + at
    before = tl.load(w, mask=inside, other=0.0)
    if ROUNDED:  # the displacement is kept, in bfloat16
        displaced = anchor_at.to(tl.pointer_type(tl.bfloat16)) + at
        away = tl.load(displaced, mask=inside, other=0.0).to(tl.float32)
        origin = before - away
    else:
        origin = tl.load(anchor_at.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
        away = before - origin
    if START:
        after, velocity = origin + of_noise * z, z
    else:
        whole = inside & (at * 0 + half_at == 0) if HALF else inside
        grad = tl.load(grad_at.to(tl.pointer_type(tl.float32)) + at, mask=whole, other=0.0)
        if HALF:
            half = tl.load(
                grad_at.to(tl.pointer_type(tl.bfloat16)) + at, mask=inside & (at * 0 + half_at != 0), other=0.0
            )
            grad += half.to(tl.float32)
        after = before + (of_away * away + of_grad * grad) + (of_noise * z + of_last * last)
        velocity = v_of_away * away + v_of_grad * grad + v_of_noise * z
        if VELOCITY:
            held = tl.load(velocity_at.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
            after += of_velocity * held
            velocity += v_of_velocity * held
    if VELOCITY:
        tl.store(velocity_at.to(tl.pointer_type(tl.float32)) + at, velocity, mask=inside)
    if ROUNDED:
        away = (after - origin).to(tl.bfloat16)
        tl.store(anchor_at.to(tl.pointer_type(tl.bfloat16)) + at, away, mask=inside)
        after = origin + away.to(tl.float32)
    tl.store(w, after, mask=inside)
    if HALF:  # the parameter that passes use
        there = inside & (at * 0 + half_at != 0)
        tl.store(half_at.to(tl.pointer_type(tl.bfloat16)) + at, after.to(tl.bfloat16), mask=there)


@triton.jit(do_not_specialize=["key", "first", "before"])
def move(
    weights, halves, anchors, grads, velocities, masks, sizes, starts, skips, ahead, owners, key, first, before,
    of_away, of_grad, of_velocity, of_noise, of_last,
    v_of_away, v_of_grad, v_of_velocity, v_of_noise,
    START: tl.constexpr, VELOCITY: tl.constexpr, LAST: tl.constexpr, HALF: tl.constexpr, ROUNDED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Move a chunk of a chain's weights.

    Tables hold addresses (of masks, 0 where all of a parameter moves and -1 where none of it does; of `halves`, 0 where
    a parameter is float32 itself, else that of the parameter in bfloat16, whose gradient is in bfloat16 too), `of_` and
    `v_of_` the coefficients of a linear step.
    """
    program = tl.program_id(0).to(tl.int64)
    k = tl.load(owners + program)
    lane = tl.arange(0, 256)
    at = (program - tl.load(starts + k)) * 1024 - tl.load(skips + k) + lane
    chunk = program + tl.load(ahead + k)
    size, w_at, half_at, anchor_at = tl.load(sizes + k), tl.load(weights + k), tl.load(halves + k), tl.load(anchors + k)
    grad_at, velocity_at, mask_at = tl.load(grads + k), tl.load(velocities + k), tl.load(masks + k)
    size = tl.where(mask_at == -1, 0, size)
    a, b, c, d = _normals(key, (first + chunk) * 256 + lane)
    p, q, r, s = a, b, c, d
    if LAST:
        p, q, r, s = _normals(key, (before + chunk) * 256 + lane)
    _moved(at, a, p, size, w_at, half_at, anchor_at, grad_at, velocity_at, mask_at,
           of_away, of_grad, of_velocity, of_noise, of_last, v_of_away, v_of_grad, v_of_velocity, v_of_noise,
           START, VELOCITY, ROUNDED, MASKED, HALF)  # fmt: skip
    _moved(at + 256, b, q, size, w_at, half_at, anchor_at, grad_at, velocity_at, mask_at,
           of_away, of_grad, of_velocity, of_noise, of_last, v_of_away, v_of_grad, v_of_velocity, v_of_noise,
           START, VELOCITY, ROUNDED, MASKED, HALF)  # fmt: skip
    _moved(at + 512, c, r, size, w_at, half_at, anchor_at, grad_at, velocity_at, mask_at,
           of_away, of_grad, of_velocity, of_noise, of_last, v_of_away, v_of_grad, v_of_velocity, v_of_noise,
           START, VELOCITY, ROUNDED, MASKED, HALF)  # fmt: skip
    _moved(at + 768, d, s, size, w_at, half_at, anchor_at, grad_at, velocity_at, mask_at,
           of_away, of_grad, of_velocity, of_noise, of_last, v_of_away, v_of_grad, v_of_velocity, v_of_noise,
           START, VELOCITY, ROUNDED, MASKED, HALF)  # fmt: skip
