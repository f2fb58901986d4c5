"""The page of results: what it shows, that no name in it does anything, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from pyxlbert.bench import page, pictures, report, svg
from pyxlbert.bench.report import Row, Work
from pyxlbert.bench.timer import Timing

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'&"
DEVICE = {"processor": "an abacus", "threads": 2, "copy_bandwidth": 20.0, "gemm_float32": 200, "gemm_bfloat16": 400}


def timing(median: float) -> Timing:
    return Timing(median, 0.9 * median, 1.1 * median, 5, tuple(median * (0.9 + 0.05 * i) for i in range(5)))


def rows() -> list[Row]:
    found = []
    for dtype in ("float32", "bfloat16"):
        for length in (64, 128, 256):
            times = {"pyxlbert": timing(1e-6 * length), "SDPA": timing(2e-6 * length)}
            memory = {"pyxlbert": 1 << 20, "SDPA": length << 20}
            work = Work(1e5 * length, 1000 * length, length)
            found.append(Row("attention", f"1x{length}x2x8", dtype, times, 5e-7 * length, memory=memory, work=work))
    found.append(Row("layer_norm", "4x8", "float32", {"pyxlbert": timing(2e-6), "F.layer_norm": timing(1e-6)}))
    found[-1].failed["Liger"] = "it runs on CUDA devices alone"
    return found


def document(found: list[Row], device: dict = DEVICE) -> dict:
    return report.document_of(found, "pyxlbert bench", device)


def test_every_chart_and_row_is_drawn() -> None:
    text = page.page(document(rows()))
    for title in ("Overview", "Roofline", "Time over length", "Peak memory over length", "Ratio to every peer"):
        assert f"<h2>{title}</h2>" in text
    assert "Nothing to draw" not in text and text.count("<svg") == 2 + 2 + 2 + 2
    assert text.count("<tbody data-row=") == 7 and "Liger has no time: it runs on CUDA devices alone" in text
    assert "200 GFLOP/s" in text and "T, places" in text and "times as long as ours" in text
    # Ours is behind there: it says so.
    assert "<span class='behind'>0.50</span>" in text
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|https?:(?!//www\.w3\.org/2000/svg)", text)


def test_a_kind_without_anything_to_draw_says_why() -> None:
    text = page.page(document([Row("x", "y", "float32", {}, failed={"pyxlbert": "RuntimeError: no"})]))
    assert text.count("Nothing to draw: ") == 5 and "no time" in text
    assert pictures.roofline(rows(), {}) is None


def test_hostile_names_are_text() -> None:
    found = rows()
    times = {HOSTILE: timing(1e-3), "pyxlbert": timing(1e-3)}
    for length in (1, 2):
        work = Work(1.0, 1, length)
        found.append(Row(HOSTILE, HOSTILE, HOSTILE, times, 1e-3, HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: 1}, work))
    text = page.page(report.document_of(found, HOSTILE, DEVICE | {"processor": HOSTILE}))
    assert text.count("<script") == text.count("</script>") == 2 and "<img" not in text
    assert "onerror=" not in re.sub(r"onerror=(?:&quot;|\\u0026|\\\")", "", text)
    data = json.loads(re.search(r"id='data'>(.*?)</script>", text, re.DOTALL)[1])
    assert set(data[-1]["samples"]) == set(times)


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert page.page(document(rows())) == page.page(document(rows()))


def test_axes_have_round_numbers() -> None:
    assert [text for _, text in svg.Axis("", 0.5, 2000).lines()] == ["1", "10", "100", "1,000"]
    assert [text for _, text in svg.Axis("", 0, 10, False).lines()] == ["0", "2", "4", "6", "8", "10"]
    assert svg.Axis("", 1, 100).place(10) == 0.5 and svg.Axis("", 0, 4, False).place(1) == 0.25


# What a reader does, and what the page then shows, as text in an element of its own.
_READER = """
<pre id="seen"></pre><script>
(() => {
const seen = {title: document.title, violations: 0};
document.addEventListener("securitypolicyviolation", () => { seen.violations++; });
const filter = document.getElementById("filter");
function type(text) { filter.value = text; filter.dispatchEvent(new Event("input")); }
const all = () => [...document.querySelectorAll("svg.chart [data-row]")];
const marks = () => all().filter(mark => mark.style.display !== "none").length;
seen.count = document.getElementById("count").textContent; seen.marks = marks();
type("bfloat16 ATTENTION");
seen.filtered = document.getElementById("count").textContent; seen.fewer = marks();
type(""); seen.again = marks();
const body = document.querySelector("tbody[data-row]");
body.querySelector("button").click();
seen.opened = !body.querySelector("tr.more").hidden;
seen.samples = body.querySelectorAll("svg.samples circle").length;
seen.drawn = [...document.querySelectorAll("svg.chart")].every(one => one.getBoundingClientRect().width > 200);
fetch("http://127.0.0.1:9/").catch(() => { seen.refused = true; }).finally(() => setTimeout(() => {
  seen.requests = performance.getEntriesByType("resource").filter(one => one.responseStatus > 0).length;
  document.getElementById("seen").textContent = JSON.stringify(seen);
}, 50));
})();
</script></body>"""


def browser() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    if not found:
        pytest.skip("no chromium is installed: the page is looked at without one above")
    return found


@pytest.mark.parametrize("hostile", [False, True], ids=["usual", "hostile"])
def test_in_a_browser(hostile: bool, tmp_path: Path) -> None:
    found = rows()
    if hostile:
        found += [
            Row(HOSTILE, HOSTILE, HOSTILE, {"pyxlbert": timing(1.0), HOSTILE: timing(1.0)}, failed={HOSTILE: HOSTILE})
        ]
    text = page.page(document(found, DEVICE | ({"processor": HOSTILE} if hostile else {})))
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", _READER), encoding="utf-8")
    done = subprocess.run(
        [
            *(browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    shown = re.search(r'<pre id="seen">(\{.*?\})</pre>', done.stdout)
    assert shown is not None, done.stdout[-500:] + done.stderr[-500:]
    seen = json.loads(unescape(shown[1]))
    total = 7 + hostile
    assert seen["title"] == "pyxlbert bench" and seen["drawn"] and seen["opened"] and seen["samples"] == 10
    assert seen["count"] == f"{total} of {total} races" and seen["filtered"] == f"3 of {total} races"
    assert 0 < seen["fewer"] < seen["marks"] == seen["again"]
    # Even a request that somebody makes is refused by the page's policy.
    assert seen["refused"] and seen["violations"] == 1 and seen["requests"] == 0
