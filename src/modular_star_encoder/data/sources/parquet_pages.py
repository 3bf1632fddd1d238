"""Reads how large the pages of a Parquet file are when unpacked, as their headers say; the file's metadata may lie.

pyarrow unpacks a page as large as its header says, up to 2 GB, but shows no header. Headers are structures of Thrift's
compact protocol (https://parquet.apache.org/docs/file-format/data-pages/).
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from pyarrow.parquet import ColumnChunkMetaData

_UNPACKED, _PACKED = 2, 3  # fields of a header: sizes of the page in bytes
_MAX_HEADER = 2**16  # bytes, with the statistics of a page
_FREE_PAGES, _MIN_VALUES = 1000, 100  # a chunk with more pages must have this number of values in each on average
_BOOLEANS, _INTEGERS, _BYTE, _DOUBLE, _BINARY, _STRUCTURE = (1, 2), (4, 5, 6), 3, 7, 8, 12


def unpacked_bytes(file: BinaryIO, chunk: ColumnChunkMetaData) -> float:
    """Return the number of bytes that the pages of a column chunk unpack to; infinity if damaged, or too many pages."""
    offset = min(one for one in (chunk.dictionary_page_offset, chunk.data_page_offset) if one is not None)
    end, total, left = offset + chunk.total_compressed_size, 0, _FREE_PAGES + chunk.num_values // _MIN_VALUES
    while offset < end and chunk.num_values:  # of a chunk without values, pyarrow reads no page
        try:
            file.seek(offset)
            header = io.BytesIO(file.read(_MAX_HEADER))
            fields = _structure(header)
            packed, unpacked = fields[_PACKED], fields[_UNPACKED]
        except (LookupError, RecursionError, ValueError):
            packed = unpacked = -1
        left -= 1
        if min(packed, unpacked, left) < 0:
            return float("inf")
        total, offset = total + unpacked, offset + header.tell() + packed
    return total


def _structure(data: BinaryIO) -> dict[int, int]:
    """Read a structure; return {number of a field: value} of its integers."""
    fields, number = {}, 0
    while byte := data.read(1)[0]:
        step, kind = divmod(byte, 16)
        number = number + step if step else _integer(data)
        if kind in _INTEGERS:
            fields[number] = _integer(data)
        elif kind == _STRUCTURE:
            _structure(data)
        elif kind in (_BYTE, _DOUBLE):
            data.seek(1 if kind == _BYTE else 8, io.SEEK_CUR)
        elif kind == _BINARY:
            data.seek(_varint(data), io.SEEK_CUR)
        elif kind not in _BOOLEANS:
            raise LookupError(kind)
    return fields


def _integer(data: BinaryIO) -> int:
    value = _varint(data)
    return value >> 1 ^ -(value & 1)


def _varint(data: BinaryIO) -> int:
    value = shift = 0
    while (byte := data.read(1)[0]) > 127 and shift < 64:
        value, shift = value | (byte & 127) << shift, shift + 7
    return value | byte << shift
