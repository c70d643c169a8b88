"""Checkpoints as the libraries that people train with leave them: by the library itself, or after its file layout."""

import argparse
import json
import math
import pickle
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def weights(step: int) -> dict[str, Tensor]:
    """Weights that tell their step, of several shapes and dtypes."""
    generator = torch.Generator().manual_seed(step)
    return {
        "layers.0.weight": torch.randn(7, 3, generator=generator),
        "layers.1.weight": torch.randn(7, 3, generator=generator),
        "head.bias": torch.randn(5, generator=generator),
    }


def save(path: Path, content) -> Path:
    """`content` as the suffix of `path` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path


def optimizer() -> dict:
    layer = nn.Linear(2, 2)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    adam.step()
    return adam.state_dict()


# Distributed


def save_by_ranks(folder: Path, state: dict, ranks: int, nested: dict[str, Tensor], writer=None) -> None:
    """What `torch.distributed.checkpoint.save` of several ranks leaves, by torch's own code, one rank after another.

    The tensors of `nested` are sharded along their first axis. `state` makes what is saved from a rank's own part.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    todo, plans = [], []
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (ranks,))
            local = {}
            for name, tensor in nested.items():
                each = -(-len(tensor) // ranks)
                part = tensor.tensor_split([each * i for i in range(1, ranks)])[rank].clone()
                local[name] = DTensor.from_local(
                    part, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
                )
            planner, out = DefaultSavePlanner(), (writer or FileSystemWriter)(str(folder))
            planner.set_up_planner(state(local), None, rank == 0)
            out.set_up_storage_writer(rank == 0)
            plans.append(out.prepare_local_plan(planner.create_local_plan()))
            todo.append((planner, out))
        finally:
            dist.destroy_process_group()
    planner, out = todo[0]
    plans, metadata = planner.create_global_plan(plans)
    results = []
    for (own, own_out), plan in zip(todo, out.prepare_global_plan(plans), strict=True):
        written = own_out.write_data(own.finish_plan(plan), own)
        written.wait()
        results.append(written.value())
    out.finish(metadata, results)


def save_distributed(folder: Path, content: dict) -> None:
    import torch.distributed.checkpoint as dcp

    folder.mkdir(parents=True, exist_ok=True)
    dcp.save(content, checkpoint_id=str(folder), no_dist=True)


def torchtitan(folder: Path, step: int) -> None:
    def state(model):
        return {**model, "optimizer": {"state": {"layers.0.weight": {"exp_avg": torch.zeros(7, 3)}}}, "train_state": 3}

    save_by_ranks(folder / f"step-{step}", state, 3, weights(step))


def trainer_fsdp(folder: Path, step: int) -> None:
    inner = folder / f"checkpoint-{step}"
    save_distributed(inner / "pytorch_model_fsdp_0", {"model": weights(step)})
    save_distributed(inner / "optimizer_0", {"optimizer": {"x": torch.ones(2)}})
    save(inner / "trainer_state.json", {"global_step": step})
    save(inner / "rng_state_0.pth", {})
    save(inner / "scheduler.pt", {})


def olmo_core(folder: Path, step: int) -> None:
    inner = folder / f"step{step}"
    save_distributed(inner / "model_and_optim", {"model": weights(step), "optim": {"state": {"x": torch.ones(2)}}})
    save(inner / "train" / "rank0.pt", {"global_step": step})
    save(inner / "config.json", {})
    save(inner / ".metadata.json", {"version": "v2"})


def lightning_fsdp(folder: Path, step: int) -> None:
    inner = folder / f"epoch={step}.ckpt"
    save_distributed(inner, {"model": weights(step), "optimizer_0": {"state": {"x": torch.ones(2)}}})
    save(inner / "meta.pt", {"global_step": step, "epoch": step, "hyper_parameters": argparse.Namespace(lr=1)})


def composer_sharded(folder: Path, step: int) -> None:
    save_distributed(folder / f"ep0-ba{step}", {"state": {"model": weights(step), "optimizers": {"x": torch.ones(2)}}})


def hf_dcp(folder: Path, step: int) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    def writer(path):
        return HuggingFaceStorageWriter(path, save_distributed=True)

    save_by_ranks(folder / f"step-{step}", lambda model: model, 2, weights(step), writer)


def megatron(folder: Path, step: int) -> None:
    inner, own = folder / f"iter_{step:07d}", weights(step)
    stacked = torch.stack([own["layers.0.weight"], own["layers.1.weight"]])
    model = {"layers.weight": stacked, "head.bias": own["head.bias"]}
    save_distributed(inner, model | {"optimizer.state.exp_avg.layers.weight": stacked * 0})
    save(inner / "common.pt", {"args": argparse.Namespace(a=1), "iteration": step, "checkpoint_version": 3.0})
    save(inner / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))


