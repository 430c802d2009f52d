"""The samples of a step as `gptscale inspect` tells them: those that training takes, rank by rank."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptscale.cli.main import main
from gptscale.config.compose import compose
from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig, TrainRoot
from gptscale.config.step_plan import step_plan
from gptscale.data.corpus import open_split
from gptscale.data.prepare import prepare
from gptscale.data.rows import document_starts
from gptscale.data.stream import StepData, StepFeed
from gptscale.report.data_card import data_cards
from gptscale.report.record import read_run
from gptscale.topology import split_batch
from gptscale.train.setup import corpus_configs, open_stream
from gptscale.train.step_samples import ranks_of_step, recorded_hash, view_step
from tests.helpers.runs import some_facts
from tests.helpers.text import documents, write_jsonl

STEPS, RESUMED = 9, 5
"""The made-up run: steps, and after how many it went on with four ranks in place of two."""
LENGTH = 24


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main(["inspect", *map(str, arguments)]) == code
    said = capsys.readouterr()
    return said.out, said.err


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two prepared folders with one vocabulary; the second of two sources and small shards."""
    root = tmp_path_factory.mktemp("second")
    sources = tuple(
        SourceConfig(name=name, path=str(write_jsonl(root / f"{name}.jsonl", documents(30, words, seed=3))))
        for name, words in (("long", 60), ("short", 5))
    )
    data = DataConfig(sources=sources, heldout_fraction=0.1, shard_tokens=2_000, workers=1)
    second = prepare(data, TokenizerConfig(path=str(corpus / "tokenizer.model")), root / "prepared")
    assert len(second.train.shards) > 2
    return corpus, second.folder


@pytest.fixture(scope="module")
def settings(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainRoot, str]:
    """Of a run over a mixture whose batch grows, and its config.yaml, in which a path comes from the environment."""
    root = tmp_path_factory.mktemp("runs")
    composed = compose(
        "train",
        TrainRoot,
        [
            "experiment=tiny",
            f"run.dir={root}/run",
            "run.seed=11",
            f"data.path=[{{path: {folders[0]}, weight: 1}}, {{path: {folders[1]}, weight: 3}}]",
            f"data.sequence_length={LENGTH}",
            f"train.steps={STEPS}",
            "train.global_batch=16",
            "train.ramp_from=4",
            f"train.ramp_tokens={40 * LENGTH}",
            "launch.ranks=4",
        ],
    )
    yaml = composed.to_yaml().replace(str(folders[0]), "${oc.env:INSPECT_TEST_CORPUS}")
    return composed.settings, yaml + "logging_key: ${oc.env:INSPECT_TEST_SECRET}\n"


def steps_of(settings: TrainRoot, ranks: int, rank: int, start: int, count: int) -> Iterator[StepData]:
    """What training itself would take."""
    stream = open_stream(settings)
    split = split_batch(settings.train.global_batch, 1, ranks)
    with StepFeed(stream, step_plan(settings), split, rank, start) as feed:
        for _ in range(count):
            yield next(feed)
    stream.close()


@pytest.fixture(scope="module")
def hashes(settings: tuple[TrainRoot, str]) -> list[int]:
    """Of every step, summed over its ranks."""
    root, _ = settings
    plan = step_plan(root)
    found: list[int] = []
    for ranks, first, last in ((2, 0, RESUMED), (4, RESUMED, STEPS)):
        taken = [list(steps_of(root, ranks, rank, plan.samples_after(first), last - first)) for rank in range(ranks)]
        found += [sum(step.sample_hash for step in of_ranks) for of_ranks in zip(*taken, strict=True)]
    return found


