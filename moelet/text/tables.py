"""Documents in a .parquet file, from any row group on, wherever the file lies."""

import os
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import parquet

from moelet.text.documents import Document, Parts, Skipped, checked, no_field

BLOCK = 64 * 2**10  # bytes read at once of a column, instead of a whole row group's
BATCH_ROWS, BATCH_BYTES = 16, 16 * 2**20  # rows decoded at once, and bytes at most if there are several
GROWN, LARGEST_GROWN = 500, 128 * 2**20  # what text may grow by when it is decompressed, or else bytes of a row group
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
        most = max(LARGEST_GROWN, GROWN * file.seek(0, os.SEEK_END))
        counts = [table.metadata.row_group(k).num_rows for k in range(table.num_row_groups)]
        for k in range(group, len(counts)):
            number, end = sum(counts[:k]), sum(counts[: k + 1])
            if table.metadata.row_group(k).total_byte_size > most:  # its pages are decompressed whole
                yield Skipped("over-large row group", f"{name}:{number + 1}"), k + 1, end
                continue
            for value in _values(table, field, k):
                number += 1
                if number > row:
                    yield _decode(value, f"{name}:{number}"), k + (number == end), number
            if number != end:
                raise pa.ArrowInvalid(f"row group {k} of {name} ends at row {number}, not {end}")


def _values(table: parquet.ParquetFile, field: str, group: int) -> Iterator[Any]:
    """Yield the values of a column in a row group; few at once where one may be long.

    None is longer than its whole group, which is all that is known: means say nothing of the longest, and one text that
    many cells repeat is in the file once. One row at a time costs 20 microseconds a row more than BATCH_ROWS.
    What the file says of single columns isn't looked at: where that is damaged, Arrow 26 ends the process.
    """
    longest = table.metadata.row_group(group).total_byte_size
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, longest)))
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
