"""How one stream of a compact record is laid out, as its record says before a byte is read.

Here live the closed list of codings, and the strict JSON form of a stream. Coding and decoding do
not: see ``codec``.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, assert_never

from safeweights_peft.delta import WEIGHT_DTYPES
from safeweights_peft.errors import CorruptAdapterError
from safeweights_peft.patch.fields import Fields

MAX_ENTRIES_PER_BYTE = 64
"""Limit on what a parameter's stored bytes may hold; zeros alone would be 30,000 entries a byte."""

_FIELDS = frozenset({"coding", "escapes", "bytes"})


class Coding(StrEnum):
    """How a stream is laid out; closed: a reader refuses any other name."""

    PLAIN = "plain"
    GAPS8 = "gaps8"
    GAPS16 = "gaps16"
    GAPS32 = "gaps32"
    STEPS8 = "steps8"
    STEPS16 = "steps16"
    STEPS32 = "steps32"
    PLANES = "planes"

    @cached_property
    def width(self) -> int:
        """Bytes of a gap or a step; 0 where the coding is of neither."""
        return int(self.value.lstrip("abcdefghijklmnopqrstuvwxyz") or 0) // 8


GAPS = (Coding.GAPS8, Coding.GAPS16, Coding.GAPS32)
STEPS = (Coding.STEPS8, Coding.STEPS16, Coding.STEPS32)

CODINGS: dict[str, tuple[Coding, ...]] = {
    "indices": (Coding.PLAIN, *GAPS),
    "values": (Coding.PLAIN, *STEPS, Coding.PLANES),
    "scores": (Coding.PLAIN, Coding.PLANES),
}
"""The codings that each stream may have."""


@dataclass(frozen=True)
class Stream:
    """What a record says of one of its streams.

    Attributes:
        coding: The layout.
        escapes: Number of escapes; 0 where the coding has none.
        sizes: Bytes of each zstd frame, in the order in which they are stored.
    """

    coding: Coding
    escapes: int = 0
    sizes: tuple[int, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all frames."""
        return sum(self.sizes)

    def planes(self, count: int, itemsize: int = 0) -> tuple[int, ...]:
        """Tell how many bytes each frame holds when it is decompressed."""
        width = self.coding.width
        match self.coding:
            case Coding.PLAIN:
                return ()
            case Coding.PLANES:
                return (count,) * itemsize
            case Coding.GAPS8 | Coding.GAPS16 | Coding.GAPS32:
                return (count + self.escapes,) * width
            case Coding.STEPS8 | Coding.STEPS16 | Coding.STEPS32:
                return (count,) * width + (self.escapes,) * (itemsize if self.escapes else 0)
            case _:
                assert_never(self.coding)


def stream_to_json(stream: Stream) -> dict[str, Any]:
    """Turn a stream's description into plain JSON."""
    return {"coding": stream.coding.value, "escapes": stream.escapes, "bytes": list(stream.sizes)}


def stream_from_json(data: Any, where: str, kind: str, count: int, dtype: str) -> Stream:
    """Check a stream's description against the other fields of its record."""
    fields = Fields(data, where)
    fields.only(_FIELDS)
    coding = fields.member("coding", Coding)
    if coding not in CODINGS[kind]:
        asked = f"one of {', '.join(CODINGS[kind])}"
        raise CorruptAdapterError(fields.message("coding", asked, repr(coding.value)))
    stream = Stream(coding, fields.integer("escapes", least=0), fields.integers("bytes", least=1))
    itemsize = WEIGHT_DTYPES[dtype].itemsize
    if coding in STEPS and coding.width > itemsize:
        raise CorruptAdapterError(
            fields.message("coding", f"steps of at most {8 * itemsize} bits", repr(coding.value))
        )
    may_escape = coding in GAPS or (coding in STEPS and coding.width < itemsize)
    if stream.escapes > (count if may_escape else 0):
        asked = f"at most {count if may_escape else 0}"
        raise CorruptAdapterError(fields.message("escapes", asked, str(stream.escapes)))
    if coding is not Coding.PLAIN and not count:
        raise CorruptAdapterError(fields.message("coding", "plain for no entries", coding.value))
    return stream
