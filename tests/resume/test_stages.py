"""Stages in real runs: begun on any layout, resumed on any other, added later, refused where it is too late."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from gptscale.checkpoint.folder import list_checkpoints
from gptscale.checkpoint.trained import load_trained
from gptscale.cli.main import main
from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.prepare import prepare
from tests.helpers.text import documents, write_jsonl
from tests.helpers.training import exact_part, read_metrics, run_training, small_run, write_corpus

STEP_TOKENS = 8 * 32
PLAIN = ["parallel.engine=plain", "parallel.zero_stage=0"]


@pytest.fixture(scope="module")
def books(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So little other text, under the same tokenizer, that the runs below read it more than once."""
    folder = tmp_path_factory.mktemp("books")
    source = SourceConfig(path=str(write_jsonl(folder / "text.jsonl", documents(12, seed=5))))
    data = DataConfig(sources=(source,), heldout_fraction=0.3, workers=1)
    return prepare(data, TokenizerConfig(path=str(corpus / "tokenizer.model")), folder / "prepared").folder


def staged_run(corpus: Path, books: Path, folder: Path) -> list[str]:
    """A mixture from step 4 on, and from step 8 on sequences of twice the length."""
    mixture = f"[{{path: {corpus}, weight: 1.0}}, {{path: {books}, weight: 2.0}}]"
    stages = (
        f"{{name: anneal, from_tokens: {4 * STEP_TOKENS}, path: {mixture}}}, "
        f"{{name: long, from_tokens: {8 * STEP_TOKENS - 5}, sequence_length: 64}}"
    )
    return [*small_run(corpus, folder), "model.dropout=0", "model.positions=rope", f"data.stages=[{stages}]"]


def hashes(folder: Path) -> list[str]:
    return [line["data/sample_hash"] for line in read_metrics(folder) if "train/loss" in line]


def test_any_layout_goes_on_from_any_other_in_the_middle_of_epochs_and_stages(
    corpus: Path, books: Path, tmp_path: Path
) -> None:
    """1, 2 and 4 ranks, changing with the micro-batch within and at the end of stages: the same global sequence.

    The tolerance is the design's: fp32, losses within 1e-4 over tens of steps.
    """
    run_training([*staged_run(corpus, books, tmp_path / "whole"), *PLAIN], 1, tmp_path)
    expected = [line for line in read_metrics(tmp_path / "whole") if "train/loss" in line]
    assert [line["tokens"] for line in expected] == [STEP_TOKENS * step for step in range(1, 13)]
    # What a model is used with is the longest that it has seen: the last stage begins with step 9.
    lengths = {
        saved.name: load_trained(saved, torch.device("cpu"), pytest.fail).model.sequence_length
        for saved in list_checkpoints(tmp_path / "whole" / "checkpoints")
    }
    assert lengths == {"step-00000004": 32, "step-00000008": 32, "step-00000012": 64}
    moving = [*staged_run(corpus, books, tmp_path / "moving"), "schedule.total_steps=12"]
    for steps, engine, stage, count, axis, micro_batch in (
        (2, "deepspeed", 1, 4, "data", 2),
        (4, "deepspeed", 1, 4, "pipeline", 2),
        (5, "plain", 0, 1, "data", 8),
        (8, "deepspeed", 3, 2, "data", 2),
        (9, "deepspeed", 2, 4, "sequence", 2),
        (10, "deepspeed", 1, 4, "tensor", 1),
        (12, "deepspeed", 2, 2, "data", 4),
    ):
        layout = [f"parallel.engine={engine}", f"parallel.zero_stage={stage}", f"train.micro_batch={micro_batch}"]
        if axis != "data":
            layout.append(f"parallel.{axis}=2")
        run_training([*moving, *layout, f"train.steps={steps}"], count, tmp_path)
    found = [line for line in read_metrics(tmp_path / "moving") if "train/loss" in line]
    assert hashes(tmp_path / "moving") == hashes(tmp_path / "whole")
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-4)


