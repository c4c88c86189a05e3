"""Reader of TensorFlow's checkpoints without TensorFlow.

Everything that a file says of itself (offsets, sizes, shapes, names) is checked before memory is taken for it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from .folders import read_bytes

# By their numbers in TensorFlow's enumeration `DataType`.
_FLOATS = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}
TENSORFLOW_DTYPES = {**_FLOATS, 3: torch.int32, 9: torch.int64}
TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES, TRAILER_BYTES = 48, 5
# The index of the largest GPT-2 takes 30 kB, its longest name 30 characters.
MAX_INDEX_BYTES, MAX_KEY_BYTES = 2**24, 1024


@dataclass(frozen=True)
class BundleEntry:
    """Where a tensor lies: file number, offset and size in bytes, with the checksum of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


class TensorBundle:
    """Tensors of a checkpoint of TensorFlow, version 2 of the format, by name.

    The index is a sorted string table in the form of LevelDB: blocks of keys, each stored as what differs from the one
    before, found through a block of block addresses, whose own address stands in the last 48 bytes. Its values are the
    protocol buffers BundleHeaderProto (under the empty key) and BundleEntryProto. Checksums (CRC-32C) of its blocks and
    of every tensor that is read are verified. Not read: compressed blocks, partitioned variables, big endian files,
    types besides `TENSORFLOW_DTYPES`.

    Args:
        prefix: path of the files without `.index` and `.data-00000-of-00001`.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        self.index = Path(f"{prefix}.index")

    @cached_property
    def entries(self) -> dict[str, BundleEntry]:
        """All tensors, with types, shapes and bounds verified against the sizes of the files."""
        values = self._read_table()
        header = _fields(values.pop(b"", b""), self.index)
        self.num_shards = header.get(1, [0])[0]
        if header.get(2, [0])[0] != 0:
            raise ValueError(f"{self.index} is of a big endian machine, which is not read. Save it on another one.")
        if not isinstance(self.num_shards, int) or not 0 < self.num_shards <= 1000:
            raise self._damaged("it has no header, or one without a number of files")
        entries = {}
        for key, value in values.items():
            try:
                name = key.decode()
            except UnicodeDecodeError:
                raise self._damaged("a name is not text") from None
            entries[name] = self._parse_entry(name, value)
        sizes = {shard: self._size_of(shard) for shard in {entry.shard for entry in entries.values()}}
        for name, entry in entries.items():
            if entry.offset + entry.size > sizes[entry.shard]:
                raise ValueError(
                    f"{name} ends at byte {entry.offset + entry.size:,} of {self._data(entry.shard)}, which has "
                    f"{sizes[entry.shard]:,}. Copy the file completely."
                )
        if sum(entry.size for entry in entries.values()) > sum(sizes.values()):
            raise self._damaged("its tensors overlap")
        return entries

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        entry = self.entries[name]
        with self._data(entry.shard).open("rb") as file:
            file.seek(entry.offset)
            data = bytearray(file.read(entry.size))
        if len(data) != entry.size or _masked(crc32c(data)) != entry.checksum:
            raise ValueError(
                f"{name} in {self._data(entry.shard)} does not have the checksum in {self.index}. Copy both again."
            )
        if not data:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)

    def _data(self, shard):
        return Path(f"{self.prefix}.data-{shard:05d}-of-{self.num_shards:05d}")

    def _size_of(self, shard):
        if not self._data(shard).is_file():
            raise FileNotFoundError(f"{self._data(shard)} does not exist. Copy the checkpoint completely.")
        return self._data(shard).stat().st_size

    def _damaged(self, cause):
        return ValueError(f"{self.index} is damaged or no index of a TensorFlow checkpoint: {cause}. Copy it again.")

    def _read_table(self) -> dict[bytes, bytes]:
        """Values by key."""
        data = read_bytes(self.index, MAX_INDEX_BYTES)
        if len(data) < FOOTER_BYTES or int.from_bytes(data[-8:], "little") != TABLE_MAGIC:
            raise self._damaged("its last eight bytes are not those of a table")
        footer, position, handle = data[-FOOTER_BYTES:], 0, []
        # Addresses of a block that is never used here and of the one with the addresses.
        for _ in range(4):
            number, position = _varint(footer, position, self.index)
            handle.append(number)
        found, last = {}, None
        for _, address in self._block(data, *handle[2:]):
            offset, position = _varint(address, 0, self.index)
            size, _ = _varint(address, position, self.index)
            for key, value in self._block(data, offset, size):
                # In order, so no block is read twice.
                if last is not None and key <= last:
                    raise self._damaged("its keys are not in order")
                found[key], last = value, key
        return found

    def _block(self, data, offset, size) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values of a block: lengths of the part shared with the last key, of the rest and of the value, then
        the rest and the value; behind them 32-bit addresses of whole keys, and their number."""
        if offset + size + TRAILER_BYTES > len(data) - FOOTER_BYTES or size < 4:
            raise self._damaged("a block lies outside it")
        block, compression = data[offset : offset + size], data[offset + size]
        checksum = int.from_bytes(data[offset + size + 1 : offset + size + TRAILER_BYTES], "little")
        if _masked(crc32c(data[offset : offset + size + 1])) != checksum:
            raise self._damaged("a block does not have its checksum")
        if compression:
            raise ValueError(f"{self.index} has compressed blocks, which are not read. Save it without compression.")
        end = size - 4 - 4 * int.from_bytes(block[-4:], "little")
        if end < 0:
            raise self._damaged("a block is shorter than its own table")
        position, key = 0, b""
        while position < end:
            shared, position = _varint(block, position, self.index)
            rest, position = _varint(block, position, self.index)
            length, position = _varint(block, position, self.index)
            if shared > len(key) or shared + rest > MAX_KEY_BYTES or position + rest + length > end:
                raise self._damaged("a key or a value is longer than its block")
            key = key[:shared] + block[position : position + rest]
            position += rest
            yield key, block[position : position + length]
            position += length

    def _parse_entry(self, name, value) -> BundleEntry:
        """BundleEntryProto: 1 type, 2 shape (2 axes (1 size), 3 rank unknown), 3 file, 4 offset, 5 size, 6 checksum,
        7 slices."""
        fields = _fields(value, self.index)
        if 7 in fields:
            raise ValueError(
                f"{name} in {self.index} is partitioned, which is not read. Save it as one variable, without slices."
            )
        number, shard, offset, size, checksum = (fields.get(field, [0])[-1] for field in (1, 3, 4, 5, 6))
        if number not in TENSORFLOW_DTYPES:
            raise ValueError(
                f"{name} in {self.index} is of TensorFlow's type {number}, which is not read. "
                "Save the variables of the model alone, as numbers."
            )
        shape = _fields(fields.get(2, [b""])[-1], self.index)
        axes = [_fields(axis, self.index).get(1, [0])[-1] for axis in shape.get(2, [])]
        dtype = TENSORFLOW_DTYPES[number]
        if not all(isinstance(value, int) for value in (shard, offset, size, checksum, *axes)) or 3 in shape:
            raise self._damaged(f"the entry of {name} has fields of another type")
        if len(axes) > 8 or math.prod(axes) * dtype.itemsize != size:
            raise ValueError(
                f"{name} in {self.index} has the shape {tuple(axes)} and {size:,} bytes, which do not agree. "
                "Copy it again."
            )
        if shard >= self.num_shards:
            raise self._damaged(f"{name} lies in file {shard} of {self.num_shards}")
        return BundleEntry(dtype, tuple(axes), shard, offset, size, checksum)


