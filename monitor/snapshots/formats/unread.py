"""Checkpoints of layouts that aren't read, and why: one reason that names the file."""

from pathlib import Path

from phasewatch.monitor.snapshots.formats.base import is_training_state, stem_of

_SUFFIXES = {
    ".pkl": "is a pickle of whole objects, which is code; save model.state_dict() with torch.save instead",
    ".pickle": "is a pickle of whole objects, which is code; save model.state_dict() with torch.save instead",
    ".h5": "is a file of Keras, which isn't read; save the weights of a torch model",
    ".keras": "is a file of Keras, which isn't read; save the weights of a torch model",
    ".msgpack": "is a file of Flax, which isn't read; convert it to safetensors",
    ".npz": "is a file of numpy, which isn't read; save the arrays with safetensors",
    ".gguf": "is quantized for llama.cpp, which isn't read; give the checkpoint that it was made from",
    ".onnx": "is a graph of ONNX, which isn't read; give the checkpoint that it was made from",
    ".nemo": "is an archive of NeMo; unpack it with tar and give the folder with its weights",
    ".zip": "is an archive; open it by itself, or unpack it",
    ".tgz": "is an archive; open it by itself, or unpack it",
    ".tar.gz": "is an archive; open it by itself, or unpack it",
    ".index": "is a checkpoint of TensorFlow, which isn't read; save the weights of a torch model",
    ".distcp": "is a part of a torch.distributed.checkpoint folder; give the folder that holds the folder",
}


def reason_unread(path: Path) -> str:
    """Why a file or folder that no format claims isn't read; nothing if it doesn't look like a checkpoint.

    Args:
        path: any.
    """
    if path.is_dir():
        return _reason_of_folder(path)
    return _reason_of_file(path)


def _reason_of_file(path: Path) -> str:
    name = path.name.lower()
    return next(
        (
            reason
            for suffix, reason in _SUFFIXES.items()
            if name.endswith(suffix) and not is_training_state(stem_of(path)) and path.is_file()
        ),
        "",
    )


def _reason_of_folder(path: Path) -> str:
    if (path / "_CHECKPOINT_METADATA").is_file() or (path / "_METADATA").is_file():
        return "is a checkpoint of Orbax (JAX), which isn't read; convert it to safetensors"
    if (path / "keras_metadata.pb").is_file() or (path / "saved_model.pb").is_file():
        return "is a checkpoint of TensorFlow, which isn't read; save the weights of a torch model"
    if next(path.glob("*/.zarray"), None):
        return (
            "is a checkpoint in zarr, which isn't read; save it in safetensors, or by Megatron with "
            "--dist-ckpt-format torch_dist"
        )
    if next(path.glob("*.distcp"), None) or next(path.glob("*/*.distcp"), None):
        return "holds parts of a torch.distributed.checkpoint and no .metadata, so saving it was cut off; delete it"
    if ranks := sorted(path.glob("model/rank*.pt")):
        return (
            f"holds {len(ranks)} ranks' shards (model/{ranks[0].name}), which only OLMo puts together; "
            "unshard it with OLMo's scripts/unshard.py"
        )
    parts = sorted(part.name for part in path.glob("mp_rank_*/model_optim_rng.pt"))
    if parts:
        found = len(parts)
        return f"holds {found} model-parallel parts of Megatron; merge them with Megatron's tools/checkpoint/convert.py"
    files = ((file.name, _reason_of_file(file)) for file in sorted(path.iterdir()))
    return next((f"holds {name}, which {reason}" for name, reason in files if reason), "")
