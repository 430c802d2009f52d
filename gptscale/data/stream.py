"""Prepared text as training batches: the rows of any positions, and a feed that keeps a few steps ahead.

Shape legend: N positions, B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from gptscale.config.schema import CorpusConfig
from gptscale.config.step_plan import StepPlan
from gptscale.data.batches import BatchMaker
from gptscale.data.cache import ShardCache, Wanted
from gptscale.data.mixture import mixture_table
from gptscale.data.order import FULL, Ints, Located, Shuffle
from gptscale.data.packed_rows import PackedRowReader, RemotePackedRowReader, packed_row_reader
from gptscale.data.packing import ALGORITHM
from gptscale.data.read_ahead import ReadAhead
from gptscale.data.remote import AnyCorpus, RemoteCorpus, open_corpus
from gptscale.data.remote_rows import RangeRowReader, RemoteRowReader, row_reader
from gptscale.data.rows import RowReader, Rows
from gptscale.data.stages import Mixture, StagedOrder, StageText, Track, with_copies
from gptscale.data.transfer import Check, go_on
from gptscale.flow import Batch
from gptscale.runtime.errors import UserError
from gptscale.topology import BatchSplit

_STEPS_AHEAD = 4
_WINDOW = 4096


class Traced(NamedTuple):
    """Where a sample comes from."""

    corpus: AnyCorpus
    epoch: int
    """How often all of the corpus was read before, from 0."""
    sample: int
    """Of the corpus, from 0."""
    shard: int
    """Its number in the manifest."""
    stretches: tuple[tuple[int, int], ...]
    """What it is made of, in order: first token in the shard, and tokens."""


class TrainingStream:
    """The endless sequence of training samples: position → row, the same for every rank and layout."""

    def __init__(
        self,
        corpora: tuple[CorpusConfig, ...],
        sequence_length: int,
        seed: int,
        verify: bool = False,
        document_mask: bool = False,
        shuffle: Shuffle = FULL,
        stages: Sequence[StageText] = (),
        exact: bool = True,
        packed: bool = False,
        boundary_loss: bool = True,
        cache: ShardCache | None = None,
        few: bool = False,
    ) -> None:
        """Opens and checks the `train` split of every corpus; `verify` also hashes their shards. Raises UserError.

        With `document_mask` batches say where documents begin; without `boundary_loss` their first tokens are no
        targets; rows are `packed` from whole documents, or cut from their concatenation. `cache` is for corpora at an
        address; with `few` no shard of these is fetched, but every row that is asked for.

        What is read from the start on comes first, and then, each from its own start on, what `stages` say. `exact` is
        of mixtures: see `mixture_table`.
        """
        texts = [StageText(0, corpora, sequence_length, seed), *stages]
        opened = _open(texts, verify, exact, packed, cache, few)
        mixtures, first = opened.mixtures, opened.mixtures[0]
        order = StagedOrder(mixtures, shuffle)
        self._readers = {number: opened.readers[track] for track, number in order.numbers.items()}
        self._remote = {
            number: reader
            for number, reader in self._readers.items()
            if isinstance(reader, RemoteRowReader | RemotePackedRowReader)
        }
        for reader in self._readers.values():
            reader.share_files(len(self._readers))
        self._packed = packed
        self._lengths = {number: track.sequence_length for track, number in order.numbers.items()}
        self._window = lru_cache(maxsize=4)(lambda number: order.locate(np.arange(_WINDOW) + number * _WINDOW))
        self.shares = first.weights
        """Of the samples before any stage, each corpus's."""
        self.sequence_length = sequence_length
        """Of samples before any stage."""
        corpus = self._readers[0].corpus
        self.vocab_size: int = corpus.manifest.vocab_size
        self.end_of_text: int = corpus.manifest.end_of_text
        self.tokenizer_path: Path = corpus.tokenizer_path
        self.tokenizer_sha256: str = corpus.manifest.tokenizer_sha256
        self.samples_per_epoch: int = sum(track.size for track in first.tracks)
        """Samples of all corpora together; of one corpus, the positions after which it is read again in a new order."""
        self.identity: dict[str, Any] = shuffle.identity | _identity(first)
        """All that decides which tokens a position gives: runs with equal identities see equal samples. JSON.

        `stages` is there only where there are any; up to a stage's `start` it may differ in that stage."""
        if packed:
            self.identity["packing"] = ALGORITHM
        self.batches = BatchMaker(self.end_of_text, document_mask, boundary_loss, pin=torch.cuda.is_available())
        """How its rows become batches."""
        if stages:
            self.identity["stages"] = [{"start": mixture.start} | _identity(mixture) for mixture in mixtures[1:]]

    def rows(self, positions: Ints) -> npt.NDArray[Any]:
        """Token ids of the samples at `positions` [N]: [N, T+1], uint16 or uint32 as stored."""
        return self.read(positions).tokens

    def read(self, positions: Ints) -> Rows:
        """The samples at `positions` [N], all of one length: they are not of stages that differ in it."""
        located = self._located(positions)
        if len(self._readers) == 1:
            return self._readers[0].rows(located.sample)
        numbers = np.unique(located.corpus).tolist()
        lengths = {self._lengths[number] for number in numbers} or {self.sequence_length}
        assert len(lengths) == 1, f"rows of {sorted(lengths)} tokens at once"
        shape = len(positions), lengths.pop() + 1
        tokens = np.empty(shape, dtype=self._readers[0].corpus.manifest.dtype)
        used = np.empty(shape[0], dtype=np.int64)
        starts = np.empty(shape if self._packed else (0, 0), dtype=np.int64)
        for number in numbers:
            of_corpus = located.corpus == number
            part = self._readers[number].rows(located.sample[of_corpus])
            tokens[of_corpus] = part.tokens
            if part.used is not None and part.starts is not None:
                used[of_corpus], starts[of_corpus] = part.used, part.starts
        return Rows(tokens, used, starts) if self._packed else Rows(tokens)

    def trace(self, positions: Ints) -> list[Traced]:
        """Where each sample comes from: for whoever looks at a step. Slower than reading it."""
        found = self._located(positions)
        traced = []
        for number, epoch, sample in np.stack([found.corpus, found.epoch, found.sample], axis=1).tolist():
            reader = self._readers[number]
            traced.append(Traced(reader.corpus, epoch, sample, *reader.stretches(sample)))
        return traced

    def wanted(self, positions: Ints) -> list[Wanted]:
        """The files in stores that hold the samples at `positions`, each once."""
        located = self._located(positions)
        return [
            wanted
            for number, reader in self._remote.items()
            for wanted in reader.wanted(located.sample[located.corpus == number])
        ]

    def check_while_waiting(self, check: Check) -> None:
        """Ask `check` from now on while a shard of a store is waited for; what it raises ends that."""
        for reader in self._remote.values():
            reader.check = check

    @property
    def cache(self) -> ShardCache | None:
        """Where shards of stores come to; None where all corpora are here."""
        return next((reader.corpus.cache for reader in self._remote.values()), None)

    @property
    def remote_bytes(self) -> int:
        """Of all training shards in stores together."""
        corpora = {reader.corpus.folder: reader.corpus for reader in self._remote.values()}
        return sum(shard.token_bytes for corpus in corpora.values() for shard in corpus.manifest.shards)

    @property
    def sequences_in_remote_shard(self) -> int:
        """How many sequences the largest shard in stores holds; 0 where all text is here."""
        return max((reader.most_in_shard for reader in self._remote.values()), default=0)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _located(self, positions: Ints) -> Located:
        """The order of whole windows is worked out at once, which costs little more than that of a few positions."""
        if not len(positions):
            return self._window(0).take(positions)
        (number, first), (last_number, last) = divmod(int(positions[0]), _WINDOW), divmod(int(positions[-1]), _WINDOW)
        if number == last_number and last - first == len(positions) - 1 and (np.diff(positions) == 1).all():
            return self._window(number).take(slice(first, last + 1))  # nearly always
        windows, which = np.unique(positions // _WINDOW, return_inverse=True)
        found = [self._window(number) for number in windows.tolist()]
        return Located(
            corpus=np.concatenate([window.corpus for window in found]),
            epoch=np.concatenate([window.epoch for window in found]),
            sample=np.concatenate([window.sample for window in found]),
        ).take(which * _WINDOW + positions % _WINDOW)


class _Opened(NamedTuple):
    mixtures: list[Mixture]
    readers: dict[Track, RowReader | PackedRowReader]


def _open(
    texts: Sequence[StageText], verify: bool, exact: bool, packed: bool, cache: ShardCache | None, few: bool
) -> _Opened:
    """The text of every stage, each folder opened once. Raises UserError."""
    paths = dict.fromkeys(corpus.path for text in texts for corpus in text.corpora)
    opened = {path: open_corpus(path, "train", verify, cache) for path in paths}
    _refuse_mixed_tokenizers(list(opened.values()))
    found = _Opened([], {})
    for text in texts:
        readers = [_reader(opened[corpus.path], text.sequence_length, verify, packed, few) for corpus in text.corpora]
        for reader in readers:
            if reader.count == 0:
                raise UserError(
                    f"{reader.corpus.folder}: no shard holds one sample of {text.setting}.sequence_length="
                    f"{text.sequence_length} tokens\nset a shorter one, or prepare more text"
                )
        tracks = with_copies(
            [
                Track(reader.corpus.manifest.identity, text.sequence_length, text.seed, reader.count)
                for reader in readers
            ]
        )
        for track, reader in zip(tracks, readers, strict=True):
            found.readers.setdefault(track, reader)
        total_weight = sum(corpus.weight for corpus in text.corpora)
        shares = tuple(corpus.weight / total_weight for corpus in text.corpora)
        found.mixtures.append(Mixture(text.start, tracks, shares, exact, f"{text.setting}.path"))
    return found


def _reader(
    corpus: AnyCorpus, sequence_length: int, verify: bool, packed: bool, few: bool
) -> RowReader | PackedRowReader:
    if packed:
        return packed_row_reader(corpus, sequence_length, verify, few)
    if few and isinstance(corpus, RemoteCorpus):
        return RangeRowReader(corpus, sequence_length)
    return row_reader(corpus, sequence_length)


def _identity(mixture: Mixture) -> dict[str, Any]:
    """What decides the samples of a stage, beside its start and the order's algorithm."""
    corpora = zip(mixture.tracks, mixture.weights, strict=True)
    algorithm = mixture_table(mixture.weights, mixture.exact).algorithm
    return {
        **({} if algorithm is None else {"mixture": algorithm}),
        "seed": mixture.tracks[0].seed,
        "sequence_length": mixture.tracks[0].sequence_length,
        "corpora": [{"manifest": track.corpus, "share": share} for track, share in corpora],
    }


def _refuse_mixed_tokenizers(opened: list[AnyCorpus]) -> None:
    first = opened[0]
    for corpus in opened[1:]:
        if corpus.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise UserError(
                f"data: {corpus.folder} and {first.folder} were prepared with different tokenizers\n"
                f"prepare both with tokenizer.path={first.tokenizer_path}"
            )


def sample_hash(positions: Ints, rows_NT: npt.NDArray[Any]) -> int:
    """Sum mod 2⁶⁴ over samples of xxh3_64(position as uint64 ‖ row as uint32), little-endian.

    A sum does not depend on which rank or micro-batch held a sample, so that ranks add theirs up.
    """
    hashed = np.empty((len(positions), 2 + rows_NT.shape[1]), dtype="<u4")
    hashed[:, :2] = positions.astype("<u8")[:, None].view("<u4")
    hashed[:, 2:] = rows_NT
    data, size = hashed.reshape(-1).view(np.uint8).data, hashed.shape[1] * 4
    digest = xxhash.xxh3_64_intdigest
    return sum([digest(data[place : place + size]) for place in range(0, len(data), size)]) % (1 << 64)


def rank_positions(plan: StepPlan, split: BatchSplit, data_rank: int, start: int) -> tuple[Ints, list[int]]:
    """Which positions a data rank feeds into the step that begins at position `start`, in order, and how many of them
    each of its micro-batches takes.

    `split` is how the run's full batch is cut. All ranks together feed the next `plan.batch(start)` positions.
    """
    now = plan.split(start, split)
    rows = now.rows(data_rank)
    positions = np.arange(start + rows.start, start + rows.stop, dtype=np.int64)
    whole, rest = divmod(len(rows), now.micro_batch)
    return positions, [now.micro_batch] * whole + [rest] * (rest > 0)


class _ClosedError(Exception):
    """The feed was closed while its thread was at work."""


def read_step(
    stream: TrainingStream, plan: StepPlan, split: BatchSplit, data_rank: int, start: int
) -> tuple[list[Batch], int]:
    """The micro-batches of a data rank in the step that begins at position `start`, and the hash of their samples."""
    positions, counts = rank_positions(plan, split, data_rank, start)
    found = stream.read(positions)
    microbatches = stream.batches.make(found, plan.length(start), counts)
    return microbatches, sample_hash(positions, found.tokens)


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

    A step takes the next positions, as many as `plan` says, and this rank `plan.split(…).rows(data_rank)` of them. An
    error in the thread is raised by `next`. Close it, or use it as a context.
    """

    def __init__(self, stream: TrainingStream, plan: StepPlan, split: BatchSplit, data_rank: int, start: int) -> None:
        self._stream = stream
        self._plan = plan
        self._split = split
        self._data_rank = data_rank
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
        return rank_positions(self._plan, self._split, self._data_rank, start)[0]

    def _step(self, start: int) -> tuple[int, list[Batch], int]:
        return start, *read_step(self._stream, self._plan, self._split, self._data_rank, start)