def test_a_stage_is_added_until_the_run_has_begun_it(
    corpus: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Changed text is refused with what to type instead; that, typed, goes on, and what came before is as it was."""
    base = [*small_run(corpus, tmp_path / "run"), *PLAIN, "schedule.total_steps=12"]
    run_training([*base, "train.steps=4"], 1, tmp_path)
    before = exact_part(read_metrics(tmp_path / "run"))

    without = [item for item in base if not item.startswith("data.path=")]
    refused = run_training([*without, f"data.path={books}"], 1, tmp_path, code=2).text().strip().splitlines()
    assert len(refused) == 2, refused
    assert "data identity.corpora[0].manifest: " in refused[0]
    assert f"keep data.path={corpus} and add 'data.stages=[" in refused[1]
    typed = [word.rstrip(";") for word in shlex.split(refused[1]) if word.startswith("data.")]
    assert typed[1] == f"data.stages=[{{name: stage-1, from_tokens: {4 * STEP_TOKENS}, path: {books}}}]"

    run_training([*without, *typed, "train.steps=8"], 1, tmp_path)
    after = exact_part(read_metrics(tmp_path / "run"))
    assert after[: len(before)] == before
    run_training([*base, "train.steps=8", f"run.dir={tmp_path / 'other'}"], 1, tmp_path)
    ours, plain = hashes(tmp_path / "run"), hashes(tmp_path / "other")
    assert ours[:4] == plain[:4]
    assert not set(ours[4:]) & set(plain[4:])

    # Begun: it stays. Another one may follow from here on.
    gone = run_training(base, 1, tmp_path, code=2).text()
    assert "data identity.stages[0]" in gone
    assert f"from_tokens={8 * STEP_TOKENS} or more" in gone
    earlier = typed[1].replace(f"from_tokens: {4 * STEP_TOKENS}", f"from_tokens: {3 * STEP_TOKENS}")
    moved = run_training([*without, typed[0], earlier], 1, tmp_path, code=2).text()
    assert "data identity.stages[0].start: 32 → 24" in moved
    more = typed[1].removesuffix("]") + f", {{name: back, from_tokens: {8 * STEP_TOKENS}, path: {corpus}}}]"
    run_training([*without, typed[0], more], 1, tmp_path)
    assert exact_part(read_metrics(tmp_path / "run"))[: len(after)] == after
    assert main(["inspect", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert f"data: 100.0 % {corpus}, " in told
    assert f"stage stage-1: 100.0 % {books}, in sequences of 32, after step 4" in told
    assert f"stage back: 100.0 % {corpus}, in sequences of 32, after step 8" in told
    assert "Stage back: 100.0 % " in (tmp_path / "run" / "report.html").read_text()
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "step 9: stage back has begun" in log


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        ("run.seed=1", "seed: 1"),
        ("data.sequence_length=16", "sequence_length: 16"),
    ],
)
def test_another_seed_or_length_is_a_stage_too(change: str, entry: str, corpus: Path, tmp_path: Path) -> None:
    base = [*small_run(corpus, tmp_path / "run"), *PLAIN, "schedule.total_steps=12", "evaluation.every_steps=0"]
    run_training([*base, "train.steps=4"], 1, tmp_path)
    refused = run_training([*base, change], 1, tmp_path, code=2).text().strip().splitlines()
    assert len(refused) == 2, refused
    typed = [word.rstrip(";") for word in shlex.split(refused[1]) if word.startswith("data.stages")]
    assert typed == [f"data.stages=[{{name: stage-1, from_tokens: {4 * STEP_TOKENS}, {entry}}}]"]
    run_training([*base, *typed, "train.steps=6"], 1, tmp_path)
    assert len(hashes(tmp_path / "run")) == 6


def test_another_tokenizer_is_no_stage(corpus: Path, tmp_path: Path) -> None:
    base = [*small_run(corpus, tmp_path / "run"), *PLAIN, "train.steps=4"]
    run_training(base, 1, tmp_path)
    foreign = tmp_path / "foreign"
    source = write_corpus(tmp_path / "text", documents=60)
    prepare = ["prepare", f"target={foreign}", f"data.sources=[{{path: {source}}}]", "data.heldout_fraction=0.1"]
    assert main([*prepare, "tokenizer.vocab_size=380"]) == 0
    other = [f"data.path={foreign}" if item.startswith("data.path=") else item for item in base]
    refused = run_training([*other, "train.steps=8"], 1, tmp_path, code=2).text()
    assert "tokenizer: " in refused
    assert f"tokenizer.path={tmp_path / 'run'}/tokenizer.model" in refused
    assert "data.stages" not in refused
