"""`gptscale bench data`: how fast training data is read and made, beside other people's loaders and tokenizers.

Every figure is of a fresh process, one at a time, in rounds in which each contender has its turn; a peer's process runs
in an environment of its own. See `gptscale.bench.readers` for what is measured.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gptscale.bench.environment import Environment, describe_environment, load_average
from gptscale.bench.environments import NotAvailableError, default_folder, peer_python, pinned
from gptscale.bench.readers import run
from gptscale.bench.readers.common import COMPARED_BATCHES, Ordered, Pass, Resumed, Work
from gptscale.bench.readers.tokenisers import Encoded
from gptscale.config.schema import BenchDataConfig, SourceConfig
from gptscale.data.sources import find_parts, read_part
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import train_tokenizer

ORDER_TOKENS, ORDER_LENGTH = 10**12, 4096
ORDER_SHARE = 50
"""A peer whose order takes room is asked for a fiftieth of it, and what it took is multiplied."""
TURN_TIMEOUT_S = 900.0
_END_OF_TEXT = 1
_DOCUMENT_TOKENS = 1000
"""On average, of the ids that are drawn at random."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class ReaderContender:
    module: str
    """Of `gptscale.bench.readers`."""
    environment: str | None
    """Of `gptscale.bench.environments`; None: ours."""
    documents: bool = False
    steps_order: Literal["whole", "share", "none"] = "share"
    """How much of the order of `ORDER_TOKENS` it is asked for."""

    @property
    def corpus(self) -> str:
        """Those that read the same files share them."""
        return {"huggingface_stream": "huggingface", "ours_feed": "ours"}.get(self.module, self.module)


READERS = {
    "gptscale": ReaderContender("ours", None, steps_order="whole"),
    "gptscale+documents": ReaderContender("ours", None, documents=True, steps_order="none"),
    "gptscale+thread": ReaderContender("ours_feed", None, steps_order="none"),
    "memmap": ReaderContender("nanogpt", None, steps_order="whole"),
    "mosaicml-streaming": ReaderContender("mosaicml", "mosaicml"),
    "litdata": ReaderContender("litdata", "litdata", steps_order="none"),
    "hf-map": ReaderContender("huggingface", "huggingface"),
    "hf-stream": ReaderContender("huggingface_stream", "huggingface", steps_order="whole"),
    "megatron-core": ReaderContender("megatron_core", "megatron_core"),
}
OURS = "gptscale"
TOKENISERS = {
    "gptscale": "gptscale prepare, one process: reading, hashing and writing included",
    "gptscale×2": "the same, two processes",
    "sentencepiece": "sentencepiece alone, the same model: encode(documents, return_type='numpy', num_threads=1)",
    "tokenizers": "Hugging Face tokenizers, byte-level BPE: encode_batch_fast, RAYON_NUM_THREADS=1",
    "tiktoken": "tiktoken, the same byte-level BPE: encode_to_numpy",
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


@dataclass(frozen=True)
class DataReport:
    bench: BenchDataConfig
    environment: Environment
    readers: dict[str, ReaderSamples]
    large: LargeSamples | None
    limits: dict[str, list[float]]
    """Tokens a second of what no reader can do without, by round."""
    tokenisers: dict[str, list[Encoded]]
    versions: dict[str, str]
    """Of peers' packages."""
    left_out: dict[str, str]
    """Who took no part, and why."""


class Turns:
    """Processes of contenders, one at a time."""

    def __init__(self, folder: Path, environments: Path, say: Say) -> None:
        self._folder = folder
        self._environments = environments
        self._say = say
        self._pythons: dict[str, Path] = {}

    def python(self, environment: str | None) -> Path:
        """Raises NotAvailableError."""
        if environment is None:
            return Path(sys.executable)
        if environment not in self._pythons:
            self._pythons[environment] = peer_python(environment, self._environments, self._say)
        return self._pythons[environment]

    def take(self, environment: str | None, module: str, action: str, **request: Any) -> Any:
        """What the action answers. Raises NotAvailableError where its process fails."""
        asked, answer, log = (self._folder / name for name in ("request", "answer", "log"))
        asked.write_bytes(pickle.dumps(request))
        answer.unlink(missing_ok=True)
        command = [str(self.python(environment)), "-P", run.__file__, module, action, str(asked), str(answer)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with log.open("wb") as output:
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, timeout=TURN_TIMEOUT_S
                )
            except subprocess.TimeoutExpired as error:
                raise NotAvailableError(f"{action} took more than {TURN_TIMEOUT_S:g} s") from error
        if done.returncode:
            said = log.read_text(errors="replace").strip().splitlines() or [f"exit {done.returncode}"]
            raise NotAvailableError(f"{action} failed: {said[-1]}")
        return pickle.loads(answer.read_bytes())


def bench_data(bench: BenchDataConfig, command: str, say: Say) -> DataReport:
    """Raises UserError where settings ask for what there is not, NotAvailableError where ours fails."""
    readers = _chosen(bench.readers, READERS, "bench.readers")
    tokenisers = _chosen(bench.tokenisers, TOKENISERS, "bench.tokenisers")
    load_at_start = load_average()
    environments = default_folder() if bench.environments is None else Path(bench.environments)
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="gptscale-bench-", dir=bench.folder) as name:
        folder = Path(name)
        turns = Turns(folder, environments, say)
        say("making text, a tokenizer and token ids")
        texts = write_text(folder / "text", bench.text_bytes)
        train_tokenizer(_texts(texts), bench.vocab_size, folder / "tokenizer.model")
        work = write_ids(folder, bench)
        read = _read(turns, bench, work, readers, left_out, say) if readers else ({}, {}, None)
        tokenised = _tokenise(turns, bench, folder, texts, tokenisers, left_out, say) if tokenisers else {}
    return DataReport(
        bench=bench,
        environment=describe_environment(command, 1, 1, "cpu", False, load_at_start),
        readers=read[0],
        limits=read[1],
        large=read[2],
        tokenisers=tokenised,
        versions=_versions([*read[0]], [*tokenised]),
        left_out=left_out,
    )


