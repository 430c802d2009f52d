"""Prepared text as training batches: the rows of any positions, and a feed that keeps a few steps ahead.

Shape legend: N positions, B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from gptscale.config.schema import CorpusConfig
from gptscale.config.step_plan import StepPlan
from gptscale.data.cache import ShardCache, Wanted
from gptscale.data.order import ALGORITHM, Ints, Located, SampleOrder
from gptscale.data.read_ahead import ReadAhead
from gptscale.data.remote import AnyCorpus, open_corpus
from gptscale.data.remote_rows import RemoteRowReader, row_reader
from gptscale.data.rows import document_starts
from gptscale.data.transfer import Check, go_on
from gptscale.flow import Batch
from gptscale.runtime.errors import UserError
from gptscale.topology import BatchSplit

_STEPS_AHEAD = 4
_WINDOW = 4096


class TrainingStream:
    """The endless sequence of training samples: position → row, the same for every rank and layout."""

    def __init__(
        self,
        corpora: tuple[CorpusConfig, ...],
        sequence_length: int,
        seed: int,
        verify: bool = False,
        document_mask: bool = False,
        cache: ShardCache | None = None,
    ) -> None:
        """Opens and checks the `train` split of every corpus; `verify` also hashes their shards. Raises UserError.

        With `document_mask` batches say where documents begin. `cache` is for corpora at an address.
        """
        opened = [open_corpus(corpus.path, "train", verify, cache) for corpus in corpora]
        _refuse_mixed_tokenizers(opened)
        self._readers = [row_reader(corpus, sequence_length) for corpus in opened]
        for corpus, reader in zip(opened, self._readers, strict=True):
            if reader.count == 0:
                raise UserError(
                    f"{corpus.folder}: no shard holds one sample of data.sequence_length={sequence_length} tokens\n"
                    "set a shorter data.sequence_length, or prepare more text"
                )
        total_weight = sum(corpus.weight for corpus in corpora)
        shares = tuple(corpus.weight / total_weight for corpus in corpora)
        self.shares = shares
        """Of the samples, each corpus's."""
        order = SampleOrder(tuple(reader.count for reader in self._readers), shares, seed)
        self._window = lru_cache(maxsize=4)(lambda number: order.locate(np.arange(_WINDOW) + number * _WINDOW))
        self.sequence_length = sequence_length
        self.document_mask = document_mask
        self.vocab_size: int = opened[0].manifest.vocab_size
        self.end_of_text: int = opened[0].manifest.end_of_text
        self.tokenizer_path: Path = opened[0].tokenizer_path
        self.tokenizer_sha256: str = opened[0].manifest.tokenizer_sha256
        self.samples_per_epoch: int = sum(reader.count for reader in self._readers)
        """Samples of all corpora together; of one corpus, the positions after which it is read again in a new order."""
        self.identity: dict[str, Any] = {
            "algorithm": ALGORITHM,
            "seed": seed,
            "sequence_length": sequence_length,
            "corpora": [
                {"manifest": corpus.manifest.identity, "share": share}
                for corpus, share in zip(opened, shares, strict=True)
            ],
        }
        """All that decides which tokens a position gives: runs with equal identities see equal samples. JSON."""

    def rows(self, positions: Ints) -> npt.NDArray[Any]:
        """Token ids of the samples at `positions` [N]: [N, T+1], uint16 or uint32 as stored."""
        located = self._located(positions)
        if len(self._readers) == 1:
            return self._readers[0].read(located.sample)[0]
        out_NT = np.empty((len(positions), self.sequence_length + 1), dtype=self._readers[0].corpus.manifest.dtype)
        for number in np.unique(located.corpus).tolist():
            of_corpus = located.corpus == number
            out_NT[of_corpus] = self._readers[number].read(located.sample[of_corpus])[0]
        return out_NT

    def wanted(self, positions: Ints) -> list[Wanted]:
        """The shards in stores that hold the samples at `positions`, each once."""
        located = self._located(positions)
        return [
            wanted
            for number, reader in enumerate(self._readers)
            if isinstance(reader, RemoteRowReader)
            for wanted in reader.wanted(located.sample[located.corpus == number])
        ]

    def check_while_waiting(self, check: Check) -> None:
        """Ask `check` from now on while a shard of a store is waited for; what it raises ends that."""
        for reader in self._readers:
            if isinstance(reader, RemoteRowReader):
                reader.check = check

    @property
    def cache(self) -> ShardCache | None:
        """Where shards of stores come to; None where all corpora are here."""
        return next((one.corpus.cache for one in self._readers if isinstance(one, RemoteRowReader)), None)

    def starts(self, inputs_BT: npt.NDArray[Any]) -> torch.Tensor | None:
        """Where documents begin in these inputs, as `Batch.starts_BT` has it; None without document masks."""
        return torch.from_numpy(document_starts(inputs_BT, self.end_of_text)) if self.document_mask else None

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _located(self, positions: Ints) -> Located:
        """The order of whole windows is worked out at once, which costs little more than that of a few positions."""
        if not len(positions):
            return self._window(0).take(positions)
        windows, which = np.unique(positions // _WINDOW, return_inverse=True)
        found = [self._window(number) for number in windows.tolist()]
        return Located(
            corpus=np.concatenate([window.corpus for window in found]),
            epoch=np.concatenate([window.epoch for window in found]),
            sample=np.concatenate([window.sample for window in found]),
        ).take(which * _WINDOW + positions % _WINDOW)


def _refuse_mixed_tokenizers(opened: list[AnyCorpus]) -> None:
    first = opened[0]
    for corpus in opened[1:]:
        if corpus.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise UserError(
                f"data.path: {corpus.folder} and {first.folder} were prepared with different tokenizers\n"
                f"prepare both with tokenizer.path={first.tokenizer_path}"
            )


def sample_hash(positions: Ints, rows_NT: npt.NDArray[Any]) -> int:
    """Sum mod 2⁶⁴ over samples of xxh3_64(position as uint64 ‖ row as uint32), little-endian.

    A sum does not depend on which rank or micro-batch held a sample, so that ranks add theirs up.
    """
    row_bytes = 4 * rows_NT.shape[1]
    packed = np.empty((len(positions), 8 + row_bytes), dtype=np.uint8)
    packed[:, :8] = positions.astype("<u8")[:, None].view(np.uint8)
    packed[:, 8:] = np.ascontiguousarray(rows_NT, dtype="<u4").view(np.uint8)
    return sum(xxhash.xxh3_64_intdigest(one.data) for one in packed) % (1 << 64)


class _ClosedError(Exception):
    """The feed was closed while its thread was at work."""


@dataclass(frozen=True)
class StepData:
    """What one data rank feeds into one optimizer step."""

    start: int
    """Position of the global batch's first sample, the same on every rank."""
    microbatches: list[Batch]
    sample_hash: int
    """Of this rank's samples; summed over data ranks mod 2⁶⁴ it is the step's."""
    wait_s: float
    """How long the caller had to wait for it."""


class StepFeed(Iterator[StepData]):
    """Steps without end from position `start`, made ready by one thread a few steps ahead.

    A step takes the next positions, as many as `plan` says, and this rank `split.of(…).rows(data_rank)` of them. An
    error in the thread is raised by `next`. Close it, or use it as a context.
    """

    def __init__(self, stream: TrainingStream, plan: StepPlan, split: BatchSplit, data_rank: int, start: int) -> None:
        self._stream = stream
        self._plan = plan
        self._split = split
        self._data_rank = data_rank
        self._pin = torch.cuda.is_available()
        self._ready: queue.Queue[tuple[int, list[Batch], int] | BaseException] = queue.Queue(_STEPS_AHEAD)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        stream.check_while_waiting(self._check)
        cache = stream.cache
        upcoming = (stream.wanted(self._positions(at)) for at in self._starts(start))
        self._ahead = None if cache is None else ReadAhead(cache, upcoming)
        self._thread = threading.Thread(target=self._work, args=(start,), daemon=True, name="training data")
        self._thread.start()

    def __next__(self) -> StepData:
        if self._failure is not None:
            raise self._failure
        assert not self._stop.is_set(), "the feed is closed"
        began_s = time.perf_counter()
        item = self._ready.get()
        wait_s = time.perf_counter() - began_s
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        start, microbatches, digest = item
        return StepData(start, microbatches, digest, wait_s)

    def close(self) -> None:
        """End the thread. Steps that are ready but were not taken are dropped; they count for nothing."""
        self._stop.set()
        if self._ahead is not None:
            self._ahead.close()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._stream.check_while_waiting(go_on)

    def __enter__(self) -> StepFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, start: int) -> None:
        try:
            for at in self._starts(start):
                self._check()
                if self._ahead is not None:
                    self._ahead.reached()
                self._ready.put(self._step(at))
        except BaseException as error:
            self._ready.put(error)

    def _check(self) -> None:
        if self._stop.is_set():
            raise _ClosedError

    def _starts(self, start: int) -> Iterator[int]:
        """Where the steps from `start` on begin."""
        while True:
            yield start
            start += self._plan.batch(start)

    def _positions(self, start: int) -> Ints:
        """Of this rank's samples in the step that begins at `start`."""
        rows = self._split.of(self._plan.batch(start)).rows(self._data_rank)
        return np.arange(start + rows.start, start + rows.stop, dtype=np.int64)

    def _step(self, start: int) -> tuple[int, list[Batch], int]:
        split = self._split.of(self._plan.batch(start))
        positions = self._positions(start)
        rows_NT = self._stream.rows(positions)
        size, length = split.micro_batch, self._plan.length(start)
        microbatches = [self._batch(rows_NT[first : first + size], length) for first in range(0, len(rows_NT), size)]
        return start, microbatches, sample_hash(positions, rows_NT)

    def _batch(self, rows_BT: npt.NDArray[Any], length: int) -> Batch:
        """Rows as sequences of `length` tokens: each row as it is, or cut into several."""
        inputs_BT = torch.from_numpy(rows_BT[:, :-1].astype(np.int64).reshape(-1, length))
        targets_BT = torch.from_numpy(rows_BT[:, 1:].astype(np.int64).reshape(-1, length))
        starts_BT = self._stream.starts(inputs_BT.numpy())
        if self._pin:
            inputs_BT, targets_BT = inputs_BT.pin_memory(), targets_BT.pin_memory()
            starts_BT = None if starts_BT is None else starts_BT.pin_memory()
        return Batch(inputs_BT, targets_BT, loss_tokens=targets_BT.numel(), starts_BT=starts_BT)
