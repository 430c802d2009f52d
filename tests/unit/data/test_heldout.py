from __future__ import annotations

import itertools
import json
import math
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.heldout import HeldoutBatches, heldout_sources
from gptscale.data.prepare import prepare
from gptscale.data.shards import MANIFEST
from gptscale.flow import IGNORED_TARGET
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer
from tests.helpers.batches import wide
from tests.unit.data.test_stream import starts_by_definition


def pairs(folder: Path, length: int, limit: int) -> list[tuple[int, int]]:
    """(input, target) of every target, by definition: rows of each shard in order, the last one shorter; where there is
    a limit every k-th, counted in fractions."""
    rows = []
    for path in sorted((folder / "heldout").glob("*.tok.npy")):
        tokens = np.load(path).tolist()
        rows += [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]
    if limit and limit < len(rows):
        rows = [
            row for n, row in enumerate(rows) if any(n == int(k * Fraction(len(rows), limit)) for k in range(limit))
        ]
        assert len(rows) == limit
    return [pair for row in rows for pair in itertools.pairwise(row)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("length", "limit"), [(32, 0), (32, 7), (32, 1), (1000, 0), (100_000, 0)])
def test_ranks_together_see_every_target_once(prepared: Path, ranks: int, length: int, limit: int) -> None:
    found: list[tuple[int, int]] = []
    by_rank = [HeldoutBatches(prepared, length, 3, limit, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in by_rank}) == 1
    for batches in by_rank:
        seen = list(map(wide, batches))
        assert len(seen) == len(batches)
        for batch in seen:
            assert batch.inputs_BT.shape == batch.targets_BT.shape == (3, length)
            assert batch.inputs_BT.dtype == batch.targets_BT.dtype == torch.int64
            assert batch.inputs_BT.min() >= 0
            real = batch.targets_BT != IGNORED_TARGET
            assert batch.loss_tokens == int(real.sum())
            found += zip(batch.inputs_BT[real].tolist(), batch.targets_BT[real].tolist(), strict=True)
    expected = pairs(prepared, length, limit)
    assert sorted(found) == sorted(expected)
    assert {batches.loss_tokens for batches in by_rank} == {len(expected)}
    if ranks == 1:
        assert found == expected


def test_bits_per_byte_are_of_the_bytes_that_the_targets_stand_for(prepared: Path) -> None:
    batches = HeldoutBatches(prepared, 64, 4, 5, 0, 1)
    tokenizer = Tokenizer.load(prepared / "tokenizer.model")
    text = tokenizer.decode_bytes([target for _, target in pairs(prepared, 64, 5)])
    assert batches.text_bytes == len(text)
    # A model that knows nothing but the 256 bytes and ends of text: ln(256) a byte is 8 bits.
    loss = math.log(256) * len(text) / batches.loss_tokens
    assert batches.bits_per_byte(loss) == pytest.approx(8.0)


def test_the_batches_can_be_read_again(prepared: Path) -> None:
    batches = HeldoutBatches(prepared, 32, 4, 10, 0, 2)
    for first, second in zip(map(wide, batches), map(wide, batches), strict=True):
        assert torch.equal(first.inputs_BT, second.inputs_BT)


def test_batches_say_where_documents_begin(prepared: Path) -> None:
    end_of_text = Tokenizer.load(prepared / "tokenizer.model").end_of_text
    masked = list(map(wide, HeldoutBatches(prepared, 200, 4, 10, 0, 1, document_mask=True)))
    for batch, without in zip(masked, map(wide, HeldoutBatches(prepared, 200, 4, 10, 0, 1)), strict=True):
        assert torch.equal(batch.inputs_BT, without.inputs_BT)
        assert without.starts_BT is None
        assert batch.starts_BT is not None
        assert batch.starts_BT.tolist() == starts_by_definition(batch.inputs_BT, end_of_text)
    assert any((batch.starts_BT > 0).any() for batch in masked if batch.starts_BT is not None)


def test_an_unfinished_heldout_part_is_refused(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "corpus")
    (tmp_path / "corpus/heldout" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"heldout/manifest\.json"):
        HeldoutBatches(tmp_path / "corpus", 32, 4, 0, 0, 1)


@pytest.fixture(scope="module")
def of_two_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters, and half as many documents of digits, in one folder of many shards."""
    folder = tmp_path_factory.mktemp("sources")
    for name, words, documents in (("letters", "abc def ghi", 200), ("digits", "123 456 789", 100)):
        lines = [json.dumps({"text": " ".join([words] * 40) + f" {number}"}) for number in range(documents)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    sources = (
        SourceConfig(path=str(folder / "letters.jsonl")),
        SourceConfig(path=str(folder / "digits.jsonl"), name="my numbers"),
    )
    data = DataConfig(sources=sources, heldout_fraction=0.3, workers=1, shard_tokens=2000)
    prepare(data, TokenizerConfig(vocab_size=300), folder / "corpus")
    return folder / "corpus"


def test_a_few_sequences_are_of_all_sources(of_two_sources: Path) -> None:
    """The first of them would be of the first source alone, whatever the order of sources is."""
    tokenizer = Tokenizer.load(of_two_sources / "tokenizer.model")
    (batch,) = map(wide, HeldoutBatches(of_two_sources, 64, 8, 8, 0, 1))
    rows = [tokenizer.decode(row) for row in batch.inputs_BT.tolist()]
    assert {"abc" in row for row in rows} == {True, False}
    assert 4 <= sum("abc" in row for row in rows) <= 7


@pytest.mark.parametrize("limit", [0, 7])
@pytest.mark.parametrize("length", [32, 1000])
def test_the_batches_of_all_sources_are_those_of_the_whole(of_two_sources: Path, limit: int, length: int) -> None:
    assert heldout_sources(of_two_sources) == ("letters", "my-numbers")
    tokenizer = Tokenizer.load(of_two_sources / "tokenizer.model")
    found = []
    for source, begins in (("letters", "abc"), ("my-numbers", "123")):
        by_rank = [HeldoutBatches(of_two_sources, length, 3, limit, rank, 2, source=source) for rank in range(2)]
        assert len({len(batches) for batches in by_rank}) == 1
        for batch in (wide(batch) for batches in by_rank for batch in batches):
            for inputs, targets in zip(batch.inputs_BT, batch.targets_BT, strict=True):
                real = targets != IGNORED_TARGET
                if not real.any():
                    continue
                ids = [*inputs[real].tolist(), int(targets[real][-1])]
                # A row of the first source goes on into the second; the row's own source is that of its first text.
                other = {"abc": "123", "123": "abc"}[begins]
                text = tokenizer.decode(ids)
                assert begins in text or other not in text
                assert other not in text or text.index(begins) < text.index(other)
                found += itertools.pairwise(ids)
        assert by_rank[0].loss_tokens > 0
    assert sorted(found) == sorted(pairs(of_two_sources, length, limit))


def test_a_manifest_without_names_of_sources_is_one_whole(of_two_sources: Path, tmp_path: Path) -> None:
    shutil.copytree(of_two_sources, tmp_path / "corpus")
    path = tmp_path / "corpus/heldout" / MANIFEST
    manifest = json.loads(path.read_text())
    for part in manifest["parts"]:
        del part["source_name"]
    path.write_text(json.dumps(manifest))
    assert heldout_sources(tmp_path / "corpus") == ()
    assert HeldoutBatches(tmp_path / "corpus", 64, 8, 0, 0, 1).loss_tokens > 0
