"""The manual is right: its code runs, and what it names is there."""

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import phasewatch as pw
from phasewatch import cli

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ALONE = {"quick_start.md", "science.md"}
"""Pages whose code needs nothing from before; the others go on from the quick start."""


def code_of(page):
    """The Python blocks of a page as (what stands after the language, code)."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [(info.removeprefix("python").strip(), code) for info, code in found if info.split()[:1] == ["python"]]


def run(page, names):
    for info, code in code_of(page):
        needed = re.search(r'requires="(\w+)"', info)
        if needed and importlib.util.find_spec(needed[1]) is None:
            continue
        exec(compile(code, f"{page.name}", "exec"), names)
        if file := re.search(r'title="(.*?)"', info):
            Path(file[1]).write_text(code, encoding="utf-8")


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A folder in which the quick start was followed, and the names that it defined."""
    folder, names = tmp_path_factory.mktemp("manual"), {"__name__": "quick_start"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(ROOT / "docs/quick_start.md", names)
    return folder, names


def test_the_quick_start_finds_what_it_says(started):
    folder, names = started
    (transition,) = pw.find_transitions(pw.Trajectory.read(folder / "runs/first/points.jsonl"))
    assert transition.kind is pw.Kind.A
    assert names["monitor"].run == Path("runs/first")
    assert (folder / "runs/first/report.html").exists()


@pytest.mark.filterwarnings("ignore:::lightning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("page", [p for p in DOCS if p.name not in ALONE and code_of(p)], ids=lambda p: p.name)
def test_the_code_of_a_page_runs(page, started, monkeypatch, capsys):
    folder, names = started
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(pw.calibrate.__kwdefaults__, "budget", 5000)  # what takes longest, and isn't what is told here
    model = names["make_model"]()
    model.load_state_dict(names["model"].state_dict())
    run(page, {**names, "model": model})


def test_the_code_of_the_science_page_gives_what_it_says(capsys):
    torch.manual_seed(0)
    run(ROOT / "docs/science.md", {})
    assert float(capsys.readouterr().out) == pytest.approx(10, rel=0.1)


def commands():
    for page, text in TEXTS.items():
        fenced = [line for info, code in FENCE.findall(text) if not info for line in code.splitlines()]
        inline = re.findall(r"`(phasewatch .*?)`", FENCE.sub("", text))
        for line in [*fenced, *inline]:
            if line.startswith("phasewatch "):
                yield page, " ".join(line.split())


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_every_command_is_there_with_its_options(page, line):
    _, name, *arguments = shlex.split(line, comments=True)
    known = get_command(cli.app).commands
    assert name in known, f"{page}: {line}"
    options = {option for parameter in known[name].params for option in parameter.opts}
    assert {a for a in arguments if a.startswith("--")} <= options, f"{page}: {line}"


def test_enough_commands_are_found():
    assert {line.split()[1] for _, line in commands()} >= {"replay", "transitions", "report", "calibrate"}


@pytest.mark.parametrize("page", TEXTS)
def test_every_path_is_there(page):
    text = re.sub(r'^```\w+ title=".*?"$', "", TEXTS[page], flags=re.MULTILINE)
    paths = re.findall(r"(?<![\w/.-])(?:experiments|tests|monitor|callbacks|toy_tasks|docs|src)/[\w./-]+", text)
    paths = {path.rstrip("./") for path in paths} - {"callbacks/executors"}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_public_name_is_there_with_its_arguments(page):
    text = TEXTS[page].replace("`pw.NAME`", "").replace("`pw.Name`", "")
    assert [name for name in re.findall(r"\bpw\.(\w+)", text) if name not in pw.__all__] == []
    for name, arguments in re.findall(r"`(?:pw\.)?(\w+)\(([^`()]*)\)`", text):
        if name in pw.__all__:
            known = inspect.signature(getattr(pw, name)).parameters
            assert set(re.findall(r"(\w+)=", arguments)) <= set(known), f"{name}({arguments})"


def slugs(text):
    """The anchors of a page's headings, those that it includes too."""
    for name, section in re.findall(r'^--8<-- "(.*?):(\w+)"$', text, re.MULTILINE):
        text += re.findall(rf"\[start:{section}\] -->(.*?)<!-- ", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)[
            0
        ]
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_every_internal_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXTS[page])):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in slugs(path.read_text(encoding="utf-8")), target


def test_the_api_page_has_every_public_name_once():
    assert sorted(re.findall(r"^::: phasewatch\.(\w+)$", TEXTS["docs/api.md"], re.MULTILINE)) == sorted(pw.__all__)


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [page.name for page in DOCS]
