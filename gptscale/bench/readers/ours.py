"""gptscale's own: what a training rank does for its ids, but for the hash that proves which samples it used."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptscale.bench.readers.common import Batches, Work, cpu_seconds
from gptscale.bench.readers.tokenisers import Encoded
from gptscale.config.schema import CorpusConfig, DataConfig, SourceConfig, TokenizerConfig
from gptscale.config.step_plan import StepPlan
from gptscale.data.corpus import read_manifest
from gptscale.data.order import FULL
from gptscale.data.reads import reads_at_once
from gptscale.data.shards import SPLITS
from gptscale.data.stages import Mixture, StagedOrder, Track
from gptscale.data.stream import TrainingStream, rank_positions
from gptscale.flow import Batch
from gptscale.parallel.plain import ids_on_device, on_device
from gptscale.topology import split_batch

STEP_TOKENS = 1 << 19
"""Of an optimizer step: GPT-3 Small's batch (Brown et al., arXiv 2005.14165, table 2.1)."""


def build(work: Work) -> None:
    from gptscale.data.prepare import prepare as prepare_corpus  # which a rank that reads has no use for

    shutil.rmtree(work.folder, ignore_errors=True)
    source = SourceConfig(path=work.ids, format="tokens", end_of_text=work.end_of_text)
    data = DataConfig(sources=(source,), workers=1, heldout_fraction=0.01)
    prepare_corpus(data, TokenizerConfig(path=work.tokenizer), Path(work.folder))


def prepare(texts: list[str], tokenizer: str, target: str, workers: int) -> Encoded:
    """Prepare JSON lines as `gptscale prepare` does."""
    from gptscale.data.prepare import prepare as prepare_corpus

    sources = tuple(SourceConfig(path=text, format="jsonl") for text in texts)
    began_s, began_cpu_s = time.perf_counter(), cpu_seconds()
    data = DataConfig(sources=sources, workers=workers, heldout_fraction=0.05)
    prepare_corpus(data, TokenizerConfig(path=tokenizer), Path(target))
    wall_s, cpu_s = time.perf_counter() - began_s, cpu_seconds() - began_cpu_s
    manifests = [read_manifest(Path(target), split) for split in SPLITS]
    parts = [part for manifest in manifests for part in manifest.parts]
    return Encoded(sum(part.text_bytes for part in parts), sum(part.tokens for part in parts), wall_s, cpu_s)


class Reader:
    flags = f"full permutation; {STEP_TOKENS:,} tokens at a time, not hashed; no thread, as peers without workers"
    """And, once it is made, in which way rows are read here."""

    def __init__(self, work: Work, state: Any) -> None:
        corpora = (CorpusConfig(work.folder),)
        self._stream = TrainingStream(corpora, work.sequence_length, work.seed, document_mask=work.documents)
        self._step_batches = max(1, STEP_TOKENS // work.sequence_length // work.batch)
        self._rows = self._step_batches * work.batch
        self._plan = StepPlan(self._rows, work.sequence_length)
        self._split = split_batch(self._rows, work.batch, 1)
        self._taken: int = state or 0
        self.flags += "; rows read many at a call" if reads_at_once() else "; rows read ONE BY ONE: no io_submit here"

    def __iter__(self) -> Iterator[Batches]:
        for microbatches in self._steps(self._taken // self._step_batches):
            del microbatches[: self._taken % self._step_batches]
            while microbatches:  # nothing of one step is kept as the next is read
                self._taken += 1
                yield _tensors(microbatches.pop(0))

    def _steps(self, step: int) -> Iterator[list[Batch]]:
        while True:
            start = step * self._rows
            positions, counts = rank_positions(self._plan, self._split, 0, start)
            yield self._stream.batches.make(self._stream.read(positions), self._plan.length(start), counts)
            step += 1

    def state(self) -> Any:
        return self._taken


def _tensors(batch: Batch) -> Batches:
    host = torch.device("cpu")
    if batch.starts_BT is None:  # what peers' batches are; inputs and targets are views of it
        return (ids_on_device(batch, host),)
    inputs_BT, targets_BT, documents = on_device(batch, host)
    assert documents is not None
    return inputs_BT, targets_BT, documents.cu_seqlens, documents.positions


def order(samples: int) -> Any:
    """Keys of a permutation; the places of the first 4096 samples."""
    made = StagedOrder([Mixture(0, (Track("0" * 64, 4096, 0, samples),), (1.0,), True, "data.path")], FULL)
    made.locate(np.arange(4096))
    return made
