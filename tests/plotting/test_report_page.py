"""The report in a real browser: it shows its pictures, asks nobody for anything, and runs nothing from the log."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread

from trl_custom_losses.plotting import RunReport, plot_run
from trl_custom_losses.plotting.page import number, unit_of

from .runs import composed_log, write_state

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>\"'>{{ 7 * 7 }}"

#: Added to a copy of the report: what the browser made of it, as text in the page.
_HARNESS = """
<script>
const problems = [];
addEventListener("error", event => problems.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const images = [...document.images].map(image => [image.naturalWidth, image.naturalHeight]);
  const requests = performance.getEntriesByType("resource").map(entry => entry.name);
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify({
    images, problems, ran: window.ran || 0, scripts: document.scripts.length,
    requests: requests.filter(name => !name.startsWith("data:")),
    heading: document.querySelector("h1").textContent,
    cells: [...document.querySelectorAll("tbody td:first-child")].map(cell => cell.textContent),
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  });
  document.body.append(result);
});
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = os.environ.get("CHROME") or next(filter(None, map(shutil.which, _BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser: none of {', '.join(_BROWSERS)} is installed, and CHROME names none")
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    entries = composed_log()
    for entry in entries:
        entry[HOSTILE] = float(entry["step"])
        entry.update({f"{HOSTILE}_loss": 1.0, f"{HOSTILE}_weight": 0.0} if "pref_loss" in entry else {})
    folder = tmp_path_factory.mktemp("run") / "<b>bold<&b>"
    return plot_run(write_state(folder, entries, best_model_checkpoint=HOSTILE, best_metric=0.5))


def _open(browser: str, page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--hide-scrollbars", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def _without_policy(content: str) -> str:
    """The page without the line that forbids scripts, so that escaping is tested alone."""
    cut, number_of_lines = re.subn(r"<meta http-equiv[^\n]*\n", "", content)
    assert number_of_lines == 1
    return cut


def test_a_browser_shows_all_pictures_and_runs_nothing(browser: str, report: RunReport, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(_without_policy(report.html.read_text()).replace("<head>", f"<head>{_HARNESS}"))
    dom = _open(browser, page, tmp_path / "profile", "--dump-dom", "--window-size=500,900").stdout
    found = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert len(found["images"]) == len(report.pictures) >= 5
    assert all(width > 1000 and height > 300 for width, height in found["images"])
    assert (found["problems"], found["requests"], found["ran"], found["scripts"]) == ([], [], 0, 1)
    assert found["heading"] == "Training run <b>bold<&b>"
    assert HOSTILE in found["cells"]
    assert not found["wide"]


def test_the_harness_sees_what_it_looks_for(browser: str, report: RunReport, tmp_path: Path) -> None:
    """A page that does run a script and lacks a picture is found out, so that the test above says something."""
    broken = _without_policy(report.html.read_text()).replace("<head>", f"<head>{_HARNESS}")
    broken = broken.replace("&lt;script&gt;window.ran = 1&lt;/script&gt;", "<script>window.ran = 1</script>")
    broken = broken.replace("</main>", '<img src="absent.png"></main>')
    page = tmp_path / "page.html"
    page.write_text(broken)
    dom = _open(browser, page, tmp_path / "profile", "--dump-dom").stdout
    found = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found["ran"] == 1 and found["problems"] and found["images"][-1] == [0, 0]


@pytest.mark.parametrize("scheme", [1, 0], ids=["light", "dark"])
def test_the_page_as_written_opens_without_complaint(
    browser: str, report: RunReport, tmp_path: Path, scheme: int
) -> None:
    shot = tmp_path / "shot.png"
    options = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1000,3000"]
    result = _open(browser, report.html, tmp_path / "profile", *options, f"--screenshot={shot}")
    assert "CONSOLE" not in result.stderr, result.stderr
    image = imread(shot)[..., :3]
    assert image.shape[:2] == (3000, 1000) and image.std() > 0.05
    background = image[:, 2].mean()
    assert (background > 0.9) if scheme else (background < 0.2)


# What is in the file


def test_the_file_refers_to_nothing_outside(report: RunReport) -> None:
    content = re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,", report.html.read_text())
    targets = re.findall(r'(?:src|href|action)\s*=\s*"([^"]*)"', content)
    assert len(targets) > 5 and all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert "url(" not in content and "@import" not in content and "<script" not in content
    assert "default-src 'none'" in content


def test_the_head_has_the_facts_and_the_table_the_values(tmp_path: Path) -> None:
    content = plot_run(write_state(tmp_path / "mine", composed_log(), epoch=1.5, train_batch_size=8)).html.read_text()
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", content, re.DOTALL))
    assert facts == {
        "Loss": "bonus + pref",
        "Optimizer steps": "6",
        "Epochs": "1.5",
        "Batch size per device": "8",
        "Training time": "1 min 15 s",
        "Mean loss over the run": "0.5",
        "Log": "trainer_state.json",
    }
    rows = {row[0]: row[1:] for row in (re.findall(r"<td>(.*?)</td>", r) for r in content.split("<tr>")) if row}
    assert rows["loss"] == ["", "1.95", "0.03333", "0.03333", "1.95", "6", "9"]
    assert rows["rewards/margins"] == ["beta x nats", "0.1", "0.6", "0.1", "0.6", "6", "-"]


def test_a_run_that_logged_nothing_says_so(tmp_path: Path) -> None:
    report = plot_run(write_state(tmp_path, []))
    assert report.pictures == [] and "logged no metric" in report.html.read_text()


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    content = plot_run(
        write_state(tmp_path, [{"step": 1, "<i>": float("inf")}, {"step": 2, "<i>": 1.0}])
    ).html.read_text()
    assert "&lt;i&gt; (1 of the values logged)." in content and "<i>" not in content


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("rewards/margins/std", "beta x nats"),
        ("completions/mean_length", "tokens"),
        ("logps/chosen", "nats"),
        ("kl", "nats per token"),
        ("adaptive_kl", "nats per completion"),
        ("pref/adaptive_kl", "nats per completion"),
        ("grad_norm/pref", "loss per nat"),
        ("in/grad_norm_weighted/pref", "loss per nat"),
        ("grad_norm", ""),
        ("my_entropy", ""),
        ("pairs/clipped_sequences", "share"),
        ("mine", ""),
    ],
)
def test_units(name: str, unit: str) -> None:
    assert unit_of(name) == unit


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0.123456, 1e-7, 12345678.0, float("nan"))] == [
        "0.1235",
        "1e-07",
        "1.235e+07",
        "-",
    ]
