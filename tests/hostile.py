"""What the fuzzers share: mutated bytes, JSON and folders, and a watch over what reading them does.

Inputs are numbered; a failure names its number. FUZZ_EXAMPLES=10000 tries as many inputs of each kind,
FUZZ_FIRST=1234 begins there, so that FUZZ_FIRST=1234 FUZZ_EXAMPLES=1 repeats one.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import stat
import sys
import time
import traceback
import warnings
from pathlib import Path

from phasewatch.cli import main
from phasewatch.monitor.errors import MOST_CHARACTERS
from phasewatch.monitor.formatting import printable

MOST_SECONDS = 10.0
MOST_GROWTH = 200 * 2**20
SECRET = b"AKIA-TOP-SECRET"

TOKENS = [
    *(b"", b"\0", b"\xff", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J", b"\xe2\x80\xae"),
    *(b"NaN", b"-Infinity", b"1e400", b"-0", b"1_000", b"9" * 400, b"0x10", b"1.5", b"-1", b"9223372036854775808"),
    *(b"[" * 70, b'{"a":' * 70, b'"\\ud800"', b"{}", b"[]", b"null", b"true", b'""', b'"' + b"x" * 3000 + b'"'),
    *(b"../../secret", b"/etc/passwd", b"..\\secret", b"\xc2\x9b31m", b"<script>", b"=cmd|' /C calc'!A0", b"," * 50),
]
WORDS = [
    *("", "a", "..", "../secret", "/etc/passwd", "C:\\x", "a\0b", "\x1b[31m", "\u202e", "\ud800", "x" * 5000, "λ", "∞"),
    *(
        "<b>",
        "nan",
        "step",
        "llc",
        "loss",
        "1e999",
        "\n",
        "phasewatch: all fine",
        "\x9b2J",
        "weight",
        "OK",
        "__class__",
    ),
]
NUMBERS = [
    *(0, -0.0, 1, -1, 0.5, 7, 1e-320, 1e150, 1e308, -1e308, 1e16, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30),
    *(10**299, 10**400, float("nan"), float("inf"), -float("inf"), True, 1700000000000000000),
]


class Mutator:
    """Every choice by a seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def some(self, choices):
        return self.random.choice(choices)

    def maybe(self, share=0.5):
        return self.random.random() < share

    def bytes(self, content, tokens=TOKENS):
        """The same with one to four changes: bits, bytes, numbers, pieces that are cut, doubled, moved or put in."""
        content = bytearray(content)
        for _ in range(self.random.choice((1, 1, 2, 4))):
            at, end = sorted(self.random.randrange(len(content) + 1) for _ in range(2))
            end = min(end, at + self.some((1, 4, 50, 10**9)))
            how = self.random.randrange(8)
            if how == 0 and content:
                content[at % len(content)] ^= 1 << self.random.randrange(8)
            elif how == 1 and content:
                content[at % len(content)] = self.some((0, 1, 127, 128, 255, self.random.randrange(256)))
            elif how == 2:
                content[at : at + 8] = self.some((0, 1, 2**31, 2**32, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
            elif how == 3:
                del content[at:end]
            elif how == 4:
                content[at:at] = content[at:end][:10_000]
            elif how == 5:
                del content[at:]
            else:
                content[at : at + self.some((0, 0, 5))] = self.some(tokens)
        return bytes(content)

    def value(self, depth=0):
        """Any value that a JSON may hold."""
        kind = self.random.randrange(6 if depth < 3 else 3)
        if kind < 2:
            return self.some(NUMBERS)
        if kind == 2:
            return self.some([*WORDS, None, None])
        if kind == 3:
            return {self.some(WORDS): self.value(depth + 1) for _ in range(self.random.randrange(4))}
        return [self.value(depth + 1) for _ in range(self.random.randrange(4))]

    def json(self, value, share=0.15):
        """The same with some of what it holds left out, replaced, renamed or wrapped."""
        if self.maybe(share / 3):
            return self.some([self.value(), [value], {"a": value}, str(value)[:3000]])
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if not self.maybe(share / 3)}
            changed = {(self.some(WORDS) if self.maybe(share / 5) else k): self.json(v, share) for k, v in kept.items()}
            return changed | ({self.some(WORDS): self.value()} if self.maybe(share) else {})
        if isinstance(value, list):
            return [
                self.json(item, share)
                for item in value
                for _ in range(self.some((0, 2)) if self.maybe(share / 5) else 1)
            ]
        return self.value() if self.maybe(share) else value

    def document(self, value):
        """The bytes of a mutated JSON, now and then damaged further."""
        content = json.dumps(self.json(value), indent=self.some((None, 1))).encode("utf-8", "surrogatepass")
        return self.bytes(content) if self.maybe(0.2) else content

    def replace(self, path, *, links=True):
        """Put something that is no file of its own in the place of a file; no link where the user names the file."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        how = self.random.randrange(9)
        outside = path.parents[len(path.parts) - path.parts.index("inside") - 1].parent / "outside"
        if how == 0:
            os.mkfifo(path)
        elif how == 1:
            path.mkdir()
        elif how == 2:
            path.write_bytes(b"")
        elif how == 3:
            path.write_bytes(b"x")
            path.chmod(0)
        elif how < 8 and links:
            path.symlink_to(
                self.some([outside / "secret", outside, "/dev/zero", path.name, "none", "/etc/passwd", ".."])
            )


class Violation(AssertionError):
    """What must never happen."""


_watched = []
_FORBIDDEN = {
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.bind"),
    *("pickle.find_class", "os.chown", "os.kill", "webbrowser.open", "code.__new__"),
}


def _hook(event, arguments):
    if not _watched:
        return
    folder, violations = _watched[-1]
    if event in _FORBIDDEN:
        violations.append(f"{event}{arguments!r}"[:300])
    if event in (
        "open",
        "os.listdir",
        "os.scandir",
        "os.remove",
        "os.rename",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.mkdir",
    ):
        follows = event != "open" or not (isinstance(arguments[2], int) and arguments[2] & os.O_NOFOLLOW)
        for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
            if not isinstance(path, str | bytes | os.PathLike):
                continue
            path = os.fsdecode(path)
            if not path.startswith(str(folder.parent)) and path not in {"/etc/passwd", "/dev/zero"}:
                continue
            above, name = os.path.split(path)
            real = (
                os.path.realpath(path)
                if follows and event in ("open", "os.listdir", "os.scandir", "os.truncate")
                else os.path.join(os.path.realpath(above), name)
            )
            if not Path(real).is_relative_to(folder):
                where = traceback.extract_stack()[-3]
                violations.append(f"{event} {path!r}, which is {real!r} ({where.filename}:{where.lineno})")


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(folder):
    """Nothing in the block runs code, or opens, lists, moves or removes what lies outside of the folder."""
    violations = []
    _watched.append((Path(folder), violations))
    try:
        yield
    finally:
        _watched.pop()
    if violations:
        raise Violation(f"{len(violations)} times, first: {violations[0]}")


@contextlib.contextmanager
def cell(parent):
    """A folder `inside`, and beside it a folder `outside` that has to stay as it is."""
    place = Path(parent, "cell")
    inside, outside = place / "inside", place / "outside"
    inside.mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_bytes(SECRET)
    try:
        yield inside
        if sorted(os.listdir(place)) != ["inside", "outside"] or os.listdir(outside) != ["secret"]:
            raise Violation(f"written outside: {sorted(os.listdir(place))}, {os.listdir(outside)}")
        if (outside / "secret").read_bytes() != SECRET:
            raise Violation("the file outside was changed")
        for path in inside.rglob("*"):
            if path.suffix == ".html" and not path.is_symlink() and path.is_file() and SECRET in path.read_bytes():
                raise Violation(f"{path.name} shows what lies outside")
    finally:
        for path in [inside, *inside.rglob("*")]:
            if not path.is_symlink() and not os.access(path, os.R_OK | os.W_OK):
                path.chmod(stat.S_IRWXU)
        shutil.rmtree(place)


def command(*arguments):
    """What `phasewatch ...` answers in this process: its status, and the lines of both streams."""
    out, err = io.StringIO(), io.StringIO()
    before, path = sys.argv, sys.path[:]
    sys.argv = ["phasewatch", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("always")
            try:
                main()
                status = 0
            except SystemExit as error:
                status = error.code or 0
    finally:
        sys.argv, sys.path[:] = before, path
    return status, out.getvalue(), err.getvalue()


def check_answer(status, out, err, notes=()):
    """Exit 0, or 2 with exactly one sentence; everything printable."""
    said = [line for line in err.splitlines() if not line.startswith(tuple(notes))] if notes else err.splitlines()
    if status not in (0, 2):
        raise Violation(f"exit {status}: {err[-300:]}")
    if status == 2 and len(said) != 1:
        raise Violation(f"{len(said)} lines: {said[:4]}")
    for line in said:
        if not line.startswith("phasewatch: "):
            raise Violation(f"not a sentence of ours: {line[:300]}")
        is_a_sentence(line)
    for line in (out + err).splitlines():
        if printable(line, 10**9) != line:
            raise Violation(f"not printable: {line[:300]!r}")


def is_a_sentence(error):
    text = str(error)
    if printable(text, most=MOST_CHARACTERS + 12) != text or len(text.splitlines()) != 1 or text[-1] not in ".)":
        raise Violation(f"not a printable sentence: {text!r}")


def hunt(few, attempt):
    """Try numbered inputs, and fail with the first of each kind of failure."""
    first, examples = int(os.environ.get("FUZZ_FIRST", "0")), int(os.environ.get("FUZZ_EXAMPLES", str(few)))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MOST_GROWTH
    failures = {}
    for seed in range(first, first + examples):
        began = time.process_time()
        try:
            attempt(seed)
        except Violation as error:
            failures.setdefault(f"Violation {str(error)[:60]}", (seed, str(error)))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            failures.setdefault(
                f"{type(error).__name__} {where.filename}:{where.lineno}", (seed, traceback.format_exc())
            )
        if (seconds := time.process_time() - began) > MOST_SECONDS:
            failures.setdefault("slow", (seed, f"{seconds:.0f} s"))
        if (peak := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) > most:
            failures.setdefault("memory", (seed, f"{(peak - most + MOST_GROWTH) / 2**20:.0f} MB more"))
            most = peak + MOST_GROWTH
        if len(failures) > 30:
            break
    assert not failures, "\n\n".join(f"input {seed}: {said}" for seed, said in failures.values())
