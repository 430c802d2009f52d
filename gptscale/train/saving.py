"""A run's state to a checkpoint and back."""

from __future__ import annotations

import logging
from pathlib import Path

from gptscale.checkpoint.read import Checkpoint
from gptscale.checkpoint.restore import restore_from, restore_newest
from gptscale.checkpoint.write import save_checkpoint
from gptscale.config.compose import Composed
from gptscale.config.schema import TrainRoot
from gptscale.parallel.engine import Engine
from gptscale.parallel.ranks import Ranks
from gptscale.train.progress import Progress
from gptscale.train.refusal import refuse_differences
from gptscale.train.resume import has_gone_on, named_checkpoint
from gptscale.train.run_folder import RunFolder
from gptscale.train.setup import Corpora

LOG = logging.getLogger("gptscale.train")


def save(
    composed: Composed[TrainRoot],
    engine: Engine,
    folder: RunFolder,
    progress: Progress,
    corpora: Corpora,
    ranks: Ranks,
) -> Path:
    """Write a checkpoint of where the run stands. A collective."""
    settings = composed.settings
    state = {
        "progress": progress.to_json(),
        "updates": engine.updates(),
        "loss_scaling": engine.loss_scaling(),
        "settings": composed.public,
        "resumed_from": named_checkpoint(settings.run.resume),
        "data": corpora.stream.identity,
        "vocab_size": corpora.vocab_size,
        "tokenizer_sha256": corpora.tokenizer_sha256,
    }
    layout = {"ranks": ranks.size, "parallel": composed.public["parallel"], "micro_batch": settings.train.micro_batch}
    return save_checkpoint(
        folder.checkpoints,
        progress.step,
        engine.pieces(),
        state=state,
        layout=layout,
        comm=ranks,
        keep=settings.checkpoint.keep,
        report=LOG.warning,
    )


def resume(
    composed: Composed[TrainRoot], engine: Engine, folder: RunFolder, corpora: Corpora, ranks: Ranks
) -> Progress:
    """Load what the settings say to go on from; the start of a run where there is nothing. A collective."""

    def refuse(checkpoint: Checkpoint) -> None:
        identity, tokenizer = corpora.stream.identity, corpora.tokenizer_sha256
        refuse_differences(str(folder.path), checkpoint.state, composed.public, identity, tokenizer, corpora.folders)

    wanted = composed.settings.run.resume
    pieces = engine.pieces()
    # Rank 0 says it for all: on a shared file system another may not see the newest checkpoint yet.
    if ranks.agree(ranks.rank != 0 or named_checkpoint(wanted) is None or has_gone_on(folder.checkpoints, wanted)):
        checkpoint = restore_newest(folder.checkpoints, pieces, ranks, LOG.warning, refuse)
    else:
        checkpoint = restore_from(Path(wanted), pieces, ranks, LOG.warning, refuse)
    if checkpoint is None:
        return Progress()
    engine.loaded(checkpoint.state["updates"], checkpoint.state.get("loss_scaling"))
    return Progress.from_json(checkpoint.state["progress"])
