"""The `parquet` source: a document a row. Files are shared out among workers by row groups."""

from __future__ import annotations

from collections.abc import Iterator

from gptscale.config.schema import SourceConfig
from gptscale.data.sources.files import input_files
from gptscale.data.sources.part import Document, Part, part_bytes
from gptscale.data.store import address, input_bytes, open_input
from gptscale.runtime.errors import UserError

_ROWS_AT_ONCE = 256


def find_parquet(source: SourceConfig, key: str) -> tuple[Part, ...]:
    root, files = input_files(source.path, (".parquet",), key)
    wanted = part_bytes(sum(input_bytes(address(root, file)) for file in files))
    parts = []
    for file in files:
        sizes = _row_group_bytes(address(root, file), source.text_key)
        start, gathered = 0, 0
        for number, size in enumerate(sizes):
            gathered += size
            if gathered >= wanted or number == len(sizes) - 1:
                name = file if (start, number + 1) == (0, len(sizes)) else f"{file} row groups {start}…{number + 1}"
                parts.append(
                    Part(name, source, "parquet", root, (file,), gathered, source.licence, "", start, number + 1)
                )
                start, gathered = number + 1, 0
    return tuple(parts)


def _row_group_bytes(where: str, text_key: str) -> list[int]:
    """Bytes of text in each row group, from the file's footer alone. Raises UserError for what is not such a file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with open_input(where) as stream, parquet.ParquetFile(stream) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{where}: not a parquet file ({error})\nfetch it again, or name its format") from error
    if text_key not in schema.names:
        raise UserError(
            f"{where}: no {text_key!r} column (it has: {', '.join(schema.names[:8])})\n"
            "set the source's text_key to the text's column"
        )
    kind = schema.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{where}: column {text_key!r} holds {kind}, not text\nset the source's text_key")
    column = [metadata.schema.column(number).path for number in range(metadata.num_columns)].index(text_key)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return [group.column(column).total_uncompressed_size for group in groups]


def read_parquet(part: Part) -> Iterator[Document]:
    from pyarrow import parquet

    (file,) = part.files
    where = address(part.root, file)
    with open_input(where) as stream, parquet.ParquetFile(stream) as opened:
        row = sum(opened.metadata.row_group(number).num_rows for number in range(part.start))
        batches = opened.iter_batches(
            _ROWS_AT_ONCE,
            row_groups=list(range(part.start, part.stop)),
            columns=[part.source.text_key],
            use_threads=False,
        )
        for batch in batches:
            for text in batch.column(0).to_pylist():
                if text is None:
                    raise UserError(
                        f"{where}: row {row} has no text (null in column {part.source.text_key!r})\n"
                        "drop such rows, or set the source's text_key"
                    )
                yield Document(f"{file}@{row}", text)
                row += 1
