"""Settings → torch's switches, the data, the model."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from gptscale.checkpoint.trained import COMPUTE_TYPES
from gptscale.config.schema import CorpusConfig, DataConfig, TrainRoot
from gptscale.data.heldout import HeldoutBatches, heldout_batches
from gptscale.data.prepare import corpus_folder
from gptscale.data.stream import TrainingStream
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.parallel.ranks import Ranks
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer


def prepare_torch(settings: TrainRoot) -> None:
    """Threads, and determinism where it is asked for."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if settings.run.deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def build_model(settings: TrainRoot, vocab_size: int) -> GPT:
    """The model on the CPU with its initial weights, the same on every layout."""
    model = GPT(settings.model, vocab_size, settings.data.sequence_length, COMPUTE_TYPES[settings.precision.compute])
    model.activation_checkpointing = settings.parallel.activation_checkpointing
    initialise(model, settings.run.seed)
    if settings.data.document_mask:
        check_blocks(model, settings.model.block)
    return model


def check_blocks(model: GPT, name: str) -> None:
    """Raises UserError where a block of the user's own knows nothing of documents."""
    if any("documents" not in inspect.signature(block.forward).parameters for block in model.blocks):
        raise UserError(
            f"data.document_mask=true, but the block {name} takes no documents\n"
            "give its forward an argument `documents`, as gptscale.model.gpt.Block has, or set data.document_mask=false"
        )


@dataclass(frozen=True)
class Corpora:
    """The prepared text of a run, as one rank reads it."""

    folders: tuple[CorpusConfig, ...]
    stream: TrainingStream
    heldout: HeldoutBatches
    """Of the first folder."""
    tokenizer_sha256: str

    @property
    def vocab_size(self) -> int:
        return self.stream.vocab_size


def open_corpora(settings: TrainRoot, ranks: Ranks) -> Corpora:
    """Open and check all prepared text. Raises UserError naming what is missing or damaged."""
    folders = corpus_configs(settings)
    length = settings.data.sequence_length
    documents = settings.data.document_mask
    stream = TrainingStream(folders, length, settings.run.seed, settings.data.verify, documents)
    heldout = heldout_batches(
        Path(folders[0].path),
        length,
        settings.train.micro_batch,
        settings.evaluation.sequences,
        ranks.rank,
        ranks.size,
        documents,
    )
    return Corpora(folders, stream, heldout, Tokenizer.load(stream.tokenizer_path).sha256)


def corpus_configs(settings: TrainRoot) -> tuple[CorpusConfig, ...]:
    """Where the prepared text is: `data.path`, else where `data.sources` were prepared."""
    data: DataConfig = settings.data
    if data.path is None:
        return (CorpusConfig(str(corpus_folder(data, settings.tokenizer))),)
    return (CorpusConfig(data.path),) if isinstance(data.path, str) else data.path
