"""Which documents go into which shard, and what is written then: against the rule done by hand, one at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptscale.data import shard_plan
from gptscale.data.duplicates import EXACT, KEPT, new_marks
from gptscale.data.shard_plan import Tokenised, plan_shards
from gptscale.data.shard_writing import ShardJob, find_written, write_shard
from gptscale.data.shards import END_DTYPE, file_xxh3_128

SIZES = st.lists(st.lists(st.integers(1, 12), max_size=12), min_size=1, max_size=5)
"""Of each part its documents' tokens."""


def by_hand(documents: list[list[int]], shard_tokens: int) -> list[list[list[int]]]:
    """Shards of documents of token ids: a shard is full where the next does not fit; only what is longer than a whole
    shard is cut."""
    shards: list[list[list[int]]] = [[]]
    for document in documents:
        rest = document
        while len(rest) > shard_tokens - sum(map(len, shards[-1])):
            if not shards[-1]:
                shards[-1].append(rest[:shard_tokens])
                rest = rest[shard_tokens:]
            shards.append([])
        if rest:
            shards[-1].append(rest)
    return [shard for shard in shards if shard]


def spilled(folder: Path, parts: list[list[int]]) -> tuple[list[Tokenised], list[list[int]]]:
    """Parts with such documents as files, and the documents: each token another number."""
    found, documents, token, place = [], [], 0, 0
    for number, sizes in enumerate(parts):
        tokens, ends = folder / f"{number}.tok", folder / f"{number}.end"
        for size in sizes:
            documents.append(list(range(token, token + size)))
            token += size
        own = documents[place:]
        np.array([one for document in own for one in document], dtype=np.uint16).tofile(tokens)
        np.cumsum(sizes).astype(END_DTYPE).tofile(ends)
        found.append(Tokenised(tokens, ends, file_xxh3_128(tokens), file_xxh3_128(ends), place))
        place = len(documents)
    return found, documents


@settings(max_examples=150, deadline=None)
@given(parts=SIZES, shard_tokens=st.integers(1, 40), removed=st.sets(st.integers(0, 59)), at_once=st.integers(1, 5))
def test_shards_are_those_of_the_rule(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], shard_tokens: int, removed: set[int], at_once: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    sources, documents = spilled(folder, parts)
    marks = new_marks(len(documents), folder / "marks")
    for number in removed & set(range(len(documents))):
        marks[number] = EXACT
    marks.flush()
    expected = by_hand([one for one, mark in zip(documents, marks, strict=False) if mark == KEPT], shard_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_plan, "_DOCUMENTS_AT_ONCE", at_once)
        plans = plan_shards(sources, marks, shard_tokens)
        jobs = [
            ShardJob(
                f"shard-{number:05d}",
                plan,
                {stretch.source: sources[stretch.source] for stretch in plan.stretches},
                folder / "marks",
                "<u2",
                folder,
                folder / f"{number}.json",
            )
            for number, plan in enumerate(plans)
        ]
        written = {job.name: write_shard(job) for job in reversed(jobs)}  # in any order
    assert len(plans) == len(expected)
    for job, wanted in zip(jobs, expected, strict=True):
        shard = written[job.name]
        tokens, ends = (np.load(folder / f"{job.name}.{kind}.npy") for kind in ("tok", "end"))
        assert tokens.tolist() == [token for document in wanted for token in document]
        assert ends.tolist() == np.cumsum([len(document) for document in wanted]).tolist()
        assert (shard.tokens, shard.documents) == (len(tokens), len(ends)) == (job.plan.tokens, job.plan.documents)
        assert shard.token_xxh3_128 == file_xxh3_128(folder / f"{job.name}.tok.npy")
        assert shard.end_xxh3_128 == file_xxh3_128(folder / f"{job.name}.end.npy")
        assert find_written(job) == shard


def test_a_plan_grows_with_parts_and_shards_not_with_documents(tmp_path: Path) -> None:
    sources, _ = spilled(tmp_path, [[3] * 2000, [2] * 3000])
    plans = plan_shards(sources, None, 5000)
    assert len(plans) == 3
    assert sum(len(plan.stretches) for plan in plans) == 4