def nemo(folder: Path, step: int) -> None:
    megatron(folder, step)
    inner = folder / f"model--val_loss=1.25-step={step}-consumed_samples={step * 32}.0"
    inner.mkdir()
    (folder / f"iter_{step:07d}").rename(inner / "weights")
    (folder / "latest_checkpointed_iteration.txt").unlink()
    save(inner / "context" / "io.json", {})


def megatron_rank(folder: Path, step: int) -> None:
    content = {"args": argparse.Namespace(a=1), "iteration": step, "model": weights(step), "optimizer": optimizer()}
    save(folder / f"iter_{step:07d}" / "mp_rank_00" / "model_optim_rng.pt", content)


# DeepSpeed, after its own zero_to_fp32.py


def deepspeed_2(folder: Path, step: int, ranks: int = 2) -> None:
    inner, own = folder / f"global_step{step}", weights(step)
    states = {
        "module": {name: tensor.bfloat16() for name, tensor in own.items()},
        "buffer_names": [],
        "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in own.items())],
        "shared_params": {},
        "global_steps": step,
        "dp_world_size": ranks,
        "ds_config": {"a": 1},
    }
    save(inner / "mp_rank_00_model_states.pt", states)
    flat = torch.cat([tensor.flatten() for tensor in own.values()])
    flat = torch.cat([flat, torch.zeros(-len(flat) % (2 * ranks))])
    for rank, part in enumerate(flat.chunk(ranks)):
        state = {"zero_stage": 2, "partition_count": [ranks], "single_partition_of_fp32_groups": [part.clone()]}
        file = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        save(inner / file, {"optimizer_state_dict": state | {"base_optimizer_state": optimizer()}})
    (folder / "latest").write_text(f"global_step{step}")