def _chosen(names: Sequence[str], known: dict[str, Any], key: str) -> list[str]:
    for name in names:
        if name != "none" and name not in known:
            raise UserError(f"{key}: there is no '{name}'\nthere are: {', '.join(known)}, and none")
    if "none" in names:
        return []
    # Ours first: all others are compared with it.
    return [name for name in known if not names or name in names or name == OURS]


def write_text(folder: Path, text_bytes: int) -> list[str]:
    """The standard library's source text as JSON lines, again and again up to `text_bytes`, in eight files."""
    documents = [
        document.text for part in find_parts(SourceConfig(format="stdlib"), "bench") for document in read_part(part)
    ]
    folder.mkdir()
    paths = [folder / f"{number}.jsonl" for number in range(8)]
    files = [path.open("w", encoding="utf-8") for path in paths]
    written = number = 0
    while written < text_bytes:
        text = documents[number % len(documents)]
        files[number % len(files)].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        written += len(text.encode())
        number += 1
    for file in files:
        file.close()
    return [str(path) for path in paths]


def _texts(files: Sequence[str]) -> Any:
    """Those that the tokenizers are trained on."""
    for file in files[:1]:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def write_ids(folder: Path, bench: BenchDataConfig) -> Work:
    generator = np.random.default_rng(0)
    ids = generator.integers(2, bench.vocab_size, bench.tokens).astype(np.uint16)
    ids[generator.random(bench.tokens) < 1 / _DOCUMENT_TOKENS] = _END_OF_TEXT
    ids[-1] = _END_OF_TEXT
    ids.tofile(folder / "ids.bin")
    (np.flatnonzero(ids == _END_OF_TEXT) + 1).astype(np.int64).tofile(folder / "ends.bin")
    return Work(
        folder="",
        ids=str(folder / "ids.bin"),
        ends=str(folder / "ends.bin"),
        end_of_text=_END_OF_TEXT,
        tokenizer=str(folder / "tokenizer.model"),
        sequence_length=bench.sequence_length,
        batch=bench.batch,
        seed=0,
    )


