"""Mutated checkpoints and indices, of every layout that is read (see tests/hostile.py)."""

import io
import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import WORDS, Mutator, Violation, cell, check_answer, command, hunt, is_a_sentence, watched
from safetensors.torch import save
from tiny_run import make_model, make_probe

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.series import open_series

GLOBALS = [
    *("os system", "posix system", "builtins eval", "builtins exec", "builtins getattr", "subprocess Popen"),
    *(
        "torch load",
        "torch.hub load",
        "pickle loads",
        "codecs encode",
        "operator attrgetter",
        "numpy load",
        "nt system",
    ),
    *("collections OrderedDict", "collections defaultdict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"),
    *("torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2"),
    *("torch Size", "torch float32", "torch.storage UntypedStorage", "torch._utils _rebuild_qtensor", "torch qint8"),
    *("torch._utils _rebuild_sparse_tensor", "torch sparse_coo", "builtins set", "builtins bytearray", "__main__ x"),
]
BOMBS = [
    *(b"cos\nsystem\n(S'touch PWNED'\ntR", b'cbuiltins\neval\n(S\'open("PWNED","w")\'\ntR', b"(lp0\n" + b"g0\na" * 50),
    *(
        b"\x8d" + struct.pack("<Q", 2**62),
        b"X\xff\xff\xff\x7f",
        b"\x8a\xff",
        b"\x8b\xff\xff\xff\x7f",
        b"\x95" + b"\xff" * 8,
    ),
    *(
        b"\x96" + struct.pack("<Q", 2**40),
        b"r\xff\xff\xff\xff",
        b"j\xff\xff\xff\xff",
        b"(" * 200,
        b"\x85" * 500,
        b"2t" * 60,
    ),
    *(
        b"I" + b"9" * 5000 + b"\n",
        b"F1e400\n",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"\x97",
        b"\x98",
        b"Pweights\n",
        b"Q",
        b"b",
        b"R",
    ),
    *(
        b"\x81",
        b"\x92",
        b"s",
        b"u",
        b".",
        b"}",
        b"]",
        b"h\x00",
        b"q\x00",
        b"0",
        b"1",
        b"e",
        b"a",
        b"K\x05",
        b"\x8e" + b"\xff" * 8,
    ),
]


def tokens():
    return [*BOMBS, *(f"c{name.replace(' ', chr(10))}\n".encode() for name in GLOBALS)]


def states():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    state = model.state_dict()
    nested = {"model": state, "optimizer": optimizer.state_dict(), "global_step": 7, "args": {"lr": 0.1}}
    shared = {"weight": state["weight"].t().t(), "bias": state["weight"][0, :1], "half": state["weight"].bfloat16()}
    return [state, nested, {"state_dict": shared, "epoch": 3}]


