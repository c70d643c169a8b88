"""Pictures of the report and of a notebook's display, as a person sees them: python experiments/screens.py.

Takes the points of the published regression run and of seven stages with doubtful estimates, and shows them in a
browser at 1400 and 390 pixels, at rest, under the pointer and zoomed. Needs playwright and a Chromium, neither of which
anything else needs: pip install playwright, and apt-get install chromium or playwright install chromium.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import phasewatch as pw

ROOT = Path(__file__).parents[1]
WIDTHS = (1400, 390)


def seven_stages(points: int = 240, seed: int = 1) -> pw.Trajectory:
    """Up and down seven times, with doubtful and failed estimates, and names that are long or hostile."""
    random = np.random.default_rng(seed)
    steps = np.unique(np.geomspace(1, 300_000, points).round().astype(int))
    share = np.linspace(0, 1, len(steps))
    levels = np.interp(share, np.linspace(0, 1, 16), [5, 5, 30, 30, 55, 50, 80, 78, 60, 60, 95, 92, 120, 118, 100, 100])
    healths = random.choice(
        np.array([pw.Health.OK, pw.Health.UNMIXED, pw.Health.DRIFTING, pw.Health.DIVERGED], dtype=object),
        size=len(steps),
        p=[0.88, 0.05, 0.04, 0.03],
    )
    made = []
    for i, step in enumerate(steps.tolist()):
        chains = levels[i] + 1.5 * random.normal(size=6)
        trace = levels[i] + 5 * random.normal(size=(4, 60))
        estimate = pw.Estimate(
            value=float("nan") if healths[i].failed else float(chains.mean()),
            error=float(chains.std(ddof=1) / 6**0.5 * 1.3),
            per_chain=tuple(chains.tolist()),
            nbeta=60.0,
            rhat=1.01,
            ess=400.0,
            health=healths[i],
            trace=() if healths[i] is pw.Health.OK else tuple(map(tuple, trace.tolist())),
        )
        metrics = {
            "accuracy": float(1 / (1 + np.exp(-(i - 120) / 15))),
            "<img src=x onerror=alert(1)>": float(random.normal()),
            "prefix_matching_score_of_the_heads_of_layer_2": float(i),
        }
        made.append(pw.Point(step, float(4 - 3.2 * share[i] + 0.01 * random.normal()), estimate, metrics))
    return pw.Trajectory(made)


def pictures(page: Any, name: str, out: Path) -> None:
    """The page at rest, its chart under the pointer, and zoomed."""
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
    width = page.viewport_size["width"]
    page.screenshot(path=out / f"{name}-{width}.png", full_page=True)
    chart = page.locator(".chart svg")
    if chart.count():
        box = chart.bounding_box()
        middle = box["y"] + 100
        page.mouse.move(box["x"] + 0.55 * box["width"], middle)
        page.screenshot(path=out / f"{name}-{width}-pointer.png")
        page.mouse.move(box["x"] + 0.4 * box["width"], middle)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.7 * box["width"], middle, steps=4)
        page.mouse.up()
        page.locator("figure#figure").screenshot(path=out / f"{name}-{width}-zoomed.png")
    overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    print(f"{name} at {width}: {overflow} pixels too wide, errors and requests: {wrong or 'none'}")


def main() -> None:
    """Make the pictures."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("screens"), help="Folder of the pictures.")
    out = arguments.parse_args().out
    try:
        from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise SystemExit("This needs playwright: pip install playwright") from None
    out.mkdir(parents=True, exist_ok=True)
    published = pw.Trajectory.read(ROOT / "tests/data/published/lr_seed1.csv")
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        pages = {}
        for name, trajectory in {"seven": seven_stages(), "published": published}.items():
            run = Path(folder, name)
            run.mkdir()
            trajectory.write(run / "points.jsonl")
            pages[name] = pw.write_report(run)
        pages["notebook"] = Path(folder, "notebook.html")
        shown = [published, pw.find_transitions(published)[0], published[80].llc]
        cells = "".join(f"<div class=cell>{item._repr_html_()}</div>" for item in shown)
        pages["notebook"].write_text(f"<!DOCTYPE html><meta charset=utf-8><body style='font-family:sans-serif'>{cells}")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, page in pages.items():
            for width in WIDTHS:
                for scheme in ("light", "dark") if name == "seven" else ("light",):
                    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                    view.goto(page.absolute().as_uri())
                    pictures(view, name if scheme == "light" else f"{name}-dark", out)
        browser.close()
    print(f"The pictures are in {out}/.")


if __name__ == "__main__":
    main()
