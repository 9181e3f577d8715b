"""The page in a real Chromium: what it shows, how it is driven, and that nothing leaves it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
from browser import browser, chromium

import metricfold
from metricfold import JSONLSink, MetricsLogger
from metricfold.look.report import report
from metricfold.look.view import view

PAGE = Path(metricfold.__file__).parent / "look" / "page"
pytestmark = pytest.mark.skipif(chromium() is None, reason="no chromium on this machine")

MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"
EVIL = (
    "x</script><script>window.PWNED=1</script>",
    "<img src=x onerror=window.PWNED=1>",
    "a\"b'c`d",
    "🦊 emoji",
    "عربي",
    "__proto__",
    "${window.PWNED=1}",
    "javascript:window.PWNED=1",
)


@pytest.fixture(scope="module")
def chrome():
    with browser() as made:
        yield made


def rows(count, *, names=("web", "code"), shift=0.0, every=10):
    for i in range(1, count + 1):
        row = {
            f"train_{n}/loss": 1 + j + shift + 5 / i + 0.1 * (-1) ** i for j, n in enumerate(names)
        }
        row["train/loss"] = sum(row.values()) / len(row)
        row["train/lr"] = 1 - i / count
        if i == 50:
            row["train_code/loss"] = math.nan
        if i % 3:
            row["train/delta"] = (i % 7) - 3.0
        yield i * every, row


def write(path, wanted, *, append=False, **more):
    """Write lines as the sink does."""
    with path.open("a" if append else "w") as file:
        for step, metrics in wanted:
            line = {
                "step": step,
                "wall_time": 1e9 + step,
                "prefix": "train",
                "metrics": {k: "NaN" if math.isnan(v) else v for k, v in metrics.items()},
                "histograms": {},
            }
            file.write(json.dumps(line | more) + "\n")
            more = {}
    return path


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = {"lr": 3e-4, "model": {"layers": 24}}
    a = write(folder / "a.jsonl", rows(300), run={"config": config, "better": {"loss": "lower"}})
    b = write(folder / "b.jsonl", rows(300, shift=-0.25), run={"config": config | {"lr": 6e-4}})
    alert = {
        "message": "loss of code is nan",
        "severity": "severe",
        "name": "loss",
        "dataset": "code",
    }
    write(a, [(3010, {"train/loss": 1.5})], append=True, alerts=[alert])
    return report([a, b], folder / "report.html").as_uri()


@pytest.fixture
def page(chrome, two_runs):
    with chrome.page(two_runs) as made:
        yield made
        assert made.errors() == []
        assert made.requests() == []


def middle(page, card=0, share=0.5):
    page.wait(f"Boolean(metricfold.cards[{card}]?.chart)")  # drawn when it comes to the screen
    x, y, width, height = page.run(
        f"(r => [r.x, r.y, r.width, r.height])(metricfold.cards[{card}].chart.over.getBoundingClientRect())"
    )
    return x + share * width, y + height / 2


RANGES = "[...new Set(metricfold.cards.filter(c => c.chart).map(c => c.chart.scales.x.min + ' ' + c.chart.scales.x.max))]"
TABLE = "[...metricfold.cards[0].table.rows].map(r => [...r.cells].map(c => c.textContent))"


def test_what_is_carried_is_what_its_page_says():
    told = (PAGE / "README.md").read_text()
    for name in ("uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"):
        assert hashlib.sha256((PAGE / name).read_bytes()).hexdigest() in told, name
    version = re.search(r"uplot-([\d.]+)\.tgz", told).group(1)
    assert f"leeoniya/uPlot (v{version})" in (PAGE / "uPlot.iife.min.js").read_text()[:200]
    assert "MIT License" in (PAGE / "uPlot.LICENSE").read_text()


def test_what_is_carried_stays_under_100_kB_in_the_wheel():
    import zlib

    packed = sum(len(zlib.compress(path.read_bytes())) for path in PAGE.iterdir())
    assert packed < 100_000


def test_the_first_tiles_say_how_it_stands(page):
    tiles = page.run("[...document.querySelectorAll('.tile')].map(t => t.innerText)")
    texts = "\n".join(tiles)
    assert "A train loss, last 50 logs" in texts
    assert f"{MINUS}0.25" in tiles[1]
    assert "B is better" in tiles[1]
    assert "lr 0.0003 → 0.0006" in tiles[1]
    assert "best train loss" in texts
    assert "1 alert, 1 severe" in texts
    assert "step 3,010: loss of code is nan" in texts
    assert page.run("metricfold.cards.map(c => c.alerts?.length ?? 0).filter(n => n)") == [1]
    page.run("document.querySelector('#notes button').click()")
    low, high = page.run("metricfold.state.range")
    assert low > 2500
    assert high == 3010


def test_the_loss_of_every_dataset_is_first_and_large_with_a_table(page):
    assert page.run("metricfold.cards[0].root.className") == "card large"
    head, *body = page.run(TABLE)
    assert head == ["last", "A", "B", f"B {MINUS} A", "best A", "best B"]
    assert [row[0] for row in body] == ["all", "web", "code"]
    assert body[1][3] == f"{MINUS}0.25"
    order = page.run("metricfold.cards.map(c => c.panel.name)")
    assert order[0] == "loss"


def test_dragging_over_one_chart_zooms_all_and_a_double_click_goes_back(page):
    page.run("metricfold.drawAll()")
    assert page.run(RANGES) == ["10 3010"]
    page.drag(middle(page, share=0.25), middle(page, share=0.5))
    page.settle()
    (zoomed,) = page.run(RANGES)
    low, high = map(float, zoomed.split())
    assert low == pytest.approx(760, abs=15)
    assert high == pytest.approx(1510, abs=15)
    page.double_click(*middle(page))
    assert page.run(RANGES) == ["10 3010"]


def test_every_control_has_a_key_and_the_help_lists_it(page):
    state = "metricfold.state."
    for key, told, expected in (
        ("l", "log", True),
        ("o", "outliers", True),
        ("c", "others", False),
        ("d", "dark", True),
        ("0", "smooth", 0),
        ("]", "smooth", 0.05),
        ("[", "smooth", 0),
    ):
        page.key(key)
        assert page.run(state + told) == expected, key
    page.key("+")
    page.settle()
    (zoomed,) = page.run(RANGES)
    assert [float(end) for end in zoomed.split()] == [760, 2260]
    page.key("ArrowRight")
    assert page.run("metricfold.state.range") == [1060, 2560]
    page.key("r")
    assert page.run("metricfold.state.range") is None
    page.key("1")
    assert page.run("metricfold.cards[0].table.rows[1].className") == "all off"
    page.key("a")
    assert page.run("metricfold.state.hidden.size") == 0
    page.key("j")
    page.key("e")
    assert page.run("document.querySelectorAll('.card.full').length") == 1
    page.key("Escape")
    assert page.run("document.querySelectorAll('.card.full').length") == 0
    page.key("/")
    for letter in "delta":
        page.key(letter)
    assert page.run("metricfold.cards.filter(c => !c.root.hidden).length") == 1
    page.key("Escape")
    page.key("?")
    assert page.run("document.getElementById('help').open")
    listed = page.run("document.getElementById('help-keys').innerText")
    shortcuts = page.run(
        "[...document.querySelectorAll('[aria-keyshortcuts]')].flatMap(e => e.getAttribute('aria-keyshortcuts').split(' '))"
    )
    controls = "#controls :is(button, input)"
    assert len(shortcuts) == page.run(f"document.querySelectorAll('{controls}').length") + 1
    assert [key for key in shortcuts if key not in listed] == []


def test_hovering_shows_all_datasets_at_that_step_in_all_charts(page):
    page.move(*middle(page, share=0.5))
    page.settle()
    head, *body = page.run(TABLE)
    step = int(head[0].removeprefix("step ").replace(",", ""))
    assert step == pytest.approx(1510, abs=20)
    assert all(cell != NOTHING for row in body for cell in row[1:])
    lines = page.run("document.querySelectorAll('.u-cursor-x').length")
    assert lines >= 2
    page.move(2, 2)
    page.settle()
    assert page.run(TABLE)[0][0] == "last"
    page.key(".")
    page.key(",")
    page.settle()
    assert page.run(TABLE)[0][0] == "step 3,000"


def test_smoothing_is_debiased_never_crosses_a_gap_and_leaves_the_raw_curve(page):
    smooth = page.run("[...metricfold.smoothed([4, 4, NaN, 1, 3, Infinity, 7], 0.9)].map(String)")
    assert [float(v) for v in smooth[:2]] == pytest.approx([4, 4])
    assert (smooth[2], smooth[5]) == ("NaN", "NaN")
    assert [float(smooth[i]) for i in (3, 4, 6)] == pytest.approx([1, (0.09 + 0.3) / 0.19, 7])
    curves = page.run("metricfold.cards[0].chart.series.slice(1).map(s => [s.alpha, s.spanGaps])")
    assert [alpha for alpha, _ in curves] == [0.2] * 6 + [1] * 6
    assert not any(spans for _, spans in curves)
    data = page.run("metricfold.cards[0].chart.data.slice(1).map(y => y[49])")
    assert data.count(None) == 4  # code of A and of B, raw and smoothed


def test_a_curve_that_does_not_fluctuate_is_not_smoothed(page):
    place = page.run("metricfold.cards.findIndex(c => c.panel.name === 'lr')")
    assert page.run(f"metricfold.cards[{place}].chart.series.length") == 3


def test_a_logarithm_leaves_out_zeros_and_negatives_and_says_so(page):
    place = page.run("metricfold.cards.findIndex(c => c.panel.name === 'delta')")
    page.run("metricfold.drawAll()")
    page.key("0")
    page.key("l")
    page.run("metricfold.drawAll()")
    card = f"metricfold.cards[{place}]"
    low, high = page.run(f"[{card}.chart.scales.y.min, {card}.chart.scales.y.max]")
    assert 0 < low <= 1
    assert 3 <= high < 10
    assert "at or below zero" in page.run(f"{card}.note.textContent")
    shown = page.run(f"{card}.chart.data[1].filter(v => v !== null && v !== undefined)")
    assert min(shown) == 1


def test_lone_values_between_gaps_are_points_and_a_constant_is_no_noise(chrome, tmp_path):
    # tensorflow/tensorboard issues 866, whose single values between NaN cannot be seen, and 786 and 1127, whose
    # smoothing makes spikes of a constant and bends a line of two points.
    wanted = [
        (i, {"train/loss": 1.0 if i % 2 else math.nan, "train/lr": 1e-4, "train/two": i * 1.0})
        for i in range(200)
    ]
    for _, row in wanted[2:]:
        del row["train/two"]
    path = write(tmp_path / "run.jsonl", wanted)
    with chrome.page(report(path, tmp_path / "report.html").as_uri()) as page:
        page.run("metricfold.drawAll()")
        chart = "metricfold.cards[0].chart"
        shown = page.run(f"{chart}.series[1].points.filter({chart}, 1, true)")
        assert shown == list(range(1, 200, 2))
        for card in page.run("metricfold.cards.map((c, i) => [c.panel.name, i])"):
            if card[0] in ("lr", "two"):
                assert page.run(f"metricfold.cards[{card[1]}].chart.series.length") == 2
        assert page.errors() == []


def test_names_can_be_anything_and_nothing_of_them_runs(chrome, tmp_path):
    path = tmp_path / "run.jsonl"
    with MetricsLogger([JSONLSink(path)]) as logger:
        for step in range(1, 4):
            row = {f"train_{name}/loss": step * 1.0 for name in EVIL}
            logger.log(step, row | {f"{EVIL[1]}/x": 1.0}, prefix="train")
    arrays = {
        "train/grid": {"axes": [["a", [*EVIL[:2]]], [EVIL[1], [*EVIL[:3]]]], "values": [1.0] * 6}
    }
    header = {"name": EVIL[0], "config": {EVIL[0]: EVIL[1], "__proto__": EVIL[2]}}
    write(path, [(4, {"train/loss": 1.0})], append=True, run=header, arrays=arrays,
          alerts=[{"message": EVIL[0], "severity": EVIL[1], "name": EVIL[1]}])  # fmt: skip
    url = report(path, tmp_path / "report.html").as_uri()
    with chrome.page(url) as page:
        page.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
        page.run("metricfold.drawAll()")
        page.move(*middle(page))
        page.run("metricfold.cards.find(c => c.canvas).point(60, 20)")
        assert page.run("window.PWNED === undefined")
        assert page.run("document.querySelectorAll('img, iframe, a, object').length") == 0
        text = page.run("document.body.textContent")
        # As JSON has no place for it, `/` divides these as the reader says it does.
        for name in EVIL[1:]:
            assert name in text, name
        assert "window.PWNED=1</script>" in text
        assert page.errors() == []
        assert page.requests() == []


def test_the_page_may_run_no_other_script_and_ask_nobody(page):
    page.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.PWNED=1'}))"
    )
    answer = page.run("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
    assert (page.run("window.PWNED === undefined"), answer) == (True, "refused")
    image = "new Promise(done => { const i = new Image(); i.onerror = () => done('refused'); i.src = 'http://127.0.0.1:9/x.png' })"
    assert page.run(image) == "refused"
    assert len(page.errors()) >= 2
    page.events.clear()  # what was refused was asked for on purpose


def test_a_live_page_follows_what_is_appended_rewound_and_removed(chrome, tmp_path):
    path = write(tmp_path / "run.jsonl", rows(100))
    last = "metricfold.state.runs[0].lastStep"
    with view(path) as server, chrome.page(server.url) as page:
        page.run("metricfold.always = true")
        assert page.run(last) == 1000
        page.key("+")
        kept = page.run("metricfold.state.range")
        write(path, [(1010, {"train_web/loss": 9.0, "train/loss": 9.0})], append=True)
        page.wait(f"{last} === 1010")
        assert page.run("metricfold.state.range") == kept
        page.key("r")
        page.wait("metricfold.cards[0].chart.scales.x.max === 1010")
        assert page.run("metricfold.cards[0].table.rows[1].cells[1].textContent") == "9"
        # A dataset that is new.
        write(path, [(1020, {"train_math/loss": 4.0})], append=True)
        page.wait("metricfold.cards[0].table.rows.length === 5")
        with MetricsLogger([JSONLSink(path)]) as logger:
            logger.rewind(500)
        page.wait(f"{last} === 500")
        page.wait("metricfold.cards[0].chart.scales.x.max === 500")
        page.key("p")
        write(path, [(510, {"train/loss": 1.0})], append=True)
        path.rename(tmp_path / "moved.jsonl")
        page.key("p")
        page.wait("document.getElementById('status').textContent.includes('is gone')")
        server.close()
        page.wait("document.getElementById('status').textContent.includes('does not answer')")
        assert page.run(last) == 500
        asked = page.requests()
        assert asked
        assert [url for url in asked if not url.startswith(server.url)] == []


def test_the_page_follows_the_reader_in_dark_light_and_width(chrome, two_runs):
    with chrome.page(two_runs, width=700, dark=True) as page:
        assert page.run("document.documentElement.classList.contains('dark')")
        page.run("metricfold.drawAll()")
        assert page.run("document.documentElement.scrollWidth") <= 700
        page.prefer("light")
        page.wait("!metricfold.state.dark")
        page.resize(1400, 900)
        page.wait("metricfold.cards[0].chart.width > 700")
        assert page.errors() == []


def test_all_charts_are_in_print_and_it_is_light(chrome, two_runs):
    with chrome.page(two_runs, dark=True) as page:
        page.run(
            "addEventListener('beforeprint', () => { window.printed = [metricfold.state.dark, metricfold.cards.every(c => c.chart || c.canvas)] })"
        )
        answer = page.send("Page.printToPDF", printBackground=True)
        assert len(answer["data"]) > 10_000
        assert page.run("window.printed") == [False, True]
        page.wait("metricfold.state.dark")


def test_what_can_be_used_has_a_name_for_those_who_do_not_see(page):
    nameless = page.run(
        "[...document.querySelectorAll('button, input, select, [role=img], [role=region]')]"
        ".filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label')?.textContent.trim()))"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    assert page.run("document.querySelectorAll('section:not([aria-labelledby])').length") == 0


def test_a_run_without_anything_says_so(chrome, tmp_path):
    path = write(tmp_path / "run.jsonl", [(1, {})])
    with chrome.page(report(path, tmp_path / "report.html").as_uri()) as page:
        assert "Nothing has been logged" in page.run("document.body.innerText")
        assert page.errors() == []
