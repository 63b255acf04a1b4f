"""Documents in a .parquet file, from any row group on, wherever the file lies."""

from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import parquet

from moelet.text.documents import Document, Parts, Skipped, checked, no_field

BLOCK = 64 * 2**10  # bytes read at once of a column, instead of a whole row group's
BATCH_ROWS, BATCH_BYTES = 16, 16 * 2**20  # rows decoded at once, and about how many bytes at most
LARGEST_TEXT = 16 * 2**20  # bytes of a row's text: twenty long novels. Whatever comes in parts may be longer


def fields_of(file: BinaryIO) -> list[str]:
    """Return the names of the columns. Raises pyarrow's errors for what is no table."""
    return list(parquet.read_schema(file).names)


def read_table(file: BinaryIO, name: str, field: str, group: int, row: int) -> Parts:
    """Yield the rows after the first `row`, each with the row group to go on in and the number of rows then read.

    `group` is the row group that the next row is in; those before it are not read. Raises UserError when there is no
    such field, and pyarrow's errors for a file that is damaged.
    """
    with parquet.ParquetFile(file, buffer_size=BLOCK, page_checksum_verification=True) as table:
        if field not in table.schema_arrow.names:
            raise no_field(name, field, table.schema_arrow.names)
        counts = [table.metadata.row_group(k).num_rows for k in range(table.num_row_groups)]
        for k in range(group, len(counts)):
            number, end = sum(counts[:k]), sum(counts[: k + 1])
            for value in _values(table, field, k):
                number += 1
                if number > row:
                    yield _decode(value, f"{name}:{number}"), k + (number == end), number
            if number != end:
                raise pa.ArrowInvalid(f"row group {k} of {name} ends at row {number}, not {end}")


def _values(table: parquet.ParquetFile, field: str, group: int) -> Iterator[Any]:
    """Yield the values of a column in a row group; few at once where its rows are long, all columns together.

    What the file says of single columns isn't looked at: where that is damaged, Arrow 26 ends the process.
    """
    found = table.metadata.row_group(group)
    mean = found.total_byte_size // max(1, found.num_rows)
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, mean)))
    batches = table.iter_batches(rows, [group], [field], use_threads=False)
    return chain.from_iterable(batch.column(field) for batch in batches)


def _decode(value: Any, where: str) -> Document | Skipped:
    """Return the text that stands in a table, or why it isn't one."""
    text = value.value if isinstance(value, pa.DictionaryScalar) else value
    try:
        if not isinstance(text, pa.StringScalar):
            return checked(None, where)
        if text.is_valid and text.as_buffer().size > LARGEST_TEXT:
            return Skipped("over-long", where)
        return checked(text.as_py(), where)
    except UnicodeDecodeError:  # Arrow reads bytes that claim to be UTF-8 unseen
        return Skipped("invalid UTF-8", where)