@pytest.fixture
def run(
    settings: tuple[TrainRoot, str],
    hashes: list[int],
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A run's files, with the running sums that its ranks would have recorded."""
    monkeypatch.setenv("INSPECT_TEST_CORPUS", str(folders[0]))
    root, yaml = settings
    plan = step_plan(root)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml)
    total = 0
    with (folder / "metrics.jsonl").open("w") as file:
        for step, one in enumerate(hashes, 1):
            total = (total + one) % 2**64
            line = {"step": step, "tokens": plan.samples_after(step) * LENGTH, "train/loss": 1.0}
            file.write(json.dumps(line | {"data/sample_hash": f"{total:016x}"}) + "\n")
    facts = some_facts("run", STEPS, resumed=RESUMED, peak=None)
    earlier, later = facts.sessions
    sessions = (replace(earlier, ranks=2), replace(later, ranks=4))
    replace(facts, sessions=sessions, data=data_cards(corpus_configs(root))).write(folder)
    return folder


def test_every_step_is_the_one_that_was_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over a growing batch, a resumption and another number of ranks."""
    position = 0
    for step in range(1, STEPS + 1):
        out, err = inspected(capsys, run, f"step={step}", "limit=1")
        assert err == ""
        assert "equal to what the run recorded" in out
        ranks = 2 if step <= RESUMED else 4
        found = re.match(rf"{re.escape(str(run))}: step {step} takes positions (\d+) to (\d+): (\d+) samples of", out)
        assert found
        first, last, samples = map(int, found.groups())
        assert (first, last - first + 1) == (position, samples)
        assert f"\n{ranks} ranks take {samples // ranks} sample" in out
        position = last + 1
    assert samples == 16
    out, _ = inspected(capsys, run, f"step={STEPS + 1}")
    assert "not taken yet" in out
    assert f"takes positions {position} to" in out


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1), (4, 2)])
def test_rows_are_those_that_a_rank_is_fed(
    ranks: int, rank: int, settings: tuple[TrainRoot, str], folders: tuple[Path, Path]
) -> None:
    """Read from the shards at the places that are told, with numpy alone, they are what the feed gives the model."""
    root, _ = settings
    end_of_text = open_split(folders[0], "train").manifest.end_of_text
    shown = []
    for step, data in enumerate(steps_of(root, ranks, rank, 0, STEPS), 1):
        view = view_step(root, step, ranks, rank, limit=0)
        assert view.start == data.start
        rows = np.stack([_read(one.corpus, one.shard, one.start) for one in view.shown])
        np.testing.assert_array_equal(rows, np.concatenate([b.tokens_BT1.numpy() for b in data.microbatches]))
        offsets = [one.position - view.start for one in view.shown]
        assert offsets == list(view.rank_rows) == list(range(rank * len(rows), (rank + 1) * len(rows)))
        for one, row in zip(view.shown, rows, strict=True):
            starts = document_starts(row[None, :-1], end_of_text)[0]
            assert [piece.tokens for piece in one.pieces] == (np.unique(starts, return_counts=True)[1].tolist())
            assert all(piece.begins for piece in one.pieces[1:])
            assert all(piece.ends for piece in one.pieces[:-1])
            assert one.pieces[-1].ends == (row[-2] == end_of_text)
            before = _read(one.corpus, one.shard, one.start - 1)[0] if one.start else end_of_text
            assert one.pieces[0].begins == (before == end_of_text)
        shown += view.shown
    assert {one.corpus for one in shown} == {str(folder) for folder in folders}
    assert {one.source for one in shown} >= {"long", "short"}
    assert any(len(one.pieces) > 1 for one in shown)
    assert ranks > 1 or any(one.pieces[0].begins for one in shown), "among all samples there are such"
    assert any("<|endoftext|>" in one.text for one in shown)


def _read(corpus: str, shard: str, start: int) -> Any:
    tokens = np.load(Path(corpus) / "train" / f"{shard}.tok.npy")[start : start + LENGTH + 1]
    return tokens.astype(np.int64)


def test_sources_and_epochs_are_told(settings: tuple[TrainRoot, str]) -> None:
    """The second folder has some hundred samples: far on, it is read again, in another order."""
    view = view_step(settings[0], 200, 1, None, limit=0)
    second = [one for one in view.shown if one.source in ("long", "short")]
    assert all(one.epoch > 0 for one in second)
    early = view_step(settings[0], 1, 1, None, limit=0)
    assert all(one.epoch == 0 for one in early.shown)


def test_a_rank_in_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = inspected(capsys, run, "step=9", "rank=3", "limit=2")
    assert re.search(r"^rank 3 of 4 takes positions (\d+) to (\d+)$", out, re.M)
    assert len(re.findall(r"^position ", out, re.M)) == 2
    assert out.endswith("\n2 more: limit=0 shows all\n")
    out, _ = inspected(capsys, run, "step=9", "rank=15", "ranks=16")
    assert "rank 15 of 16 takes position " in out
    assert "equal to what the run recorded" in out, "the hash is of the whole step"
    assert "more: " not in out
    assert re.search(r"^  documents: …?\d+( \| \d+)*…? tokens\n  │ ", out, re.M)
    assert all(letter.isprintable() or letter == "\n" for letter in out)


def test_other_samples_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("seed: 11", "seed: 12"))
    out, err = inspected(capsys, run, "step=3", code=2)
    assert re.search(
        r"sample hash of the step ([0-9a-f]{16}): DIFFERENT from what the run recorded, (?!\1)[0-9a-f]", out
    )
    assert err.startswith(f"{run}: step 3 was taken with other samples than these\nconfig.yaml says something else")
    config.write_text(text)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    line = json.loads(lines[4])
    line["data/sample_hash"] = f"{int(line['data/sample_hash'], 16) ^ 1:016x}"
    lines[4] = json.dumps(line)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step, code in ((4, 0), (5, 2), (6, 2), (7, 0)):
        inspected(capsys, run, f"step={step}", "limit=1", code=code)


def test_text_that_was_prepared_again_is_named(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path leads to other text than it did, with the same tokenizer."""
    source = SourceConfig(path=str(write_jsonl(tmp_path / "text.jsonl", documents(80, 40, seed=9))))
    tokenizer = TokenizerConfig(path=str(corpus / "tokenizer.model"))
    other = prepare(DataConfig(sources=(source,), heldout_fraction=0.1), tokenizer, tmp_path / "other").folder
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    monkeypatch.setenv("INSPECT_TEST_CORPUS", str(moved))
    inspected(capsys, run, "step=2")  # the same text elsewhere is the same
    facts = json.loads((run / "facts.json").read_text())
    facts["data"][0]["path"] = str(moved)
    (run / "facts.json").write_text(json.dumps(facts))
    shutil.rmtree(moved)
    shutil.copytree(other, moved)
    _, err = inspected(capsys, run, "step=2", code=2)
    assert f"\n{moved} is other text than it was (identity {facts['data'][0]['identity'][:12]}, now " in err
    assert len(err.splitlines()) == 2