def saved(state, *, zipped):
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def repacked(content, mutator):
    """An archive as it was, with some of its records changed and their checksums right."""
    out = io.BytesIO()
    method = mutator.some([zipfile.ZIP_STORED] * 8 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(io.BytesIO(content)) as archive,
        zipfile.ZipFile(out, "w", method) as packed,
    ):
        warnings.simplefilter("ignore")  # two records of one name are what we want
        for name in archive.namelist():
            record = archive.read(name)
            if name.endswith("data.pkl") and mutator.maybe(0.9):
                record = mutator.bytes(record, tokens())
            elif mutator.maybe(0.1):
                record = mutator.bytes(record)
            if mutator.maybe(0.03):
                name = mutator.some(
                    ["../../PWNED", "/PWNED", "archive/data/0", "archive/data.pkl", "x/data.pkl", name * 2]
                )
            if not mutator.maybe(0.02):
                packed.writestr(name, record)
        if mutator.maybe(0.03):
            packed.writestr("archive/bomb", bytes(mutator.some([10, 10**7])), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def with_header(content, mutator):
    """A safetensors file whose header is another, of the length that it says."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for name, claim in list(header.items()):
        if "data_offsets" in claim and mutator.maybe(0.3):
            n = mutator.some([0, 1, -1, 4, 2**31, 2**63, 2**64, 10**25, 1.5, True, None, "4"])
            how = mutator.random.randrange(5)
            if how == 0:
                claim["shape"] = mutator.some([[n], [n, n], [2**32, 2**32, 0], [0, 2**62], [1] * 100, n, []])
            elif how == 1:
                claim["data_offsets"] = mutator.some([[n, 12], [0, n], [12, 0], [n], [0, 4, 8], n, [4, 16]])
            elif how == 2:
                claim["dtype"] = mutator.some(
                    ["F64", "F4", "F8_E8M0", "BOOL", "U8", "C64", "C128", 7, None, "f32", ["F32"]]
                )
            elif how == 3:
                header[mutator.some(WORDS)] = header.pop(name)
            else:
                header[name] = mutator.value()
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if mutator.maybe(0.1):
        text = text.replace(b"}", b"," + text[1:-1] + b"}", 1)
    if mutator.maybe(0.2):
        text = mutator.bytes(text)
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture(scope="module")
def sources():
    found = states()
    bare = {name: tensor.clone() for name, tensor in found[0].items()}
    return {
        "zip": [saved(state, zipped=True) for state in found],
        "legacy": [saved(state, zipped=False) for state in found],
        "safetensors": [save(bare), save({**bare, "more": torch.zeros(5), "flag": torch.tensor([True])})],
        "shards": [save({name: tensor}) for name, tensor in bare.items()],
        "pickles": [pickle.dumps(list(found[0].values()), 2), pickle.dumps({"a": {1, 2}}, 4)],
    }


def write_checkpoint(folder, step, sources, mutator):
    kind = mutator.some(
        ["zip", "repacked", "repacked", "legacy", "safetensors", "header", "header", "sharded", "sharded", "pickle"]
    )
    stem = mutator.some(
        [f"step{step}"] * 8 + [f"step{10**30}", f"step{step}\x1b[31m\n", f"step{step}\u202e", "λ" * 60, "last"]
    )
    if kind == "zip":
        (folder / f"{stem}.pt").write_bytes(mutator.bytes(mutator.some(sources["zip"])))
    elif kind == "repacked":
        (folder / f"{stem}.ckpt").write_bytes(repacked(mutator.some(sources["zip"]), mutator))
    elif kind == "legacy":
        (folder / f"{stem}.pth").write_bytes(mutator.bytes(mutator.some(sources["legacy"]), tokens()))
    elif kind == "pickle":
        (folder / f"{stem}.bin").write_bytes(mutator.bytes(mutator.some(sources["pickles"]), tokens()))
    elif kind == "safetensors":
        (folder / f"{stem}.safetensors").write_bytes(mutator.bytes(mutator.some(sources["safetensors"])))
    elif kind == "header":
        (folder / f"{stem}.safetensors").write_bytes(with_header(mutator.some(sources["safetensors"]), mutator))
    else:
        own = folder / stem.replace("step", "checkpoint-")
        if own.exists() or own.is_symlink():
            return
        own.mkdir()
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        weight_map = {"weight": names[0], "bias": names[1]}
        for shard, content in zip(names, sources["shards"], strict=True):
            (own / shard).write_bytes(mutator.bytes(content) if mutator.maybe(0.2) else content)
        if mutator.maybe(0.5):
            weight_map[mutator.some(["weight", "bias", "more"])] = mutator.some(
                [
                    *WORDS,
                    "../../outside/secret",
                    "..\\a.safetensors",
                    "./" + names[0],
                    names[0] + "/",
                    "/etc/passwd",
                    "．．/x",
                    7,
                    None,
                ]
            )
        index = own / "model.safetensors.index.json"
        index.write_bytes(mutator.document({"metadata": {"total_size": 16}, "weight_map": weight_map}))
        trainer = own / "trainer_state.json"
        if mutator.maybe(0.3):
            trainer.write_bytes(mutator.document({"global_step": step, "log_history": [{"loss": 1.0}] * 3}))
        if mutator.maybe(0.2):
            mutator.replace(mutator.some([index, trainer, own / names[0], own]))
    if mutator.maybe(0.03):
        mutator.replace(mutator.some(sorted(folder.iterdir())))


def test_mutated_checkpoints(tmp_path, sources, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_probe().subject.model

    def attempt(seed):
        mutator = Mutator(seed)
        with cell(tmp_path) as folder:
            write_checkpoint(folder, 5, sources, mutator)
            if mutator.maybe(0.2):
                write_checkpoint(folder, mutator.some((5, 6)), sources, mutator)
            (folder / "step1.safetensors").write_bytes(sources["safetensors"][0])
            with watched(folder):
                try:
                    series = open_series(folder)
                except PhasewatchError as error:
                    is_a_sentence(error)
                    return
                for step in series.steps:
                    try:
                        model.load(series.load(step))
                    except PhasewatchError as error:
                        is_a_sentence(error)
        if (tmp_path / "PWNED").exists():
            raise Violation("code was run")

    hunt(200, attempt)


PROBE = """
import sys
sys.path.insert(0, {tests!r})
from tiny_run import make_probe
probe = make_probe()
"""


def test_mutated_checkpoints_on_the_command_line(tmp_path, sources, monkeypatch):
    monkeypatch.chdir(tmp_path)
    probe = tmp_path / "fuzz_probe.py"
    probe.write_text(PROBE.format(tests=str(Path(__file__).parents[1])))

    def attempt(seed):
        mutator = Mutator(seed)
        with cell(tmp_path) as folder:
            series, run = folder / "series", folder / "run"
            series.mkdir()
            write_checkpoint(series, 5, sources, mutator)
            with watched(folder):
                status, out, err = command("replay", series, "--probe", f"{probe}:probe", "--run", run)
            failed = [line for line in err.splitlines() if " is left out: " in line]
            check_answer(status, out, err, notes=["1 checkpoints of", "Left out, since", "phasewatch: Step "])
            for line in failed:
                is_a_sentence(line)

    hunt(15, attempt)
