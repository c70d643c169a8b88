"""Hostile names, trees and JSON. Seconds as it is; FUZZ_EXAMPLES=100000 searches for longer."""

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import inside, open_append, read_bytes, read_json, read_text, write_atomically
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.strict_json import MOST_DEPTH, parse_json

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes, devices and links that anybody may make")

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "300")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
)
FRAGMENTS = [
    *'[]{},:" \\\n\x00',
    *("[" * 70, '{"a":' * 70, "]" * 70, "}" * 70, '"a"', '"\\ud800"', '"\ud800"', '"\\u00e9"', '"[[[', '\\"', "\ufeff"),
    *("1", "-", "0", "9" * 301, "9" * 5000, "1e999", "1E+308", ".5", "NaN", "-Infinity", "null", "true"),
]
TEXTS = st.one_of(
    ANY_TEXT,
    st.lists(st.sampled_from(FRAGMENTS)).map("".join),
    VALUES.map(json.dumps),
    st.builds(
        lambda value, at, cut, put: splice(json.dumps(value), at, cut, put),
        VALUES,
        st.integers(0, 99),
        st.integers(0, 3),
        st.sampled_from(FRAGMENTS),
    ),
)
PARTS = [
    *(
        "a",
        "deep",
        "b",
        "new",
        "..",
        ".",
        "",
        "/",
        "\\",
        "C:",
        "~",
        "nul\0",
        "half\ud800",
        "\udcff",
        "x" * 300,
        "\x1b[2J\n",
    ),
    *("pipe", "zero", "out", "folder-out", "circle", "dangling", "latest", "etc", "passwd", "secret", "run"),
]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("/".join) | ANY_TEXT


def splice(text, at, cut, put):
    at = at % (len(text) + 1)
    return text[:at] + put + text[at + cut :]


@contextmanager
def hostile_folder():
    """A run's folder with everything in it that leads elsewhere or never ends; what lies outside must stay as it is."""
    with tempfile.TemporaryDirectory() as parent:
        run = Path(parent, "run")
        (run / "deep").mkdir(parents=True)
        Path(parent, "outside").mkdir()
        for file in (run / "a", run / "deep" / "b"):
            file.write_bytes(b"inside")
        for file in (Path(parent, "secret"), Path(parent, "outside", "a")):
            file.write_bytes(b"secret")
        os.mkfifo(run / "pipe")
        for name, target in [
            ("zero", "/dev/zero"),
            ("out", "../secret"),
            ("folder-out", "../outside"),
            ("deep/out", "../../outside/a"),
            ("deep/up", "../.."),
            ("circle", "circle"),
            ("dangling", "../none"),
            ("latest", "deep"),
        ]:
            (run / name).symlink_to(target)
        yield run
        assert sorted(os.listdir(parent)) == ["outside", "run", "secret"]
        assert os.listdir(Path(parent, "outside")) == ["a"]
        assert Path(parent, "secret").read_bytes() == Path(parent, "outside", "a").read_bytes() == b"secret"


def is_a_sentence(error):
    text = str(error)
    assert printable(text, most=2000) == text
    assert len(text) < 1000


@fuzz
@given(TEXTS, st.booleans())
def test_json_is_a_value_that_can_be_used_or_a_sentence(text, allow_nan):
    try:
        value = parse_json(text, "here", allow_nan=allow_nan)
    except PhasewatchError as error:
        is_a_sentence(error)
        return
    json.dumps(value, ensure_ascii=False, allow_nan=allow_nan).encode()
    assert repr(value) == repr(json.loads(text))
    numbers, level, depth = [], [value], 0
    while level:
        numbers += [item for item in level if isinstance(item, int)]
        level = [
            inner
            for item in level
            if isinstance(item, list | dict)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        depth += 1
    assert depth <= MOST_DEPTH + 1
    assert all(isinstance(float(number), float) for number in numbers)


@fuzz
@given(VALUES)
def test_json_that_python_writes_is_refused_only_for_a_reason(value):
    text, refusal = json.dumps(value), ""
    try:
        assert repr(parse_json(text, "here", allow_nan=True)) == repr(json.loads(text))
    except PhasewatchError as error:
        refusal = str(error)
    assert not refusal or "half of a surrogate pair" in refusal or "twice" in refusal


@fuzz
@given(st.binary() | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_under_a_name_are_a_value_or_a_sentence(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.json")
        file.write_bytes(content)
        assert read_bytes(file, within=folder) == content
        for read in (read_text, read_json):
            try:
                read(file, within=folder)
            except PhasewatchError as error:
                is_a_sentence(error)


@fuzz
@given(NAMES)
def test_no_name_reads_outside_or_hangs(name):
    with hostile_folder() as run:
        for path in (lambda: inside(run, name), lambda: f"{run}/{name}", lambda: name):
            try:
                assert read_bytes(path(), within=run) == b"inside"
            except PhasewatchError as error:
                is_a_sentence(error)


@fuzz
@given(NAMES, st.binary(max_size=20))
def test_no_name_writes_outside_or_hangs(name, content):
    with hostile_folder() as run:
        for write in (write_atomically, append):
            try:
                path = inside(run, name)
                write(path, content)
            except PhasewatchError as error:
                is_a_sentence(error)
            except OSError:
                continue  # no such folder, or a folder in the way
            else:
                assert Path(os.path.realpath(path)).is_relative_to(os.path.realpath(run))
                assert path.read_bytes().endswith(content)


@fuzz
@given(st.sampled_from([name for name in PARTS if name and not {"/", "\0", "\ud800"} & {*name}]), st.booleans())
def test_links_in_place_of_our_own_files_are_never_followed(name, atomically):
    with hostile_folder() as run:
        if name in {".", ".."}:
            return
        try:
            (write_atomically if atomically else append)(run / name, b"ours")
        except (PhasewatchError, OSError):
            return
        assert not (run / name).is_symlink()
        assert (run / name).read_bytes().endswith(b"ours")


def append(path, content):
    with open_append(path) as file:
        file.write(content)


@fuzz
@given(ANY_TEXT, st.integers(50, 300))
def test_printable_text_is_one_short_line_that_can_be_written_anywhere(text, most):
    shown = printable(text, most)
    shown.encode()
    assert len(shown) <= most
    assert len(shown.splitlines()) <= 1
    assert printable(shown, most) == shown
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u202e\u2066\u200b" for char in shown)
    if text.isprintable() and len(text) <= most:
        assert shown == text