def deepspeed_3(folder: Path, step: int, ranks: int = 3) -> None:
    inner, own = folder / f"global_step{step}", weights(step)
    buffer, frozen = torch.arange(4.0) + step, torch.arange(10.0) * step
    flat: list[list[Tensor]] = [[] for _ in range(ranks)]
    for tensor in own.values():
        for rank, part in enumerate(partitions(tensor, ranks)):
            flat[rank].append(part)
    for rank in range(ranks):
        states = {
            "module": {name: torch.empty(0) for name in own} | {"buffer": buffer},
            "buffer_names": ["buffer"],
            "param_shapes": [{name: tensor.shape for name, tensor in own.items()}],
            "frozen_param_shapes": {"frozen": frozen.shape},
            "frozen_param_fragments": {"frozen": partitions(frozen, ranks)[rank].clone()},
            "shared_params": {"tied": "head.bias"},
            "global_steps": step,
        }
        save(inner / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", states)
        whole = torch.cat(flat[rank])
        state = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [whole[:4].clone(), whole[4:].clone()]}
        save(inner / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": state})


def of_deepspeed_3(step: int) -> dict[str, Tensor]:
    own = weights(step)
    more = {"buffer": torch.arange(4.0) + step, "frozen": torch.arange(10.0) * step, "tied": own["head.bias"]}
    return own | more


def partitions(tensor: Tensor, ranks: int) -> tuple[Tensor, ...]:
    each = math.ceil(tensor.numel() / ranks)
    return torch.cat([tensor.flatten(), torch.zeros(each * ranks - tensor.numel())]).chunk(ranks)


def deepspeed_universal(folder: Path, step: int) -> None:
    inner = folder / f"global_step{step}_universal"
    for name, tensor in weights(step).items():
        save(inner / "zero" / name / "fp32.pt", {"param": tensor, "cat_dim": 0})
        save(inner / "zero" / name / "exp_avg.pt", {"param": tensor * 0})
    save(inner / "mp_rank_00_model_states.pt", {"module": {}, "global_steps": step})


def trainer_deepspeed(folder: Path, step: int) -> None:
    deepspeed_3(folder / f"checkpoint-{step}", step)
    save(folder / f"checkpoint-{step}" / "trainer_state.json", {"global_step": step})
    (folder / f"checkpoint-{step}" / "latest").write_text(f"global_step{step}")


# Files and folders of others


def safetensors_file(folder: Path, step: int) -> None:
    save(folder / f"step{step}.safetensors", weights(step))


def torch_file(folder: Path, step: int) -> None:
    suffix = {10: ".pth", 20: ".pth.tar"}[step]
    save(folder / f"model_{step}{suffix}", {"epoch": 3, "model": weights(step), "optimizer": optimizer()})


def old_torch_file(folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    torch.save(weights(step), folder / f"model_{step}.tar", _use_new_zipfile_serialization=False)


def sharded(folder: Path, step: int, suffix: str = ".safetensors") -> None:
    inner, own = folder / f"checkpoint-{step}", weights(step)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    shard_of = {name: f"{stem}-{i:05d}-of-00003{suffix}" for i, name in enumerate(own, start=1)}
    for name, shard in shard_of.items():
        save(inner / shard, {name: own[name]})
    save(inner / f"{stem}{suffix}.index.json", {"weight_map": shard_of})
    save(inner / "trainer_state.json", {"global_step": step})
    save(inner / "optimizer.pt", optimizer())


def accelerate_by_hand(folder: Path, step: int) -> None:
    inner = folder / f"step_{step}"
    save(inner / "model.safetensors", weights(step))
    save(inner / "optimizer.bin", optimizer())
    save(inner / "scheduler.bin", {})
    save(inner / "sampler.bin", {})
    save(inner / "random_states_0.pkl", {"step": 3})
    save(inner / "custom_checkpoint_0.pkl", {})


def olmo(folder: Path, step: int) -> None:
    for name, content in {"model": weights(step), "optim": {"state": {}}, "train": {"global_step": step}}.items():
        save(folder / f"step{step}-unsharded" / f"{name}.pt", content)
    (folder / f"step{step}-unsharded" / "config.yaml").write_text("a: 1")


def litgpt(folder: Path, step: int) -> None:
    content = {"model": weights(step), "optimizer": optimizer(), "iter_num": step * 4, "step_count": step}
    save(folder / {10: "step-00000010", 20: "final"}[step] / "lit_model.pth", content)


def nanogpt(folder: Path, step: int) -> None:
    content = {"model": {f"_orig_mod.{n}": t for n, t in weights(step).items()}, "optimizer": optimizer()}
    save(folder / f"out-{step * 7}" / "ckpt.pt", content | {"iter_num": step, "best_val_loss": 3.0, "config": {}})


def composer(folder: Path, step: int) -> None:
    state = {"model": weights(step), "optimizers": {"Adam": optimizer()}, "timestamp": {"batch": step, "sample": 1}}
    save(folder / f"ep0-ba{step}-rank0.pt", {"state": state, "rng": [{"torch": torch.get_rng_state()}]})


def fairseq(folder: Path, step: int) -> None:
    content = {
        "args": None,
        "cfg": argparse.Namespace(a=1),
        "model": weights(step),
        "last_optimizer_state": optimizer(),
    }
    history = {"optimizer_history": [{"num_updates": step // 2}, {"num_updates": step}], "extra_state": {"epoch": 3}}
    save(folder / f"checkpoint{step // 10}.pt", content | history)


def timm(folder: Path, step: int) -> None:
    content = {"epoch": step, "arch": "vit", "state_dict": weights(step), "optimizer": optimizer()}
    content |= {"args": argparse.Namespace(lr=1), "state_dict_ema": weights(step + 1), "metric": 0.5}
    save(folder / f"checkpoint-{step}.pth.tar", content)


def mmengine(folder: Path, step: int) -> None:
    content = {"meta": {"epoch": 3, "iter": step}, "state_dict": weights(step), "optimizer": optimizer()}
    save(folder / f"epoch_{step}.pth", content)


def detectron2(folder: Path, step: int) -> None:
    save(folder / f"model_{step:07d}.pth", {"model": weights(step), "optimizer": optimizer(), "iteration": step})


def whole_module(folder: Path, step: int) -> None:
    save(folder / f"model_{step}.pt", {"model": nn.Linear(2, 1), "step": step})


def pickled(folder: Path, step: int) -> None:
    save(folder / f"network-snapshot-{step:06d}.pkl", {"G": nn.Linear(2, 1)})


def olmo_sharded(folder: Path, step: int) -> None:
    for rank in range(2):
        save(folder / f"step{step}" / "model" / f"rank{rank}.pt", {"x": torch.ones(2)})


def megatron_parallel(folder: Path, step: int) -> None:
    for rank in range(2):
        save(folder / f"iter_{step:07d}" / f"mp_rank_0{rank}" / "model_optim_rng.pt", {"model": weights(step)})


def deepspeed_parallel(folder: Path, step: int) -> None:
    for rank in range(2):
        save(folder / f"global_step{step}" / f"mp_rank_0{rank}_model_states.pt", {"module": weights(step)})


def keras(folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"step{step}.h5").write_bytes(b"\x89HDF")


# By libraries that may not be there


def lightning(folder: Path, step: int, callbacks=()) -> Path:
    """A Lightning checkpoint whose name carries no step."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    torch.manual_seed(0)

    class Model(lightning.LightningModule):
        def __init__(self, out=Path("x")):
            super().__init__()
            self.save_hyperparameters()
            self.head = nn.Linear(3, 1)

        def training_step(self, batch, _):
            return self.head(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(torch.ones(step, 3))
    trainer = lightning.Trainer(
        max_steps=step,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(folder / str(step), filename="{epoch}", save_top_k=-1, every_n_train_steps=step),
            *callbacks,
        ],
    )
    model = Model()
    trainer.fit(model, data)
    (file,) = (folder / str(step)).glob("*.ckpt")
    return file.rename(folder / f"after-{'ab'[step // 20]}.ckpt")


def peft_model():
    """A tiny GPT-2 with adapters, the same base each time."""
    from peft import LoraConfig, get_peft_model
    from zoo_hub import gpt2

    torch.manual_seed(0)
    return get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_f"]))


def peft_adapter(folder: Path, step: int):
    model = peft_model()
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / f"checkpoint-{step}")
    save(folder / f"checkpoint-{step}" / "trainer_state.json", {"global_step": step})
    return model


def ema_pytorch(folder: Path, step: int):
    from ema_pytorch import EMA

    torch.manual_seed(step)
    model = nn.Linear(3, 2)
    ema = EMA(model, beta=0.5, update_after_step=0, update_every=1)
    for _ in range(3):
        with torch.no_grad():
            model.weight += 1
        ema.update()
    save(folder / f"step{step}.pt", {"model": model.state_dict(), "ema": ema.state_dict(), "step": step})
    return ema
