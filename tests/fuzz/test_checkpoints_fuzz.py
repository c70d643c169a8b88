"""Damaged and hostile checkpoints of every layout: no code runs, and what can't be read costs one sentence.

Dozens as it is; FUZZ_CHECKPOINTS=10000 tries more.
"""

import os
import random
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import checkpoint_layouts as made
import pytest
import torch

from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.snapshots.series import open_series

TRIES = int(os.environ.get("FUZZ_CHECKPOINTS", "60"))

LAYOUTS = {
    made.torchtitan, made.trainer_fsdp, made.hf_dcp, made.megatron, made.megatron_rank, made.lightning_fsdp,
    made.deepspeed_2, made.deepspeed_3, made.deepspeed_universal, made.trainer_deepspeed, made.composer, made.fairseq,
    made.timm, made.litgpt, made.sharded,
}  # fmt: skip
HOSTILE = [
    b"cos\nsystem\nX\x04\x00\x00\x00true\x85R",
    b"cbuiltins\nexec\nX\x04\x00\x00\x00pass\x85R",
    b"cbuiltins\ngetattr\n",
    b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
    b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n)\x81",
    b"csubprocess\nPopen\n",
    b"ctorch\nload\n",
    *(b"}", b"]", b")", b"N", b"s", b"u(", b"b", b"R", b"\x81", b"Q", b"0", b"2", b"a", b"e", b".", b"\x85", b"t"),
    *(
        b"K\xff",
        b"J\xff\xff\xff\xff",
        b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
        b"X\xff\xff\xff\x7f",
        b"h\x00",
        b"j\x00\x00\x00\x7f",
    ),
]
RUNS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "os.remove",
    "os.rmdir",
)

OUR_OWN = {*sys.stdlib_module_names, "torch", "phasewatch", "fsspec"}
"""What may be imported meanwhile."""

ran: list[str] = []
watching = False


def _audit(event: str, arguments: tuple) -> None:
    if watching and (event.startswith(RUNS) or (event == "exec" and "<string>" in repr(arguments))):
        ran.append(event)


@pytest.fixture(scope="module")
def watched():
    sys.addaudithook(_audit)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Every layout once."""
    folder = tmp_path_factory.mktemp("originals")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for make in sorted(LAYOUTS, key=lambda make: make.__name__):
            make(folder / make.__name__, 20)
    return sorted(folder.iterdir())


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, taken out, put in, or moved."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5])):
        at, n = chance.randrange(len(content) + 1), chance.choice([1, 1, 2, 8, 100])
        kind = chance.randrange(6)
        if kind == 0 and content:
            content[at % len(content)] = chance.randrange(256)
        elif kind == 1:
            del content[at : at + n]
        elif kind == 2:
            content[at:at] = chance.choice(HOSTILE)
        elif kind == 3:
            put = chance.choice(HOSTILE)
            content[at : at + len(put)] = put
        elif kind == 4:
            content[at:at] = content[: at + n][-n:]
        else:
            digit = [i for i in range(len(content)) if content[i] in b"0123456789"][:2000]
            if digit:
                content[chance.choice(digit)] = chance.choice(b"0123456789-")
    return bytes(content)


def mutate(file: Path, chance: random.Random) -> None:
    """Change a file; of an archive mostly the pickle inside, whose checksum is made right again."""
    if zipfile.is_zipfile(file) and chance.random() < 0.8:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        name = chance.choice([name for name in records if name.endswith("data.pkl")] * 4 + list(records))
        records[name] = mutated(records[name], chance)
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in records.items():
                archive.writestr(name, content)
    else:
        file.write_bytes(mutated(file.read_bytes(), chance))


@pytest.mark.parametrize("block", range(4))
def test_mutated_checkpoints_run_nothing_and_end_in_a_sentence(tmp_path, originals, watched, block):
    global watching
    said, read, modules = 0, 0, set(sys.modules)
    for number in range(block, TRIES, 4):
        chance = random.Random(number)
        folder = tmp_path / str(number)
        shutil.copytree(chance.choice(originals), folder)
        files = [file for file in folder.rglob("*") if file.is_file()]
        mutate(chance.choice([f for f in files if f.name == ".metadata"] * 3 + files), chance)
        ran.clear()
        watching = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", PhasewatchWarning)
                tensors = open_series(folder, step=lambda path: 5).load(5).tensors
            open_series(folder)
            read += 1
            assert all(type(tensor) is torch.Tensor for tensor in tensors.values()), number
        except PhasewatchError as error:
            said += 1
            text = str(error)
            assert printable(text, most=2000) == text, number
            assert text.endswith("."), (number, text)
            assert "Traceback" not in text, (number, text)
        finally:
            watching = False
        assert ran == [], number
        shutil.rmtree(folder)
    assert said
    assert read
    assert {name.partition(".")[0] for name in set(sys.modules) - modules} <= OUR_OWN


def test_the_mutations_begin_from_files_that_are_right(originals):
    for folder in originals:
        assert len(open_series(folder, step=lambda path: 5).load(5).tensors) >= 3
