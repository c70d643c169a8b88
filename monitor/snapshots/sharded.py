"""Models whose weights are spread over the processes of a training, and how the whole of them is gathered."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phasewatch.monitor.errors import PhasewatchError, in_words
from phasewatch.monitor.snapshots.names import without_inserted
from phasewatch.monitor.snapshots.snapshot import Snapshot, named_tensors, unwrap


def is_sharded(model: nn.Module) -> bool:
    """Whether one process holds a part of the weights only: FSDP, tensor parallelism, or ZeRO of stage 3.

    Args:
        model: any module.

    Example:
        >>> is_sharded(nn.Linear(2, 1))
        False
    """
    model = unwrap(model)
    if any(_is_in_zero_3(parameter) or hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return True
    return any(_fsdp_modules(model))


def described(model: nn.Module) -> Snapshot | None:
    """The shapes of a sharded model's tensors on the `meta` device; None where one process can't tell them.

    Args:
        model: a module that `is_sharded`.
    """
    model = unwrap(model)
    tensors = dict(named_tensors(model))
    if not any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
        return None
    return Snapshot(0, {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()})


def gathered(model: nn.Module, step: int) -> Snapshot | None:
    """Gather the weights of a sharded model; every process calls it.

    Args:
        model: a module that `is_sharded`, left as it is.
        step: the training step that it is at.

    Returns:
        The snapshot on rank 0, and None elsewhere.

    Raises:
        PhasewatchError: if that fails, as where another process has ended.
    """
    model = unwrap(model)
    try:
        tensors = _gathered_from_zero_3(model) if is_in_zero_3(model) else _full_state(model)
    except Exception as error:
        raise PhasewatchError(
            f"The weights of step {step} can't be gathered from the processes of this training ({in_words(error)}). "
            "One of them has ended or hangs, or didn't call the monitor at this step. Every rank must make it with the "
            "same run= and at=, and call it with the same steps."
        ) from error
    if dist.is_initialized() and dist.get_rank():
        return None
    for name, buffer in model.named_buffers():
        tensors.setdefault(without_inserted(name), _own(buffer))  # those that a state dict leaves out
    return Snapshot(step, tensors)


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    """The wrappers `FullyShardedDataParallel` in a model; `fully_shard` leaves none."""
    return (module for module in model.modules() if type(module).__name__ == "FullyShardedDataParallel")


def _full_state(model: nn.Module) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # with DTensor, a second

    # FSDP frees the memory of what it "moves" to the CPU, also where it is there already.
    on_cpu = any(module.compute_device.type == "cpu" for module in _fsdp_modules(model))
    options = StateDictOptions(full_state_dict=True, cpu_offload=not on_cpu)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in get_model_state_dict(model, options=options).items():
        if isinstance(tensor, Tensor) and tensor.data_ptr() not in seen:
            seen |= {tensor.data_ptr()} if tensor.numel() else set()
            tensors[name] = _own(tensor)
    return tensors


def whole_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters of a model that ZeRO 3 has spread over processes, whole; every process calls it.

    Args:
        model: a module that `is_in_zero_3`, left as it is.

    Returns:
        Copies on the CPU, by the `id` of the model's own; none on another rank than 0.
    """
    own = dict(unwrap(model).named_parameters())
    return {
        id(own[name]): nn.Parameter(tensor, requires_grad=own[name].requires_grad)
        for name, tensor in _gathered_from_zero_3(unwrap(model)).items()
    }


def _gathered_from_zero_3(model: nn.Module) -> dict[str, Tensor]:
    """One parameter at a time, since each is whole on every process while it is gathered."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    tensors = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if not dist.get_rank():
                tensors[name] = _own(parameter)
    return tensors


def is_in_zero_3(model: nn.Module) -> bool:
    """Whether DeepSpeed has spread the parameters of a model.

    Args:
        model: any module.
    """
    return any(map(_is_in_zero_3, model.parameters()))


def _is_in_zero_3(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def _own(tensor: Any) -> Tensor:
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