def _varint(data, position, file):
    """An integer of seven bits a byte, the lowest first, and the position behind it."""
    value = 0
    for index in range(10):
        if position + index >= len(data):
            break
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError(f"{file} is damaged: an integer in it does not end. Copy it again.")


def _fields(data, file) -> dict[int, list[int | bytes]]:
    """Values by field number of a protocol buffer."""
    if not isinstance(data, bytes):
        raise ValueError(f"{file} is damaged: a message in it is a number. Copy it again.")
    fields, position = {}, 0
    while position < len(data):
        tag, position = _varint(data, position, file)
        if tag & 7 == 0:
            value, position = _varint(data, position, file)
        else:
            length = {1: 8, 5: 4}.get(tag & 7)
            if tag & 7 == 2:
                length, position = _varint(data, position, file)
            if length is None or position + length > len(data):
                raise ValueError(f"{file} is damaged: a field in it is longer than its message. Copy it again.")
            value = data[position : position + length]
            value = value if tag & 7 == 2 else int.from_bytes(value, "little")
            position += length
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _crc_table():
    """The remainder that each value of a byte leaves, for Castagnoli's polynomial with its bits in reverse."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> np.uint32(1)) ^ np.uint32(0x82F63B78), table >> np.uint32(1))
    return table


_CRC_TABLE = _crc_table()
# Bytes that are divided side by side.
_CRC_CHUNK = 2**24


def crc32c(data: bytes | bytearray) -> int:
    """Cyclic redundancy check with Castagnoli's polynomial (RFC 3720, appendix B.4), about 100 MB a second.

    A remainder is linear in the data: that of two pieces is the first one's, moved on by as many zero bytes as the
    second has, XOR the second one's. So the rows of a chunk are divided side by side and then joined pair by pair.
    """
    array = np.frombuffer(data, dtype=np.uint8)
    register = 0xFFFFFFFF
    for start in range(0, len(array), _CRC_CHUNK):
        chunk = array[start : start + _CRC_CHUNK]
        register = int(_move(_zeros(len(chunk)), np.array([register], dtype=np.uint32))[0]) ^ _remainder(chunk)
    return register ^ 0xFFFFFFFF


def _remainder(chunk):
    """The remainder of bytes from a register of zeros, which zeros in front do not change."""
    # About as many rows as columns, of which there is a step in Python each, but no more columns than pay.
    columns = 1 << min(11, len(chunk).bit_length() // 2)
    rows = 1 << (-(-len(chunk) // columns) - 1).bit_length()
    padded = np.zeros(rows * columns, dtype=np.uint8)
    padded[len(padded) - len(chunk) :] = chunk
    registers = np.zeros(rows, dtype=np.uint32)
    for column in np.ascontiguousarray(padded.reshape(rows, columns).T):
        registers = _CRC_TABLE[(registers & np.uint32(0xFF)) ^ column] ^ (registers >> np.uint32(8))
    operator = _zeros(columns)
    while len(registers) > 1:
        registers = _move(operator, registers[::2]) ^ registers[1::2]
        operator = _move(operator, operator)
    return int(registers[0])


def _move(operator, registers):
    """Apply a linear map, given by the images of the 32 bits, to every register."""
    bits = np.arange(32, dtype=np.uint32)
    chosen = (registers[:, None] >> bits) & np.uint32(1)
    return np.bitwise_xor.reduce(chosen * operator, axis=1)


def _zeros(count):
    """The map that `count` zero bytes are to a register, by repeated squaring."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    moved, square = bits, _CRC_TABLE[bits & np.uint32(0xFF)] ^ (bits >> np.uint32(8))
    while count:
        if count & 1:
            moved = _move(square, moved)
        square, count = _move(square, square), count >> 1
    return moved


def _masked(checksum):
    """The form in which TensorFlow and LevelDB store a checksum, so that data with checksums inside is no trap."""
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


__all__ = ["BundleEntry", "TensorBundle", "crc32c"]
