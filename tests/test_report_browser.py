"""The report in a real browser: it opens from a file without network or console message, on a desk and on a phone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_pipelines_report import RECIPE, make_inputs, write

from longreach.evaluation.blocks import Section
from longreach.evaluation.figures import Style, bars, grid, lines
from longreach.pipelines.report.page import Page

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--virtual-time-budget=5000", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--enable-logging=stderr", "--dump-dom", "--window-size=1400,900",
)  # fmt: skip
WIDTHS = (1280, 390)
NOTHING_OUTSIDE = (
    "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
)
"""Turns every fetch into a console message, whether or not there is a network."""
MEASURE = "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth].join(), '*')</script>"
LISTEN = "<script>onmessage = event => document.body.dataset['w' + event.data.split(',')[0]] = event.data</script>"

pytestmark = pytest.mark.skipif(
    not shutil.which("chromium") and os.environ.get("CI") != "true",
    reason="chromium is not installed (CI has it, and there this never skips)",
)


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """(the DOM as it then is, what stands in the console)."""
    command = ["chromium", *FLAGS, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r":CONSOLE.*", done.stderr)


def in_frames(page: Path, profile: Path) -> tuple[dict[int, int], list[str]]:
    """(width of window -> width of what is in it, what stands in the console): a window is never below 500 pixels."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # it would not let us measure
    copy = text.replace("<head>", f"<head>{NOTHING_OUTSIDE}", 1).replace("</body>", f"{MEASURE}</body>")
    page.with_name("copy.html").write_text(copy, encoding="utf-8")
    frames = "".join(
        f'<iframe src="copy.html" style="width: {w}px; height: 800px; border: 0"></iframe>' for w in WIDTHS
    )
    framing = page.with_name("frames.html")
    framing.write_text(f"<!doctype html><body>{LISTEN}{frames}</body>", encoding="utf-8")
    dom, console = browse(framing, profile)
    return {int(window): int(needed) for window, needed in re.findall(r'data-w\d+="(\d+),(\d+)"', dom)}, console


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report with everything in it, long names and a failed arm too."""
    folder = tmp_path_factory.mktemp("browser")
    recipe, artifacts = make_inputs(folder, RECIPE)
    failed = {"finetune[an-arm-with-quite-a-long-name]": "OutOfMemoryError: " + "no_room_" * 40}
    out, _ = write((recipe.model_copy(update={"failed": failed}), artifacts), folder / "out")
    return out / "report.html"


def test_the_report_opens_from_a_file_and_the_console_stays_empty(page, tmp_path):
    dom, console = browse(page, tmp_path)
    assert "an-arm-with-quite-a-long-name" in dom
    assert console == []


def test_nothing_is_fetched_and_nothing_wider_than_the_window_at_either_width(page, tmp_path):
    widths, console = in_frames(page, tmp_path)
    assert widths == {width: width for width in WIDTHS}
    assert console == []


def test_a_script_error_a_fetch_and_a_wide_page_would_be_seen(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><html><head></head><body><img src='https://example.com/x.png'><p style='width: 700px'>wide</p>"
        "<script>missing()</script></body></html>"
    )
    assert "missing is not defined" in "".join(browse(bad, tmp_path / "a")[1])
    widths, console = in_frames(bad, tmp_path / "b")
    assert widths[390] > 390
    assert "https://example.com/x.png" in "".join(console)


def test_interactive_charts_are_drawn_and_a_name_that_is_a_script_is_not_run(tmp_path):
    rude = "</script><script>document.body.dataset.taken = 1</script>"
    style = Style.of([rude, "b"], dashed=["b"])
    figures = [
        lines(
            "a.png", rude, rude, (rude, "y"), {rude: [(1, 2), (2, 9)], "b": [(1, 3)]}, style, marks={rude: 1}, log=True
        ),
        bars("b.png", rude, rude, {rude: {rude: 2, "b": 3}}, style),
        grid("c.png", rude, rude, ("x", rude), [rude], {rude: [(0.3, rude)]}, 1.0, rude),
    ]
    page = Page(rude, rude, rude, [Section(rude, [rude, figures])])
    page.write(tmp_path, "page", interactive=True)
    dom, console = browse(tmp_path / "page.html", tmp_path / "profile")
    assert console == []
    assert dom.count('class="marks"') == len(figures)
    assert "data-taken" not in dom
