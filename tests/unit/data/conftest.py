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
