"""Every layout in the manual's table, made by the library that writes it or after its file layout, is read back."""

import re
from contextlib import nullcontext
from pathlib import Path

import checkpoint_layouts as made
import pytest
import torch
from torch import nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.model.weights import SampledModel
from phasewatch.monitor.snapshots.series import open_series

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to False"),
]

DOCS = Path(__file__).parents[3] / "docs" / "replay.md"

READ = {
    "safetensors files": made.safetensors_file,
    "files of torch.save": made.torch_file,
    "files of torch.save before 1.6": made.old_torch_file,
    "Hugging Face Trainer, sharded safetensors": made.sharded,
    "Hugging Face Trainer, sharded .bin": lambda folder, step: made.sharded(folder, step, ".bin"),
    "Hugging Face Trainer, sharded FSDP": made.trainer_fsdp,
    "Hugging Face Trainer, DeepSpeed": made.trainer_deepspeed,
    "Accelerate save_state": made.accelerate_by_hand,
    "torchtitan (torch.distributed.checkpoint)": made.torchtitan,
    "torch.distributed.checkpoint in safetensors": made.hf_dcp,
    "OLMo-core": made.olmo_core,
    "OLMo unsharded": made.olmo,
    "Lightning, sharded FSDP": made.lightning_fsdp,
    "Composer": made.composer,
    "Composer, sharded": made.composer_sharded,
    "Megatron torch_dist": made.megatron,
    "Megatron, one model-parallel rank": made.megatron_rank,
    "NeMo 2": made.nemo,
    "DeepSpeed ZeRO 1 and 2": made.deepspeed_2,
    "DeepSpeed ZeRO 3": made.deepspeed_3,
    "DeepSpeed universal": made.deepspeed_universal,
    "litgpt": made.litgpt,
    "nanoGPT": made.nanogpt,
    "fairseq": made.fairseq,
    "mmengine": made.mmengine,
    "detectron2": made.detectron2,
}
EXPECTED = {
    "DeepSpeed ZeRO 3": made.of_deepspeed_3,
    "Hugging Face Trainer, DeepSpeed": made.of_deepspeed_3,
    "DeepSpeed ZeRO 1 and 2": lambda step: {name: t.bfloat16() for name, t in made.weights(step).items()},
    "nanoGPT": lambda step: {f"_orig_mod.{name}": t for name, t in made.weights(step).items()},
}
REFUSED = {
    "timm": (made.timm, r"checkpoint-10\.pth\.tar is numbered by its epoch, as it says inside; give step=lambda path"),
    "whole pickled modules": (made.whole_module, r"model_10\.pt holds a pickled torch\.nn\S*Linear under 'model'"),
    "pickles": (made.pickled, r"network-snapshot-000010\.pkl is a pickle of whole objects, which is code"),
    "OLMo, sharded": (made.olmo_sharded, r"step10 holds 2 ranks' shards \(model/rank0\.pt\), which only OLMo puts"),
    "Megatron, several model-parallel ranks": (made.megatron_parallel, "iter_0000010 holds 2 model-parallel parts of"),
    "DeepSpeed, split model": (made.deepspeed_parallel, r"global_step10 holds a model that was split over ranks \(mp_"),
    "Keras, Flax, TensorFlow, ONNX, GGUF": (made.keras, r"step10\.h5 is a file of Keras, which isn't read"),
}
ELSEWHERE = {
    "Hugging Face Trainer": "test_the_trainer_itself",
    "Accelerate, numbered by itself": "test_accelerate_itself",
    "PEFT adapters": "test_adapters_of_peft",
    "Lightning": "test_lightning_itself",
    "Lightning WeightAveraging": "test_lightning_averages",
    "ema_pytorch": "test_averages_of_ema_pytorch",
    "the cache of a hub": "tests/monitor/snapshots/test_series.py",
    "a hub": "tests/monitor/snapshots/test_hub.py",
    "git branches": "tests/monitor/snapshots/test_stores.py",
    ".zip, .tar, .tar.gz": "tests/monitor/snapshots/test_stores.py",
    "s3://, gs://, memory://": "tests/monitor/snapshots/test_stores.py",
}


def assert_weights(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].is_contiguous()
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", READ)
def test_a_layout_is_read(tmp_path, layout):
    for step in (10, 20):
        READ[layout](tmp_path, step)
    series = open_series(tmp_path)
    assert series.steps == (10, 20)
    assert series.left_out == ()
    for step in series.steps:
        assert_weights(series.load(step).tensors, EXPECTED.get(layout, made.weights)(step))


