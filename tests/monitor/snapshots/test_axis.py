"""Steps that don't belong on one axis are refused or resolved in words; the user's own function settles the rest."""

import pytest
import torch
from checkpoint_layouts import save, timm, weights
from safetensors.torch import save_file

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.series import open_series


def files(folder, *names, **inside):
    for seed, name in enumerate(names):
        save(folder / name, {"model": weights(seed)} | {key: values[seed] for key, values in inside.items()})


@pytest.mark.parametrize(
    ("names", "inside", "words"),
    [
        (("step100.pt", "iter_200.pt"), {}, r"step100\.pt counts steps and iter_200\.pt counts iterations"),
        (("ep0-ba50-rank0.pt", "step100.pt"), {}, "ep0-ba50-rank0.pt counts batches and step100.pt counts steps"),
        (("a.pt", "iter_7.pt"), {"global_step": (9, 7)}, ""),
        (("a.pt", "b.pt"), {"iter_num": (4, 8)}, ""),
        (
            ("stage1-step10.pt", "stage1-step20.pt", "stage2-step10.pt"),
            {},
            "stage1-step10.pt and stage2-step10.pt are ",
        ),
        (
            ("stage1-step10.pt", "stage1-step20.pt", "stage2-step15.pt"),
            {},
            r"stage2-step15\.pt starts again after stage1",
        ),
        (("stage1-step10.pt", "stage1-step20.pt", "stage2-step25.pt"), {}, ""),
        (("epoch0_step100.pt", "epoch0_step200.pt", "epoch1_step50.pt"), {}, "epoch1_step50.pt starts again after"),
        (("epoch=0-step=100.ckpt", "epoch=1-step=200.ckpt"), {}, ""),
        (("epoch1.pt", "epoch2.pt"), {}, r"epoch1\.pt carries no step, .*; give step=lambda path"),
        (("ckpt_1.pt", "ckpt_2.pt"), {"epoch": (1, 2)}, r"ckpt_1\.pt is numbered by its epoch"),
        (("ckpt_1.pt", "ckpt_2.pt"), {"epoch": (2, 3)}, r"ckpt_1\.pt is numbered by its epoch"),
        (("ckpt_1.pt", "ckpt_2.pt"), {"epoch": (0, 1)}, r"ckpt_1\.pt is numbered by its epoch"),
        (("ckpt_1.pt", "ckpt_100.pt"), {"epoch": (1, 1)}, ""),
        (("ckpt_1.pt", "ckpt_2.pt"), {"epoch": (1, 2), "global_step": (30, 60)}, ""),
        (("step1.pt", "step2.pt"), {"epoch": (1, 2)}, ""),
        (
            ("seed1_step5.pt", "seed2_step6.pt"),
            {},
            r"seed1_step5\.pt and seed2_step6\.pt are of two runs, by their seed",
        ),
        (("fold-1_step5.pt", "fold-1_step6.pt"), {}, ""),
        (
            ("rank0_step5.pt", "rank1_step5.pt"),
            {},
            r"rank0_step5\.pt and rank1_step5\.pt are both of step 5 and differ",
        ),
    ],
)
def test_steps_belong_on_one_axis(tmp_path, names, inside, words):
    files(tmp_path, *names, **inside)
    if not words:
        assert len(open_series(tmp_path)) == len(names)
        return
    with pytest.raises(PhasewatchError, match=words) as caught:
        open_series(tmp_path)
    assert "step=lambda path" in str(caught.value)
    settled = open_series(tmp_path, step=lambda path: names.index(path.name) * 7)
    assert settled.steps == tuple(7 * i for i in range(len(names)))


@pytest.mark.parametrize(
    ("key", "name", "step"),
    [
        ("global_step", "step60.pt", 999),
        ("step_count", "step60.pt", 999),
        ("iter_num", "step60.pt", 999),
        ("step", "step60.pt", 60),
        ("iteration", "step60.pt", 60),
        ("step", "model_60.pt", 999),
        ("batch", "model_60.pt", 60),
    ],
)
def test_a_step_inside_goes_before_a_name(tmp_path, key, name, step):
    """Except that `step` may count within an epoch, and `batch` may be a size."""
    files(tmp_path, name, **{key: (999,)})
    assert open_series(tmp_path).steps == (step,)


def test_a_step_that_is_a_tensor(tmp_path):
    files(tmp_path, "last.pt", step=(torch.tensor(30),))
    assert open_series(tmp_path).steps == (30,)


