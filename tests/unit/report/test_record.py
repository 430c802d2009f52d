"""A run folder as others see it."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptscale.report.facts import MOST_SESSIONS, read_facts
from gptscale.report.lines import read_json_lines
from gptscale.report.record import read_run
from gptscale.report.run_text import state
from tests.helpers.runs import some_facts, write_run


def test_lines_end_where_they_are_broken(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert list(read_json_lines(path)) == []
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3')
    assert [line for lines in read_json_lines(path) for line in lines] == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n{"b": 1\n"c": 2}\n{"a": 4}\n')  # together the middle two would be an object
    assert [line for lines in read_json_lines(path) for line in lines] == [{"a": 1}]
    path.write_bytes(b'{"a": 1}\n[2]\n{"a": 3}\n')
    assert [line for lines in read_json_lines(path) for line in lines] == [{"a": 1}]


def test_the_time_of_a_run_is_in_its_parts(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "tokens": 10, "train/loss": 3.0, "throughput/step_time_s": 2.0, "time/data_s": 0.5},
        {"step": 1, "eval/loss": 3.0, "time/evaluate_s": 4.0},
        {
            "step": 2,
            "tokens": 20,
            "train/loss": None,
            "throughput/step_time_s": 2.0,
            "time/data_s": 0.5,
            "time/forward_backward_s": 1.0,
            "time/update_s": None,
            "time/save_s": 3.0,
        },
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    np.testing.assert_array_equal(run.elapsed_s, [2.0, 11.0])
    seconds = run.seconds
    assert seconds is not None
    assert (seconds.data, seconds.forward_backward, seconds.update, seconds.save) == (1.0, 1.0, None, 3.0)
    assert (seconds.evaluate, seconds.other, seconds.total) == (4.0, 2.0, 11.0)
    assert run.tokens_per_sec == 5.0
    assert run.evaluations[0].tokens == 10
    assert np.isnan(run.evaluations[0].scores["held-out"].perplexity)


def test_the_unnamed_set_is_not_shown_twice(tmp_path: Path) -> None:
    def names(*scores: tuple[str, float]) -> list[str]:
        line = {"step": 1} | {f"{prefix}{key}": value for prefix, value in scores for key in ("loss", "perplexity")}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return read_run(tmp_path).set_names

    assert names(("eval/", 2.0)) == ["held-out"]
    assert names(("eval/", 2.0), ("eval/a/", 3.0)) == ["held-out", "a"]
    assert names(("eval/a/b/", 3.0)) == ["a/b"]


def test_the_unnamed_set_that_is_a_named_one_goes(tmp_path: Path) -> None:
    keys = ("loss", "perplexity", "bits_per_byte")
    line = {"step": 1} | {f"{prefix}{key}": 2.0 for prefix in ("eval/", "eval/a/") for key in keys}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert read_run(tmp_path).set_names == ["a"]


def test_sessions_are_kept_in_order_and_not_without_end(tmp_path: Path) -> None:
    facts = some_facts("run", 10, resumed=0, peak=None)
    earlier = None
    for step in range(MOST_SESSIONS + 3):
        session = replace(facts.sessions[0], resumed_step=step)
        earlier = replace(facts, sessions=(session,)).after(earlier)
    assert earlier is not None
    earlier.write(tmp_path)
    found = read_facts(tmp_path)
    assert found is not None
    assert [session.resumed_step for session in found.sessions] == list(range(3, MOST_SESSIONS + 3))
    assert found.sessions_left_out == 3
    assert replace(found, sessions=facts.sessions, sessions_left_out=0) == facts


@pytest.mark.parametrize("text", ["", "{", '{"format_version": 99}', '{"format_version": 1}', "[1]"])
def test_facts_that_cannot_be_read_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(text)
    assert read_facts(tmp_path) is None
    assert read_run(tmp_path).step == 0


def test_whether_a_run_is_going(tmp_path: Path) -> None:
    """The lock file of a live process, of a dead one, of one on another host, and emptied by an orderly end."""
    run = write_run(tmp_path / "run", 20, total=100)
    here = socket.gethostname()
    for text, says in (
        (f"process {os.getpid()} on {here}\n", "running"),
        (f"process 4194999 on {here}\n", "stopped"),  # above the largest pid there is
        ("process 1 on elsewhere\n", "running"),
        ("", "stopped"),
    ):
        (run / "lock").write_text(text)
        assert state(read_run(run)).startswith(says), text
