"""`gptscale bench data`: how fast training data is read and made, beside other people's loaders and tokenizers.

Every figure is of a fresh process, one at a time, in rounds in which each contender has its turn; a peer's process runs
in an environment of its own. See `gptscale.bench.readers` for what is measured.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from gptscale.bench.data_readers import READERS, ReadingSamples, measure_readers
from gptscale.bench.data_tokenisers import TOKENISERS, measure_tokenisers
from gptscale.bench.data_turns import OURS, Say, Turns
from gptscale.bench.environment import Environment, describe_environment, load_average
from gptscale.bench.environments import default_folder, pinned
from gptscale.bench.readers.common import Work
from gptscale.bench.readers.tokenisers import Encoded
from gptscale.config.schema import BenchDataConfig, SourceConfig
from gptscale.data.sources import find_parts, read_part
from gptscale.runtime.errors import UserError
from gptscale.tokenizer.train import train_tokenizer

_END_OF_TEXT = 1
_DOCUMENT_TOKENS = 1000
"""On average, of the ids that are drawn at random."""


@dataclass(frozen=True)
class DataReport:
    bench: BenchDataConfig
    environment: Environment
    reading: ReadingSamples | None
    tokenisers: dict[str, list[Encoded]]
    versions: dict[str, str]
    """Of peers' packages."""
    left_out: dict[str, str]
    """Who took no part, and why."""


def bench_data(bench: BenchDataConfig, command: str, say: Say) -> DataReport:
    """Raises UserError where settings ask for what there is not, NotAvailableError where ours fails."""
    readers = _chosen(bench.readers, READERS, "bench.readers")
    tokenisers = _chosen(bench.tokenisers, TOKENISERS, "bench.tokenisers")
    _check(bench)
    load_at_start = load_average()
    environments = default_folder() if bench.environments is None else Path(bench.environments)
    with tempfile.TemporaryDirectory(prefix="gptscale-bench-", dir=bench.folder) as name:
        folder = Path(name)
        turns = Turns(folder, environments, say)
        say("making text, a tokenizer and token ids")
        texts = write_text(folder / "text", bench.text_bytes)
        train_tokenizer(_texts(texts), bench.vocab_size, folder / "tokenizer.model")
        work = write_ids(folder, bench)
        read = measure_readers(turns, bench, work, readers, say) if readers else None
        tokenised = measure_tokenisers(turns, bench, folder, texts, tokenisers, say) if tokenisers else {}
    return DataReport(
        bench=bench,
        environment=describe_environment(command, 1, 1, "cpu", False, load_at_start),
        reading=read,
        tokenisers=tokenised,
        versions=_versions([] if read is None else [*read.readers], [*tokenised]),
        left_out=turns.left_out,
    )


def _check(bench: BenchDataConfig) -> None:
    for key in ("rounds", "tokens", "sequence_length", "batch", "text_bytes"):
        if getattr(bench, key) < 1:
            raise UserError(f"bench.{key}={getattr(bench, key)} is below 1\nset bench.{key} to 1 or more")
    if bench.vocab_size > 1 << 16:
        raise UserError(
            f"bench.vocab_size={bench.vocab_size} does not fit ids of two bytes, which all readers are measured with\n"
            f"set it to {1 << 16} or less"
        )
    if bench.folder is not None and not Path(bench.folder).is_dir():
        raise UserError(f"bench.folder={bench.folder}: there is no such folder\nname one that exists")


def _chosen(names: Sequence[str], known: dict[str, Any], key: str) -> list[str]:
    for name in names:
        if name != "none" and name not in known:
            raise UserError(f"{key}: there is no '{name}'\nthere are: {', '.join(known)}, and none")
    if "none" in names:
        return []
    # Ours first: all others are compared with it.
    return [name for name in known if not names or name in names or name == OURS]


def write_text(folder: Path, text_bytes: int) -> list[str]:
    """`text_bytes` of source text as JSON lines in eight files: of the standard library, torch and sympy, some 80 MB,
    and from there on again and again."""
    sources = [SourceConfig(format="stdlib")]
    for package in ("torch", "sympy"):
        sources.append(SourceConfig(format="files", path=_folder(package), pattern="**/*.py"))
    parts = (part for source in sources for part in find_parts(source, "bench"))
    documents = (document.text for part in parts for document in read_part(part))
    folder.mkdir()
    paths = [folder / f"{number}.jsonl" for number in range(8)]
    files = [path.open("w", encoding="utf-8") for path in paths]
    written = 0
    for number, text in enumerate(cycle(documents)):
        files[number % len(files)].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        written += len(text.encode())
        if written >= text_bytes:
            break
    for file in files:
        file.close()
    return [str(path) for path in paths]


def _folder(package: str) -> str:
    """Where an installed package lies, without importing it."""
    found = importlib.util.find_spec(package)
    assert found is not None, f"{package} comes with torch, on which gptscale depends"
    assert found.submodule_search_locations, f"{package} is a folder"
    return found.submodule_search_locations[0]


def _texts(files: Sequence[str]) -> Iterator[str]:
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


def _versions(readers: Sequence[str], tokenisers: Sequence[str]) -> dict[str, str]:
    environments = {READERS[name].environment for name in readers} - {None}
    if any(not name.startswith(OURS) for name in tokenisers):
        environments.add("tokenisers")
    return {name: version for one in sorted(environments, key=str) for name, version in pinned(str(one)).items()}