@pytest.mark.parametrize("layout", REFUSED)
def test_a_layout_is_refused_with_its_reason(tmp_path, layout):
    make, reason = REFUSED[layout]
    for step in (10, 20):
        make(tmp_path, step)
    with pytest.raises(PhasewatchError, match=reason):
        open_series(tmp_path).load(10)


def test_the_manual_names_every_layout():
    table = DOCS.read_text(encoding="utf-8").partition("## Layouts")[2].partition("\n## ")[0]
    rows = [row.split("|")[1].strip() for row in re.findall(r"^\| .*$", table, re.MULTILINE)]
    assert sorted(set(rows) - {"layout"}) == sorted({*READ, *REFUSED, *ELSEWHERE})
    assert len(rows) > 25


# Written by the libraries themselves


def test_the_trainer_itself(tmp_path):
    transformers = pytest.importorskip("transformers")
    from zoo_hub import gpt2

    torch.manual_seed(0)
    model = gpt2()
    words = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    transformers.Trainer(model, settings, train_dataset=words).train()
    series = open_series(tmp_path)
    assert series.steps == (2, 4)
    own = SampledModel(gpt2())
    own.load(series.load(4))
    assert all(torch.equal(a, b) for a, b in zip(own.module.parameters(), model.parameters(), strict=True))
    model.save_pretrained(tmp_path / "sharded" / "checkpoint-6", max_shard_size="1kB")
    assert len(list((tmp_path / "sharded" / "checkpoint-6").glob("*.safetensors"))) > 1
    own.load(open_series(tmp_path / "sharded").load(6))


def test_accelerate_itself(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    settings = accelerate.utils.ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)
    accelerator = accelerate.Accelerator(cpu=True, project_config=settings)
    model = accelerator.prepare(nn.Linear(3, 2))
    for _ in range(2):
        accelerator.save_state()
    with pytest.raises(PhasewatchError, match=r"checkpoint_0 carries no step, .*give step=lambda path"):
        open_series(tmp_path / "checkpoints")
    numbered = open_series(tmp_path / "checkpoints", step=lambda path: 10 + 10 * int(path.name.partition("_")[2]))
    assert numbered.steps == (10, 20)
    settings.automatic_checkpoint_naming = False
    for step in (10, 20):
        accelerator.save_state(str(tmp_path / "own" / f"step_{step}"))
    series = open_series(tmp_path / "own")
    assert series.steps == (10, 20)
    assert_weights(series.load(10).tensors, model.state_dict())


def test_adapters_of_peft(tmp_path):
    pytest.importorskip("peft")
    trained = {step: made.peft_adapter(tmp_path, step) for step in (10, 20)}
    series = open_series(tmp_path)
    assert series.steps == (10, 20)
    own = SampledModel(made.peft_model())
    for step, model in trained.items():
        with pytest.warns(match="The probe's own values are used") if step == 10 else nullcontext():
            own.load(series.load(step))
        for (name, a), b in zip(own.module.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_lightning_itself(tmp_path):
    pytest.importorskip("lightning")
    for step in (10, 20):
        made.lightning(tmp_path, step)
    series = open_series(tmp_path)
    assert series.steps == (10, 20)
    assert set(series.load(20).tensors) == {"head.weight", "head.bias"}


def test_lightning_averages(tmp_path):
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    made.lightning(tmp_path, 10, [EMAWeightAveraging(decay=0.5)])
    (file,) = tmp_path.glob("*.ckpt")
    saved = torch.load(file, weights_only=False)
    assert_weights(open_series(tmp_path).load(10).tensors, saved["state_dict"])
    live = open_series(tmp_path, key="current_model_state").load(10).tensors
    assert_weights(live, saved["current_model_state"])
    assert not torch.equal(live["head.weight"], saved["state_dict"]["head.weight"])


def test_averages_of_ema_pytorch(tmp_path):
    pytest.importorskip("ema_pytorch")
    ema = made.ema_pytorch(tmp_path, 10)
    found = open_series(tmp_path).load(10).tensors
    assert_weights(found, ema.online_model.state_dict())
    own = SampledModel(nn.Linear(3, 2))
    for key in ("ema", "ema_model", "ema.ema_model"):
        own.load(open_series(tmp_path, key=key).load(10))
    assert_weights(dict(own.module.state_dict()), ema.ema_model.state_dict())
    assert not torch.equal(found["weight"], own.module.weight)
