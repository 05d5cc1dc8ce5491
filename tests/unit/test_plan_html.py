"""The plan's HTML report: nothing from outside, hostile names, and what a browser draws of it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hetcomp.cli.plan_figures import GPU_RUNTIME, Figures, Step, figures_of
from hetcomp.cli.plan_html import embedded_json, plan_html
from hetcomp.ir.events import Event
from hetcomp.ir.plan import Plan
from hetcomp.passes.phases import Phase
from tests.reference.png import read_png
from tests.unit.test_plan_figures import shared_context, shared_plan

HOSTILE = """</script><img src=x onerror="document.body.dataset.error='names run'">&amp;'"""
WIDTH, HEIGHT = 900, 2100
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return shared_plan()


@pytest.fixture(scope="module")
def figures(plan: Plan) -> Figures:
    return figures_of(plan, shared_context().profile)


@pytest.fixture(scope="module")
def browser() -> str:
    named = os.environ.get("HETCOMP_CHROMIUM")
    found = next((path for name in ([named] if named else BROWSERS) if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(
            "No Chromium to open the HTML report in: run scripts/bootstrap.sh VENV --test-packages (make test does), "
            "or name one in HETCOMP_CHROMIUM."
        )
    return found


def _browse(browser: str, page: Path, folder: Path, *what: str) -> str:
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'browser'}", f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=5000",
        *what, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _body(browser: str, text: str, folder: Path, script: str = "") -> tuple[dict[str, str], str]:
    """The body's data attributes after the page's own script, and after ``script``, ran; and the whole document."""
    page = folder / "page.html"
    page.write_text(text.replace("</body>", f"<script>{script}</script></body>") if script else text, encoding="utf-8")
    dom = _browse(browser, page, folder, "--dump-dom")
    found = re.search(r"<body([^>]*)>", dom)
    assert found is not None
    return {k: html.unescape(v) for k, v in re.findall(r'data-([\w-]+)="([^"]*)"', found[1])}, dom


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]


def test_the_page_needs_nothing_from_outside(plan, figures):
    text = plan_html(plan, figures)
    links = _Links()
    links.feed(text)
    assert links.found == []
    assert "@import" not in text and "url(" not in text and "fetch(" not in text
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_json_in_a_script_element_cannot_end_it():
    text = embedded_json({"name": HOSTILE})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"name": HOSTILE}


def test_names_do_not_run(plan, figures, browser, tmp_path):
    hostile = replace(plan, model=replace(plan.model, name=HOSTILE, architecture=HOSTILE), notes=(HOSTILE,))
    steps = tuple(replace(s, events=(*s.events, Event(HOSTILE, HOSTILE, None, HOSTILE, 0, 1))) for s in figures.steps)
    named = replace(figures, steps=steps, memory=tuple(replace(m, name=HOSTILE) for m in figures.memory))
    attributes, dom = _body(browser, plan_html(hostile, named), tmp_path)
    assert attributes["ready"] == "true" and "error" not in attributes
    assert "<img" not in dom


def test_every_event_is_drawn_and_nothing_fails(plan, figures, browser, tmp_path):
    attributes, dom = _body(browser, plan_html(plan, figures), tmp_path)
    assert attributes == {"events": str(sum(len(s.events) for s in figures.steps)), "ready": "true"}
    assert dom.count('class="bar"') == 2 and dom.count('class="roof"') == 2
    assert len(re.findall("<circle", dom)) == len(figures.points)


