"""`gptscale inspect … step=N rank=R`: the samples of a step, of a run or of settings given as keys. Imports torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gptscale.config.schema import DataConfig, InspectRoot, RunConfig, TrainConfig, TrainRoot
from gptscale.config.stored import stored_data_settings
from gptscale.data.remote import cache_for, fetch_manifest
from gptscale.data.store import is_remote
from gptscale.report.record import CONFIG, RunRecord, read_run
from gptscale.report.step_text import step_text
from gptscale.runtime.errors import UserError
from gptscale.train.step_samples import ranks_of_step, recorded_hash, view_step

OF_TEXT_ALONE = ("global_batch", "sequence_length", "seed")


def step_of_run(path: Path, asked: InspectRoot, width: int) -> None:
    """Print the samples. Raises UserError where the run has recorded others."""
    assert asked.step is not None
    for key in OF_TEXT_ALONE:
        if getattr(asked, key) is not None:
            raise UserError(
                f"{key} is for prepared text: {path} has its own\nleave {key} out, or name the text's folder"
            )
    settings = stored_data_settings(path / CONFIG)
    settings = replace(settings, data=replace(settings.data, verify=asked.verify))
    run = read_run(path)
    ranks = asked.ranks
    if ranks is None:
        ranks = ranks_of_step(run, asked.step) or settings.launch.ranks
    view = view_step(settings, asked.step, ranks, asked.rank, asked.limit)
    recorded = recorded_hash(run, asked.step)
    if recorded is None:
        says = "not taken yet" if asked.step > run.step else "metrics.jsonl does not tell what the run's was"
    else:
        says = "equal to what the run recorded"
        says = says if recorded == view.sample_hash else f"DIFFERENT from what the run recorded, {recorded:016x}"
    print(step_text(str(path), view, says, width), flush=True)
    if recorded not in (None, view.sample_hash):
        raise UserError(
            f"{path}: step {asked.step} was taken with other samples than these\n{_why(run, settings.data)}"
        )


def step_of_text(path: Path | str, asked: InspectRoot, width: int, cache_dir: str | None = None) -> None:
    """Print the samples that a run with these settings would take. `cache_dir` is for text at an address."""
    assert asked.step is not None
    if asked.global_batch is None or asked.sequence_length is None:
        raise UserError(
            "step=… is of a run, or needs the settings of one: global_batch and sequence_length, and ranks and seed "
            "where they are not 1 and 0\n"
            f"name a run, or set them: gptscale inspect {path} step={asked.step} global_batch=32 sequence_length=256"
        )
    for key, value in (("global_batch", asked.global_batch), ("sequence_length", asked.sequence_length)):
        if value < 1:
            raise UserError(f"{key}={value} is below 1\nset {key}=1 or more")
    if asked.verify and is_remote(str(path)):
        raise UserError(
            f"verify=true with step: of {path} nothing but the step's samples is read\nleave one of them out"
        )
    settings = TrainRoot(
        run=RunConfig(seed=asked.seed or 0),
        data=DataConfig(
            path=str(path), sequence_length=asked.sequence_length, verify=asked.verify, cache_dir=cache_dir
        ),
        train=TrainConfig(steps=asked.step, global_batch=asked.global_batch),
    )
    ranks = 1 if asked.ranks is None else asked.ranks
    view = view_step(settings, asked.step, ranks, asked.rank, asked.limit)
    print(step_text(str(path), view, "as metrics.jsonl of such a run would grow by", width))


def _why(run: RunRecord, data: DataConfig) -> str:
    """What changed since, as far as the run's facts tell."""
    for card in run.facts.data if run.facts else ():
        found = fetch_manifest(card.path, "train", cache_for(data, [card.path])).identity
        if found != card.identity:
            return (
                f"{card.path} is other text than it was (identity {card.identity[:12]}, now {found[:12]}): restore it"
            )
    return "config.yaml says something else than the run was trained with, or shards have changed: try verify=true"
