"""Document lengths: exact against numpy, sampled where there are many, in the same memory however many."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptscale.data.corpus import Corpus, open_split
from gptscale.data.lengths import LengthBin, bin_edges, document_lengths
from gptscale.flow import Shard
from gptscale.runtime.errors import UserError
from tests.helpers.prepared import of_lengths


def split_of(folder: Path, shards: list[list[int]]) -> Corpus:
    return of_lengths(folder, [np.array(shard) for shard in shards])


@pytest.mark.parametrize("seed", range(6))
def test_lengths_are_those_of_all_documents(seed: int, tmp_path: Path) -> None:
    """Against numpy over all of them at once; some beyond what is counted one by one, and shards of one document."""
    draw = np.random.default_rng(seed)
    spread = float(draw.choice([0.1, 1.5, 4.0]))
    shards = [
        np.maximum(1, draw.lognormal(6, spread, size=int(draw.choice([1, 3, 4000, 70_000])))).astype(np.int64)
        for _ in range(4)
    ]
    found = document_lengths(of_lengths(tmp_path, shards))
    every = np.concatenate(shards)
    assert (found.documents, found.smallest, found.largest) == (len(every), every.min(), every.max())
    assert found.mean == pytest.approx(every.mean(), rel=1e-12)  # a float sum of integers, rounded once
    exact = [np.quantile(every, share, method="inverted_cdf") for share in (0.5, 0.9, 0.99)]
    assert [found.median, found.p90, found.p99] == exact
    for one in found.bins:
        within = every[(every >= one.low) & (every <= one.high)]
        assert (one.documents, one.tokens) == (len(within), within.sum())
    assert sum(one.documents for one in found.bins) == len(every)
    assert found.bins[0].documents > 0
    assert found.bins[-1].documents > 0


def test_edges() -> None:
    assert bin_edges(1) == [1, 2]
    assert bin_edges(100) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert bin_edges(99) == [1, 2, 5, 10, 20, 50, 100]


def test_one_document(tmp_path: Path) -> None:
    found = document_lengths(split_of(tmp_path, [[7]]))
    assert (found.smallest, found.median, found.mean, found.p99, found.largest) == (7, 7, 7.0, 7, 7)
    assert found.bins == (LengthBin(5, 9, 1, 7),)


def test_some_shards_stand_for_many(tmp_path: Path) -> None:
    """Spread evenly, and said; up to the limit every one is read."""
    corpus = split_of(tmp_path, [[10 + number] * 100 for number in range(20)])
    found = document_lengths(corpus, most_documents=500)
    assert (found.shards, found.of_shards, found.documents) == (5, 20, 500)
    assert (found.smallest, found.median, found.largest) == (12, 20, 28)
    assert document_lengths(corpus, most_documents=2000).shards == 20
    assert document_lengths(corpus, most_documents=1).shards == 1


def test_ends_that_are_not_in_order_are_named(tmp_path: Path) -> None:
    corpus = split_of(tmp_path, [[3, 4, 5]])
    ends = np.load(corpus.end_path(corpus.manifest.shards[0]))
    ends[1] = 2
    np.save(corpus.end_path(corpus.manifest.shards[0]), ends)
    with pytest.raises(UserError, match=r"shard-00000\.end\.npy of .*: document ends are not in order") as caught:
        document_lengths(corpus)
    assert len(str(caught.value).splitlines()) == 2


def test_a_prepared_folder(prepared: Path) -> None:
    corpus = open_split(prepared, "train")
    found = document_lengths(corpus)
    assert found.documents == sum(shard.documents for shard in corpus.manifest.shards)
    assert found.mean * found.documents == pytest.approx(corpus.manifest.tokens, rel=1e-12)


MEASURE = """
import json, sys, time, tracemalloc
from pathlib import Path
from gptscale.report.data_summary import read_summary
from gptscale.report.data_text import data_text

folder = Path(sys.argv[1])
read_summary(folder)  # what is made once: imports, numpy's tables
started = time.process_time()
tracemalloc.start()
data_text(read_summary(folder), 100)
peak = tracemalloc.get_traced_memory()[1]
mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if ".npy" in line]
print(json.dumps({"peak": peak, "cpu_s": time.process_time() - started, "mapped": len(mapped)}))
"""


def test_a_billion_tokens_are_summarised_at_once_and_in_the_same_memory(corpus: Path, tmp_path: Path) -> None:
    """A million and ten million documents, in sparse shards. Their ends are 8 MB and 80 MB: held, they would show."""
    peaks = []
    for documents_a_shard in (125_000, 1_250_000):
        folder = tmp_path / str(documents_a_shard)
        lengths = np.full(documents_a_shard, 125_000_000 // documents_a_shard)
        of_lengths(folder, [lengths] * 8, tokenizer=corpus / "tokenizer.model")
        done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        peaks.append(found["peak"])
        # 0.1 and 0.3 s on one EPYC core; one that is ten times as slow still answers at once.
        assert found["cpu_s"] < 3
        assert found["mapped"] <= 4, "files that were looked into are let go"
    # Buffers of 2.5 MiB. Holding the ends would add 72 MiB, holding those of one shard 9: neither would pass.
    assert abs(peaks[1] - peaks[0]) < 2 * 2**20, peaks
    assert max(peaks) < 8 * 2**20, peaks


def test_shards_of_the_helper_are_what_the_format_says(corpus: Path, tmp_path: Path) -> None:
    """Otherwise the tests above would measure something else."""
    of_lengths(tmp_path, [np.array([3, 1]), np.array([5])], tokenizer=corpus / "tokenizer.model")
    opened = open_split(tmp_path, "train", verify=True)
    assert [(shard.tokens, shard.documents) for shard in opened.manifest.shards] == [(4, 2), (5, 1)]
    assert isinstance(opened.manifest.shards[0], Shard)