def test_the_timeline_zooms_and_moves(plan, figures, browser, tmp_path):
    script = """
      const chart = charts[0], box = chart.canvas.getBoundingClientRect(), whole = chart.step.us;
      const at = (kind, type, x, more) => chart.canvas.dispatchEvent(new kind(type,
        Object.assign({clientX: box.left + x, clientY: box.top + 40, cancelable: true, bubbles: true}, more)));
      const under = chart.us(400);
      at(WheelEvent, "wheel", 400, {deltaY: -600});
      document.body.dataset.span = (chart.view[1] - chart.view[0]) / whole;
      document.body.dataset.anchored = Math.abs(chart.us(400) - under) < 1e-6 * whole;
      document.body.dataset.fewer = chart.draw() < drawnAtFirst;
      chart.canvas.setPointerCapture = () => {};
      const before = chart.view[0];
      at(PointerEvent, "pointerdown", 400, {});
      at(PointerEvent, "pointermove", 380, {});
      at(PointerEvent, "pointerup", 380, {});
      document.body.dataset.moved = chart.view[0] > before;
      chart.canvas.dispatchEvent(new MouseEvent("dblclick"));
      document.body.dataset.all = chart.view[0] === 0 && chart.view[1] === whole;
      const middle = chart.x(chart.step.lanes[0].events[3][2] + chart.step.lanes[0].events[3][3] / 2);
      at(PointerEvent, "pointermove", middle, {});
      document.body.dataset.tip = document.getElementById("tip").textContent;
    """
    attributes, _ = _body(browser, plan_html(plan, figures), tmp_path, script)
    assert "error" not in attributes
    assert 0.2 < float(attributes["span"]) < 0.6
    assert [attributes[k] for k in ("anchored", "fewer", "moved", "all")] == ["true"] * 4
    lane = min((e.lane for e in figures.steps[0].events), key=lambda name: (name.startswith("cpu"), name))
    assert lane in attributes["tip"]


def test_four_thousand_events_are_drawn(plan, figures, browser, tmp_path):
    lanes = ("gpu:0", "cpu:0", "gpu:0 copy in", "gpu:0 copy out")
    events = tuple(
        Event(f"layer {i} moe.experts", "moe.experts", i, lanes[i % 4], 10.0 * (i // 4), 8.0) for i in range(4000)
    )
    step = Step(Phase("decode", 1, 1, 640), events)
    attributes, _ = _body(browser, plan_html(plan, replace(figures, steps=(step,))), tmp_path)
    assert attributes == {"events": "4000", "ready": "true"}


def test_a_plan_without_gpu_is_drawn(browser, tmp_path):
    from hetcomp.passes.pipeline import run_pipeline
    from tests.reference.plan_builder import context, tiny_plan

    ctx = context()
    cpu_only = run_pipeline(tiny_plan(), ctx)
    attributes, dom = _body(browser, plan_html(cpu_only, figures_of(cpu_only, ctx.profile)), tmp_path)
    assert attributes["ready"] == "true" and dom.count('class="bar"') == 1


@pytest.mark.parametrize("dark", [False, True])
def test_plot_bars_and_timeline_are_on_the_screenshot(plan, figures, browser, tmp_path, dark):
    where = """
      const box = s => { const b = document.querySelector(s).getBoundingClientRect();
        return [b.left, b.top, b.right, b.bottom].map(Math.round).join(" "); };
      document.body.dataset.roof = box("svg.roof"); document.body.dataset.bar = box("svg.bar");
      document.body.dataset.timeline = box("canvas.timeline");
    """
    # The tiny model's weights would be less than a pixel of the machine's memory.
    memory = tuple(
        replace(m, parts=tuple(p for p in m.parts if p[0] != GPU_RUNTIME), limit=None) for m in figures.memory
    )
    text = plan_html(plan, replace(figures, memory=memory))
    regions, _ = _body(browser, text, tmp_path, where)
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(text, encoding="utf-8")
    _browse(
        browser, page, tmp_path, f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={int(not dark)}"
    )
    pixels = read_png(picture)
    for name in ("roof", "bar", "timeline"):
        left, top, right, bottom = (int(x) for x in regions[name].split())
        seen = pixels[top:bottom, left:right].reshape(-1, 3)
        assert len(seen) > 1000, f"{name} is not on the page: {regions[name]}"
        coloured = {tuple(c) for c in (seen[np.ptp(seen.astype(int), axis=1) > 60] // 32).tolist()}
        assert len(coloured) >= 2, f"{name} shows the colours {coloured} only"
    assert (pixels[2, 2].mean() < 80) == dark
