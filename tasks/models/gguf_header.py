"""Check of the header of a GGUF file, before gguf's own reader opens it.

That reader trusts every count in the file: an array of 2**60 entries keeps it busy until the memory is full.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by type of value
MOST_DIMENSIONS = 8  # of a tensor; ggml has four
MOST_NESTED = 4  # levels of arrays in arrays


def check_gguf_header(path: Path) -> None:
    """Follow every length in the header of a GGUF file.

    Raises:
        ValueError: it is not a GGUF file, or a length leads beyond its end; the message says what and where.
    """
    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"it has only {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] != MAGIC:
            raise ValueError(f"it begins with {content[:4]!r} instead of {MAGIC!r}")
        order = "<" if struct.unpack_from("<I", content, 4)[0] & 0xFFFF else ">"
        header = _Header(content, size, order)
        header.at = 8
        tensors, fields = header.number("Q"), header.number("Q")
        for _ in range(fields):
            header.skip(header.number("Q"), "the name of a field")
            header.skip_value(header.number("I"))
        for _ in range(tensors):
            header.skip(header.number("Q"), "the name of a tensor")
            if (dimensions := header.number("I")) > MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions (at byte {header.at - 4})")
            header.skip(8 * dimensions + 4 + 8, "the place of a tensor")


@dataclass
class _Header:
    """Reader of a header, at position ``at``."""

    content: mmap.mmap
    size: int
    order: str
    at: int = 0

    def number(self, kind: str) -> int:
        begin = self.at
        self.skip(struct.calcsize(kind), "a number")
        return int(struct.unpack_from(self.order + kind, self.content, begin)[0])

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise ValueError(
                f"{what} takes {count} bytes at byte {self.at}, but the file ends at {self.size}"
            )
        self.at += count

    def skip_value(self, kind: int, nested: int = 0) -> None:
        if kind in SCALAR_BYTES:
            self.skip(SCALAR_BYTES[kind], "a number")
        elif kind == STRING:
            self.skip(self.number("Q"), "a string")
        elif kind == ARRAY and nested < MOST_NESTED:
            entries, count = self.number("I"), self.number("Q")
            if entries in SCALAR_BYTES:
                self.skip(count * SCALAR_BYTES[entries], "an array")
                return
            for _ in range(count):  # every entry takes bytes, so the end of the file ends the loop
                self.skip_value(entries, nested + 1)
        else:
            raise ValueError(f"a value is of the unknown type {kind} (at byte {self.at})")
