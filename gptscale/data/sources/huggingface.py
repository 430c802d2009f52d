"""The `huggingface` source: a dataset by name or local path, streamed in its own order by the `datasets` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptscale.config.schema import SourceConfig
from gptscale.data.sources.part import Document, Part
from gptscale.data.store import fingerprint
from gptscale.runtime.errors import UserError

_UNKNOWN_SIZE = 1 << 26
_MOST_ROWS_A_SHARD = 100_000


def find_huggingface(source: SourceConfig, key: str) -> tuple[Part, ...]:
    """One part a shard of the dataset. Raises UserError where it cannot be loaded or has no such text column."""
    if not source.path:
        raise UserError(f"{key}.path: a Hugging Face dataset needs a name or a local path\nset {key}.path")
    try:
        dataset = _load(source)
        state = _state(source)
    except (OSError, ValueError, RuntimeError) as error:  # datasets raises these for "not found", offline, wrong split
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{key}.path={source.path}: datasets cannot load it: {reason[0] if reason else type(error).__name__}\n"
            "correct path, subset or split; a set that needs an account wants `hf auth login`"
        ) from error
    columns = dataset.column_names
    if columns is not None and source.text_key not in columns:
        raise UserError(
            f"{key}.text_key={source.text_key}: the dataset has no such column (it has: {', '.join(columns[:8])})\n"
            f"set {key}.text_key to the text's column"
        )
    shards = dataset.num_shards
    total_bytes = _text_bytes(dataset, source.split)
    licence = source.licence if source.licence != "unstated" else (dataset.info.license or "unstated")
    label = "/".join(filter(None, [Path(source.path).name, source.subset, source.split]))
    return tuple(
        Part(
            name=f"{label} shard {shard}",
            source=source,
            format="huggingface",
            root=label,
            files=(),
            input_bytes=total_bytes // shards if total_bytes else _UNKNOWN_SIZE,
            licence=licence,
            version=str(dataset.info.version or ""),
            start=shard,
            stop=shards,
            state=state,
        )
        for shard in range(shards)
    )


def read_huggingface(part: Part) -> Iterator[Document]:
    text_key = part.source.text_key
    dataset = _load(part.source).shard(num_shards=part.stop, index=part.start)
    for row, record in enumerate(dataset):
        text = record.get(text_key)
        if not isinstance(text, str):
            raise UserError(
                f"{part.name}, row {row}: {text_key!r} is {type(text).__name__}, not text\n"
                "set the source's text_key, or drop such rows"
            )
        yield Document(f"{part.root}#{part.start}@{row}", text)


def _load(source: SourceConfig) -> Any:
    """The dataset as a stream of records, never shuffled."""
    import datasets

    if _is_saved(source):
        saved = datasets.load_from_disk(source.path)
        if isinstance(saved, datasets.DatasetDict):
            if source.split not in saved:
                raise ValueError(f"no split {source.split!r} (it has: {', '.join(saved)})")
            saved = saved[source.split]
        return saved.to_iterable_dataset(num_shards=max(1, -(-len(saved) // _MOST_ROWS_A_SHARD)))
    return datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True)


def _is_saved(source: SourceConfig) -> bool:
    """Whether it is what `save_to_disk` wrote."""
    return any((Path(source.path) / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def _state(source: SourceConfig) -> str:
    """A hash of what the library knows of the files behind the dataset without reading them: a commit of the hub, a
    time of change. Empty where it knows nothing: of a dataset that a program makes."""
    import datasets

    if _is_saved(source):
        files = sorted(path for path in Path(source.path).rglob("*") if path.is_file())
        known: Any = [[str(file), *fingerprint(str(file))] for file in files]
    else:
        by_split = datasets.load_dataset_builder(source.path, source.subset).config.data_files or {}
        known = [
            [list(files), list(getattr(files, "origin_metadata", ()))]
            for split, files in by_split.items()
            if str(split) == source.split
        ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest() if known else ""


def _text_bytes(dataset: Any, split: str) -> int:
    splits = dataset.info.splits or {}
    return (splits[split].num_bytes or 0) if split in splits else 0