def test_what_was_not_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that went on from another's checkpoint has no line before its first."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[3:]) + "\n")
    record = read_run(run)
    assert [recorded_hash(record, step) is None for step in (1, 3, 4, 5, 9, 10)] == [
        True,
        True,
        True,
        False,
        False,
        True,
    ]
    out, _ = inspected(capsys, run, "step=4", "limit=1")
    assert "metrics.jsonl does not tell what the run's was" in out
    (run / "facts.json").unlink()
    out, _ = inspected(capsys, run, "step=5", "limit=1")
    assert "4 ranks take" in out, "as launch.ranks says"
    assert "equal" in out


def test_ranks_of_steps_of_forgotten_sessions(run: Path) -> None:
    record = read_run(run)
    assert record.facts is not None
    assert [ranks_of_step(record, step) for step in (1, RESUMED, RESUMED + 1, 99)] == [2, 2, 4, 4]
    last = replace(record.facts, sessions=record.facts.sessions[1:], sessions_left_out=1)
    cut = replace(record, facts=last)
    assert ranks_of_step(cut, RESUMED) is None
    assert ranks_of_step(replace(record, facts=None), 1) is None


def test_prepared_text_with_the_settings_of_a_run(
    run: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Given as keys, they lead to the same samples as a run's."""
    keys = ("step=7", "global_batch=6", f"sequence_length={LENGTH}", "ranks=3", "seed=5")
    out, _ = inspected(capsys, folders[1], *keys, "rank=1", "limit=0")
    root = TrainRoot(data=DataConfig(path=str(folders[1]), sequence_length=LENGTH))
    root = replace(root, run=replace(root.run, seed=5), train=replace(root.train, steps=9, global_batch=6))
    (data,) = list(steps_of(root, 3, 1, 36, 1))
    told = re.findall(r"(shard-\d+) from token ([\d,]+)$", out, re.M)
    rows = np.stack([_read(str(folders[1]), shard, int(start.replace(",", ""))) for shard, start in told])
    np.testing.assert_array_equal(rows, np.concatenate([b.tokens_BT1.numpy() for b in data.microbatches]))
    assert "rank 1 of 3 takes positions 38 to 39" in out
    assert "as metrics.jsonl of such a run would grow by" in out


def test_mistakes(
    run: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = folders[1]
    size = f"sequence_length={LENGTH}"
    for arguments, says in (
        ([run, "step=0"], "step=0: steps are counted from 1\nset step=1"),
        ([run, "step=3", "rank=2"], "rank=2 is none of 2 ranks\nset it to a number from 0 to 1"),
        ([run, "step=3", "rank=-1"], "rank=-1 is none of 2 ranks"),
        ([run, "step=9", "ranks=5"], "ranks=5: 5 data ranks cannot share the step's 16 samples evenly\nset ranks=4"),
        ([run, "step=9", "ranks=0"], "ranks=0: world_size must be at least 1, not 0\n"),
        ([run, "step=9", "seed=1"], f"seed is for prepared text: {run} has its own\nleave seed out"),
        ([run, "step=9", "html=a"], "html=a has no effect"),
        ([text, "step=9"], "step=… is of a run, or needs the settings of one"),
        ([text, "step=9", "global_batch=8"], "step=… is of a run, or needs the settings of one"),
        ([text, "step=9", "global_batch=0", size], "global_batch=0 is below 1\n"),
        ([text, "step=9", "global_batch=8", size, "ranks=3"], "ranks=3: 3 data ranks cannot share"),
        ([text, "step=9", "global_batch=8", "sequence_length=900000"], f"{text}: no shard holds one sample"),
        ([text, "step=9", "global_batch=8", size, "html=a"], "html=a has no effect"),
    ):
        out, err = inspected(capsys, *arguments, code=2)
        assert out == ""
        assert err.startswith(says), err
        assert len(err.splitlines()) == 2
    monkeypatch.delenv("INSPECT_TEST_CORPUS")
    _, err = inspected(capsys, run, "step=3", code=2)
    assert "config.yaml: data.path[0].path: " in err
    assert "INSPECT_TEST_CORPUS" in err
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "missing, so nobody knows the run's settings"),
        ("data: [", "damaged (ParserError)"),
        ("- 1\n", "damaged (no settings in it)"),
        ("data: {future: 1}\n", "there is no setting 'data.future'"),
        ("train: {global_batch: many}\n", "train.global_batch must be a whole number, not 'many'"),
    ],
)
def test_a_config_that_cannot_be_read(
    content: str | None, says: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        (run / "config.yaml").unlink()
    else:
        (run / "config.yaml").write_text(content)
    out, err = inspected(capsys, run, "step=3", code=2)
    assert out == ""
    assert err.startswith(f"{run / 'config.yaml'}: {says}"), err
    assert len(err.splitlines()) == 2
