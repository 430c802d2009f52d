"""The report in a real browser, on a phone and a desktop, by day and by night."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gptscale.report.page import write_report
from gptscale.report.record import read_run
from tests.helpers.chromium import Browser
from tests.helpers.runs import write_run

EVIL = "<script>document.title='run'</script><img src=x onerror=alert(1)>&\"'"
PHONE, DESKTOP = 360, 1280


def two_steps_and_nulls(folder: Path) -> Path:
    """Nothing but what a step must have, and half of that null."""
    keys = ("train/loss", "train/grad_norm", "train/lr", "throughput/step_time_s", "memory/peak_bytes")
    lines = [{"step": 1, "tokens": 64} | dict.fromkeys(keys), {"step": 2, "tokens": 128} | dict.fromkeys(keys, 1.0)]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "tok')
    return folder


def of_hostile_texts(folder: Path) -> Path:
    write_run(folder, steps=30, sets=(EVIL, "b"), name=EVIL)
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "prompt": EVIL, "completion": f"</blockquote>{EVIL}" + "x" * 500}) + "\n")
    with (folder / "config.yaml").open("a") as file:
        file.write(f"# {EVIL}</pre></details>\n")
    return folder


RUNS = {
    "whole": lambda folder: write_run(folder, steps=800, skipped=(200, 201, 500)),
    "going on": lambda folder: write_run(folder, 120, total=1000, sets=("held-out",), optional=False, mfu=False),
    "three steps": lambda folder: write_run(folder, steps=3, sets=("held-out",)),
    "no evaluation": lambda folder: write_run(folder, steps=40, sets=(), samples=False),
    "twelve sets": lambda folder: write_run(folder, 60, sets=[f"set-{number}" for number in range(12)]),
    "nulls": two_steps_and_nulls,
    "hostile": of_hostile_texts,
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_page_is_quiet_complete_and_fits(kind: str, tmp_path: Path, browser: Browser) -> None:
    """No message, exception or request; no sideways scrolling; readable; every mark within its drawing."""
    run = RUNS[kind](tmp_path / "run")
    write_report(run)
    for width in (PHONE, DESKTOP):
        for dark in (False, True):
            seen = browser.look(run / "report.html", width, dark)
            assert seen.faults == [], f"{width} px, {'dark' if dark else 'light'}"
            assert seen.drawings >= {"nulls": 5}.get(kind, 7)


BROKEN = {
    "console.error: no": "<script>console.error('no')</script>",
    "exception: Uncaught": "<script>throw new Error('no')</script>",
    "request: http://127.0.0.1:9/a.png": "<img src='http://127.0.0.1:9/a.png'>",
    "wider than the window": "<div style='width: 3000px'>wide</div>",
    "contrast 1.": "<p style='color: #ddd; background: #fff'>faint</p>",
    "outside": "<svg role='img' viewBox='0 0 9 9'><circle cx='9' cy='5' r='4'/></svg>",
    "without a mark": "<svg role='img' viewBox='0 0 9 9'><text y='8' font-size='2'>a</text></svg>",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_page_is_caught(fault: str, tmp_path: Path, browser: Browser) -> None:
    """The negative control of everything that the tests above ask the browser."""
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><html><body style='background: #fff'><p>text</p>{BROKEN[fault]}</body></html>")
    assert any(fault in found for found in browser.look(page, PHONE, dark=False).faults)


def test_nothing_from_a_run_is_markup(tmp_path: Path) -> None:
    run = of_hostile_texts(tmp_path / "run")
    write_report(run)
    page = (run / "report.html").read_text()
    assert not re.search(r"<script|<img|on\w+=alert\(1\)>(?!&amp;)", page.replace("&lt;", "&LT;"))
    assert page.count("&lt;script&gt;document.title=") > 5
    assert "http" not in re.sub(r"https://example.org/", "", page), "only the sources of the data card are addresses"


def test_a_page_says_what_the_run_was(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=800, skipped=(200, 201, 500))
    write_report(run)
    page = (run / "report.html").read_text()
    record = read_run(run)
    assert record.latest is not None
    for said in (
        "finished: step 800 of 800",
        f"{record.latest.scores['web'].loss:.4f}",
        f"{record.latest.scores['books'].bits_per_byte:.4f}",
        "3 updates were skipped",
        "MFU = tokens a second × FLOPs a token ÷ peak FLOP/s of all devices",
        "7.92 PFLOP/s",
        "355,922,944",
        "ODC-By",
        "PSF-2.0",
        "112 more are left out",
        "update skipped",
        "resumed",
        "NVIDIA H100",
        "2 sessions",
        "layers: 24",
    ):
        assert said in page, said
    shares = [float(share) for share in re.findall(r'<td class="number">([\d.]+) %</td>', page)][:6]
    assert sum(shares) == pytest.approx(100, abs=0.4), "the parts of the time are all of it"
    assert "unknown" not in page


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 120, total=1000, sets=("held-out",), optional=False, mfu=False)
    write_report(run)
    page = (run / "report.html").read_text()
    assert "step 120 of 1,000" in page
    assert "finished" not in page
    assert "<progress" in page
    assert "The peak of this device is not known" in page
    assert re.search(r">MFU</dt><dd class=\"figure\">unknown<", page)
    assert "Not recorded by itself: forward and backward, update, save." in page


def test_a_long_run_is_drawn_quickly_and_small(tmp_path: Path) -> None:
    """30,000 steps: its page stays small, and one spike of one step is on it."""
    run = write_run(tmp_path / "run", steps=1000, evaluate_every=100)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in lines if "train/loss" in line]
    with (run / "metrics.jsonl").open("w") as file:
        for repeat in range(30):
            for number, line in enumerate(steps, start=1 + repeat * len(steps)):
                values = line.split(", ", 2)[2]
                if number == 17_777:
                    values = re.sub(r'"train/grad_norm": [^,]+', '"train/grad_norm": 1234.5', values)
                file.write(f'{{"step": {number}, "tokens": {number * 100}, {values}\n')
    started_s = time.process_time()
    write_report(run)
    took_s = time.process_time() - started_s
    page = (run / "report.html").read_text()
    assert "highest 1,234.500" in page or "logarithmic" in page
    assert len(page) < 400_000
    assert took_s < 5, "some 0.5 s; a loaded machine may take longer"


def test_a_report_is_of_the_moment(tmp_path: Path) -> None:
    from gptscale.report.page import render

    run = read_run(write_run(tmp_path / "run", steps=5))
    assert "Written 2026-01-02 03:04:05 UTC" in render(run, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
