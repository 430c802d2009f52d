from __future__ import annotations

from pathlib import Path

import pytest

from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.prepare import prepare
from tests.helpers.text import documents, write_jsonl

SMALL = TokenizerConfig(vocab_size=500)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared folder with several shards. Read only: copy it to damage it."""
    folder = tmp_path_factory.mktemp("prepared")
    text = write_jsonl(folder / "text.jsonl", documents(300))
    data = DataConfig(sources=(SourceConfig(path=str(text)),), heldout_fraction=0.1, shard_tokens=20_000)
    prepare(data, SMALL, folder / "corpus")
    return folder / "corpus"


@pytest.fixture(scope="session")
def big_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough text (1.4 MB) for processes to be started, and enough parts to stop them between two."""
    folder = tmp_path_factory.mktemp("big")
    texts = documents(720, words=300)
    for number in range(8):
        write_jsonl(folder / f"{number}.jsonl", texts[number * 90 : (number + 1) * 90])
    return folder