def test_a_number_that_is_an_epoch_is_read_with_the_users_own_step(tmp_path):
    for epoch in (10, 20):
        timm(tmp_path, epoch)
    series = open_series(tmp_path, step=lambda path: 100 * int(path.name.split("-")[1].split(".")[0]))
    assert series.steps == (1000, 2000)
    assert torch.equal(series.load(2000).tensors["head.bias"], weights(20)["head.bias"])
    averages = open_series(tmp_path, key="ema", step=lambda path: 7 if "20" in path.name else None)
    assert averages.steps == (7,)
    assert torch.equal(averages.load(7).tensors["head.bias"], weights(21)["head.bias"])


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda path: "5", r"step= must return a whole number from 0 on, or None; at a\.pt it returned '5'"),
        (lambda path: -1, "it returned -1"),
        (lambda path: True, "it returned True"),
        (lambda path: {}[0], r"step= failed at a\.pt with KeyError"),
        (lambda path: None, "found no checkpoint|looked in"),
    ],
)
def test_a_step_of_the_users_that_is_none(tmp_path, step, words):
    files(tmp_path, "a.pt")
    with pytest.raises(PhasewatchError, match=words):
        open_series(tmp_path, step=step)


def test_names_are_chosen_by_a_pattern(tmp_path):
    files(tmp_path, "ema_0.9999_010000.pt", "ema_0.9999_020000.pt", "model010000.pt", "model020000.pt", "opt010000.pt")
    with pytest.raises(PhasewatchError, match=r"ema_0\.9999_010000\.pt and model010000\.pt are both of step 10000"):
        open_series(tmp_path)
    for choice in ({"revisions": "model*"}, {"key": "ema"}, {"revisions": "ema_*.pt"}):
        series = open_series(tmp_path, **choice)
        assert series.steps == (10_000, 20_000)
        assert all(("ema" in choice.get("revisions", "ema")) == ("ema" in source.name) for source in series.sources)
    with pytest.raises(PhasewatchError, match=r"nothing in .* is named like 'x\*'; it holds ema_0"):
        open_series(tmp_path, revisions="x*")


# Which state dict


CONTENT = {
    "model": weights(1),
    "model_ema": {"module": weights(2), "decay": 0.5},
    "critic": {f"net.{name}": tensor for name, tensor in weights(3).items()},
    "nested": {"deep": {"teacher": weights(4)}},
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
    "both": {f"{name}.{part}": t for name, i in (("online", 5), ("shadow", 6)) for part, t in weights(i).items()},
}


@pytest.mark.parametrize(
    ("key", "seed", "prefix"),
    [
        (None, 1, ""),
        ("model", 1, ""),
        ("model_ema", 2, ""),
        ("ema", 2, ""),
        ("model_ema.module", 2, ""),
        ("critic", 3, "net."),
        ("teacher", 4, ""),
        ("nested.deep.teacher", 4, ""),
        ("nested", 4, ""),
        ("shadow", 6, "shadow."),
        ("both.shadow", 6, "shadow."),
    ],
)
def test_a_key_chooses(tmp_path, key, seed, prefix):
    save(tmp_path / "step1.pt", CONTENT)
    found = open_series(tmp_path, key=key).load(1).tensors
    assert found.keys() == {prefix + name for name in weights(seed)}
    assert torch.equal(found[f"{prefix}head.bias"], weights(seed)["head.bias"])


def test_a_key_that_is_not_there_or_not_clear(tmp_path):
    save(tmp_path / "step1.pt", CONTENT | {"other": {"ema": weights(7), "ema_2": {"a": weights(8), "b": weights(9)}}})
    with pytest.raises(PhasewatchError, match=r"holds no state dict under key='x'; it holds 'model', 'model_ema\.mod"):
        open_series(tmp_path, key="x").load(1)
    with pytest.raises(PhasewatchError, match=r"holds 2 state dicts, 'other\.ema_2\.a' and 'other\.ema_2\.b'; .* key="):
        open_series(tmp_path, key="ema_2").load(1)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_key_is_a_word_of_the_prefix_of_an_average(tmp_path, suffix):
    prefixes = {"model": 1, "model_ema": 2}
    both = {f"{name}.{part}": tensor for name, i in prefixes.items() for part, tensor in weights(i).items()}
    path = tmp_path / f"step1.{suffix}"
    save(path, {"state_dict": both}) if suffix == "pt" else save_file(both, path)
    found = open_series(tmp_path, key="ema").load(1).tensors
    assert found.keys() == {f"model_ema.{name}" for name in weights(2)}
    assert torch.equal(found["model_ema.head.bias"], weights(2)["head.bias"])


def test_a_key_is_a_prefix_where_there_are_names_alone(tmp_path):
    both = {f"{name}.{part}": tensor for name, i in (("a", 1), ("b", 2)) for part, tensor in weights(i).items()}
    save(tmp_path / "step1.safetensors", both)
    assert open_series(tmp_path, key="b").load(1).tensors.keys() == {f"b.{name}" for name in weights(1)}
    with pytest.raises(PhasewatchError, match=r"holds nothing under key='c'; its names begin with 'a', 'b'"):
        open_series(tmp_path, key="c").load(1)


def test_the_optimizers_copy_of_deepspeed(tmp_path):
    from checkpoint_layouts import deepspeed_2

    for step in (10, 20):
        deepspeed_2(tmp_path, step)
    found = open_series(tmp_path, key="fp32").load(20).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(20).items())
