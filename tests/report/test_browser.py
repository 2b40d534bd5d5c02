"""The reports in a headless Chromium, at desktop and phone width, without a network.

`make browser` installs one; without it these tests are skipped.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_support import write_run
from sweep_support import STATIC, TWO_PHASE, write_sweep

from megaphase.report.report import write_report
from megaphase.sweep.pareto.report import SweepReport

NAMES = ("chromium", "chromium-headless-shell", "chromium-shell", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no headless Chromium; as root on Debian: make browser"
)
WIDTHS = (1200, 390)
RUN_PLOTS = {"Loss per task", "Learning rate", "Training tokens and epochs per task"}
SWEEP_PLOTS = {
    "Trade-off fronts",
    "Low-resource training and validation loss",
    "Validation loss per task, the best setting of each arm",
    "Data efficiency",
    "Training loss over the tokens seen",
    "Convergence before the last phase",
}
# A window cannot be narrower than 500 pixels, but a frame in it can. The frame's page is read
# through its `srcdoc`, since a page from a file may not read another one.
FRAME = """<!doctype html><title>frame</title><iframe width="{width}" height="900"></iframe>
<pre id="found"></pre><script>
const frame = document.querySelector("iframe");
const measure = tries => {{
  const page = frame.contentDocument, root = page.documentElement;
  const shown = [...page.querySelectorAll("figure svg")].filter(e => e.getClientRects().length);
  const found = {{
    width: frame.contentWindow.innerWidth,
    overflow: root.scrollWidth - root.clientWidth,
    plots: shown.map(e => [e.getAttribute("aria-label"), e.getBoundingClientRect().width]),
    tables: [...page.querySelectorAll(".scroll")].filter(e => e.checkVisibility()).map(e => ({{
      overflows: e.scrollWidth > e.clientWidth,
      hint: e.previousElementSibling.clientHeight > 0,
      fixed: [...e.querySelectorAll("tbody th")].every(
        th => frame.contentWindow.getComputedStyle(th).position === "sticky"),
    }})),
    texts: shown.map(e => e.querySelectorAll("text").length),
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
  }};
  document.getElementById("found").textContent = JSON.stringify(found);
  // The hints of tables follow the layout by a frame or, on a busy machine, by several.
  const late = found.tables.some(table => table.hint !== table.overflows);
  if (late && tries > 0) setTimeout(measure, 200, tries - 1);
}};
frame.onload = () => setTimeout(measure, 200, 20);
frame.srcdoc = {source};
</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Make the page of a run and that of a sweep."""
    folder = tmp_path_factory.mktemp("pages")
    sweep = write_sweep(folder / "sweep", {"static": STATIC, "two-phase": TWO_PHASE})
    return {
        "run": write_report([write_run(folder / "run")], folder / "run-report"),
        "sweep": SweepReport.of(sweep).write(folder / "sweep-report"),
    }


def chromium(folder: Path, *arguments: str) -> tuple[str, str]:
    """Return its output: the page's document, and the messages of its console."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}/profile", *arguments],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done.stdout, "\n".join(console)


@pytest.mark.parametrize(("name", "plots"), [("run", RUN_PLOTS), ("sweep", SWEEP_PLOTS)])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_shows_every_plot_within_its_width(pages, tmp_path, name, plots, width):
    source = json.dumps(pages[name].read_text()).replace("</", "<\\/")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, source=source))
    document, console = chromium(
        tmp_path, "--dump-dom", "--virtual-time-budget=5000", frame.as_uri()
    )
    assert console == ""
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', document)[1])
    assert found["width"] == width
    assert found["overflow"] == 0
    assert {title for title, _ in found["plots"]} == plots
    assert len(found["plots"]) == len(plots)  # either the wide or the narrow one is shown
    assert min(shown for _, shown in found["plots"]) > 0.8 * min(width, 992) - 60
    assert min(found["texts"]) > 5
    assert found["fetched"] == []
    # A table fits, or says that it can be scrolled and keeps its first column.
    assert all(table["hint"] == table["overflows"] for table in found["tables"])
    assert all(table["fixed"] for table in found["tables"])
    assert width == 390 or not any(table["overflows"] for table in found["tables"])


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_page_opens_from_its_file(pages, tmp_path, name):
    picture = tmp_path / "page.png"
    _, console = chromium(
        tmp_path, f"--screenshot={picture}", "--window-size=1280,900", pages[name].as_uri()
    )
    assert console == ""
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert picture.stat().st_size > 20_000