def _read(
    turns: Turns, bench: BenchDataConfig, common: Work, names: Sequence[str], left_out: dict[str, str], say: Say
) -> tuple[dict[str, ReaderSamples], dict[str, list[float]], LargeSamples]:
    # All of them read less than their corpus: of ours a hundredth is held out, others drop ends.
    batches = bench.tokens // bench.sequence_length // bench.batch * 97 // 100
    if batches < 4 * COMPARED_BATCHES:
        raise UserError(
            f"bench.tokens={bench.tokens:,} are {batches} batches: too few to measure\n"
            f"set bench.tokens to {8 * COMPARED_BATCHES * bench.batch * bench.sequence_length:,} or more"
        )
    samples = {name: ReaderSamples() for name in names}

    def attempt(name: str, action: Callable[[], None]) -> None:
        """What a peer cannot do leaves it out; what ours cannot do is an error."""
        if name in left_out:
            return
        try:
            action()
        except NotAvailableError as error:
            if READERS[name].environment is None:
                raise
            left_out[name] = str(error)
            samples.pop(name)
            say(f"not run: {name}: {error}")

    built: set[str] = set()

    def build(contender: ReaderContender) -> None:
        if contender.corpus not in built:
            turns.take(contender.environment, contender.module, "build", work=_work(common, contender))
            built.add(contender.corpus)

    def order(name: str, contender: ReaderContender) -> None:
        if contender.steps_order != "none":
            whole = ORDER_TOKENS // ORDER_LENGTH
            asked = whole if contender.steps_order == "whole" else whole // ORDER_SHARE
            samples[name].order = turns.take(contender.environment, contender.module, "order", samples=asked)

    def turn(name: str, contender: ReaderContender) -> None:
        work = _work(common, contender)
        read, state = turns.take(
            contender.environment, contender.module, "pass", work=work, batches=batches, resume_at=batches // 2
        )
        resumed = turns.take(contender.environment, contender.module, "resume", work=work, state=state)
        samples[name].passes.append(read)
        samples[name].resumes.append(resumed)

    for name in names:
        say(f"{name}: its own format, and its order of {ORDER_TOKENS:.0e} tokens")
        attempt(name, lambda name=name: build(READERS[name]))  # type: ignore[misc]
        attempt(name, lambda name=name: order(name, READERS[name]))  # type: ignore[misc]
    large_work = _work(common, ReaderContender("ours_large", None))
    small = _work(common, READERS[OURS]).folder
    large = LargeSamples(turns.take(None, "ours_large", "make", work=large_work, small=small, tokens=ORDER_TOKENS))
    middle = ORDER_TOKENS // bench.sequence_length // bench.batch // 2
    bounds: dict[str, list[float]] = {}
    for number in range(bench.rounds):
        say(f"readers: round {number + 1} of {bench.rounds}")
        for limit, rate in turns.take(None, "limits", "measure", work=common).items():
            bounds.setdefault(limit, []).append(rate)
        for name in _rotated(names, number):
            attempt(name, lambda name=name: turn(name, READERS[name]))  # type: ignore[misc]
        read, _ = turns.take(None, "ours_large", "pass", work=large_work, batches=3 * COMPARED_BATCHES, resume_at=8)
        large.passes.append(read)
        large.resumes.append(turns.take(None, "ours_large", "resume", work=large_work, state=middle))
    return samples, bounds, large


def _work(common: Work, contender: ReaderContender) -> Work:
    folder = Path(common.ids).parent / "corpora" / contender.corpus
    return replace(common, folder=str(folder), documents=contender.documents)


def _rotated(names: Sequence[str], number: int) -> list[str]:
    """Another one goes first in every round."""
    first = number % len(names) if names else 0
    return [*names[first:], *names[:first]]


def _tokenise(
    turns: Turns,
    bench: BenchDataConfig,
    folder: Path,
    texts: list[str],
    names: Sequence[str],
    left_out: dict[str, str],
    say: Say,
) -> dict[str, list[Encoded]]:
    found: dict[str, list[Encoded]] = {name: [] for name in names}
    sentencepiece, byte_level = str(folder / "tokenizer.model"), str(folder / "tokenizer.json")

    def encoded(name: str) -> Encoded:
        if name.startswith(OURS):
            target, workers = folder / "prepared", 2 if name.endswith("×2") else 1
            shutil.rmtree(target, ignore_errors=True)
            answer: Encoded = turns.take(
                None, "ours", "prepare", texts=texts, tokenizer=sentencepiece, target=str(target), workers=workers
            )
            return answer
        model = sentencepiece if name == "sentencepiece" else byte_level
        answer = turns.take("tokenisers", "tokenisers", "encode", kind=name, model=model, text_files=texts)
        return answer

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except NotAvailableError as error:
            if name.startswith(OURS):
                raise
            left_out[name] = str(error)
            del found[name]
            say(f"not run: {name}: {error}")

    byte_level_ones = [name for name in names if name in ("tokenizers", "tiktoken")]
    for name in byte_level_ones:
        if not Path(byte_level).exists():
            say("training a byte-level tokenizer of the same size")
            attempt(
                name,
                lambda: turns.take(
                    "tokenisers",
                    "tokenisers",
                    "train_byte_level",
                    text_files=texts[:1],
                    vocab_size=bench.vocab_size,
                    target=byte_level,
                ),
            )
    for number in range(bench.rounds):
        say(f"tokenizers: round {number + 1} of {bench.rounds}")
        for name in _rotated(names, number):
            if name in found:
                attempt(name, lambda name=name: found[name].append(encoded(name)))  # type: ignore[misc]
    return found


def _versions(readers: Sequence[str], tokenisers: Sequence[str]) -> dict[str, str]:
    environments = {READERS[name].environment for name in readers} - {None}
    if any(not name.startswith(OURS) for name in tokenisers):
        environments.add("tokenisers")
    return {name: version for one in sorted(environments, key=str) for name, version in pinned(str(one)).items()}
