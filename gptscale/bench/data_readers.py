"""Who reads training data, and what was measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from gptscale.bench.data_turns import OURS, Say, Turns
from gptscale.bench.readers.common import COMPARED_BATCHES, Ordered, Pass, Resumed, Work
from gptscale.config.schema import BenchDataConfig
from gptscale.runtime.errors import UserError

ORDER_TOKENS, ORDER_LENGTH = 10**12, 4096
ORDER_SHARE = 50
"""A peer whose order takes room is asked for a fiftieth of it, and what it took is multiplied."""


@dataclass(frozen=True)
class ReaderContender:
    module: str
    """Of `gptscale.bench.readers`."""
    environment: str | None
    """Of `gptscale.bench.environments`; None: ours."""
    documents: bool = False
    order: Literal["whole", "share", "none"] = "share"
    """How much of the order of `ORDER_TOKENS` it is asked for."""

    @property
    def corpus(self) -> str:
        """Those that read the same files share them."""
        return {"huggingface_stream": "huggingface", "ours_feed": "ours"}.get(self.module, self.module)


READERS = {
    "gptscale": ReaderContender("ours", None, order="whole"),
    "gptscale+documents": ReaderContender("ours", None, documents=True, order="none"),
    "gptscale+thread": ReaderContender("ours_feed", None, order="none"),
    "memmap": ReaderContender("nanogpt", None, order="whole"),
    "mosaicml-streaming": ReaderContender("mosaicml", "mosaicml"),
    "litdata": ReaderContender("litdata", "litdata", order="none"),
    "hf-map": ReaderContender("huggingface", "huggingface"),
    "hf-stream": ReaderContender("huggingface_stream", "huggingface", order="whole"),
    "megatron-core": ReaderContender("megatron_core", "megatron_core"),
}


@dataclass
class ReaderSamples:
    """One entry a round."""

    passes: list[Pass] = field(default_factory=list)
    resumes: list[Resumed] = field(default_factory=list)
    order: Ordered | None = None

    @property
    def exact(self) -> bool:
        """Whether a resumed process read what the first would have read."""
        return all(one.digest == two.digest for one, two in zip(self.passes, self.resumes, strict=True))


@dataclass
class LargeSamples:
    """Of our own on a corpus of `ORDER_TOKENS` tokens. One entry a round."""

    shards: int
    passes: list[Pass] = field(default_factory=list)
    resumes: list[Resumed] = field(default_factory=list)
    """In the middle of an epoch."""


@dataclass
class ReadingSamples:
    readers: dict[str, ReaderSamples]
    large: LargeSamples
    limits: dict[str, list[float]]
    """Tokens a second of what no reader can do without, by round."""


def measure_readers(
    turns: Turns, bench: BenchDataConfig, common: Work, names: Sequence[str], say: Say
) -> ReadingSamples:
    """`common` is the work of all, but for the folder of each. Raises UserError where there is too little to read, and
    NotAvailableError where ours fails."""
    # All of them read less than their corpus: of ours a hundredth is held out, others drop ends.
    batches = bench.tokens // bench.sequence_length // bench.batch * 97 // 100
    if batches < 4 * COMPARED_BATCHES:
        raise UserError(
            f"bench.tokens={bench.tokens:,} are {batches} batches: too few to measure\n"
            f"set bench.tokens to {8 * COMPARED_BATCHES * bench.batch * bench.sequence_length:,} or more"
        )
    samples = {name: ReaderSamples() for name in names}
    works = {name: _work(common, READERS[name]) for name in names}
    built: set[str] = set()
    for name in turns.taking_part(names):
        say(f"{name}: its own format, and its order of {ORDER_TOKENS:.0e} tokens")
        reader = READERS[name]
        with turns.leaving_out(name):
            if reader.corpus not in built:
                turns.take(reader.environment, reader.module, "build", work=works[name])
                built.add(reader.corpus)
            if reader.order != "none":
                asked = ORDER_TOKENS // ORDER_LENGTH // (1 if reader.order == "whole" else ORDER_SHARE)
                samples[name].order = turns.take(reader.environment, reader.module, "order", samples=asked)
    large_work = replace(works[OURS], folder=works[OURS].folder + "-large")
    shards = turns.take(None, "ours_large", "make", work=large_work, small=works[OURS].folder, tokens=ORDER_TOKENS)
    found = ReadingSamples(samples, LargeSamples(shards), {})
    for number in range(bench.rounds):
        say(f"readers: round {number + 1} of {bench.rounds}")
        for limit, rate in turns.take(None, "limits", "measure", work=common).items():
            found.limits.setdefault(limit, []).append(rate)
        for name in turns.taking_part(names, number):
            with turns.leaving_out(name):
                _turn(turns, READERS[name], works[name], batches, samples[name])
        _large_turn(turns, large_work, found.large)
    for name in turns.left_out:
        samples.pop(name, None)
    return found


def _turn(turns: Turns, reader: ReaderContender, work: Work, batches: int, samples: ReaderSamples) -> None:
    environment, module = reader.environment, reader.module
    read, state = turns.take(environment, module, "pass", work=work, batches=batches, resume_at=batches // 2)
    resumed = turns.take(environment, module, "resume", work=work, state=state)
    samples.passes.append(read)
    samples.resumes.append(resumed)


def _large_turn(turns: Turns, work: Work, samples: LargeSamples) -> None:
    batches, middle = 100 * COMPARED_BATCHES, ORDER_TOKENS // work.sequence_length // work.batch // 2
    read, _ = turns.take(None, "ours_large", "pass", work=work, batches=batches, resume_at=batches // 3)
    samples.passes.append(read)
    samples.resumes.append(turns.take(None, "ours_large", "resume", work=work, state=middle))


def _work(common: Work, reader: ReaderContender) -> Work:
    folder = Path(common.ids).parent / "corpora" / reader.corpus
    return replace(common, folder=str(folder), documents=reader.documents)
