"""JSON objects from strangers: each field is taken with its type checked.

Here lives what ``metadata`` needs to turn parsed JSON into records. What the fields mean does not.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np

from safeweights_peft.errors import CorruptAdapterError, UnsupportedVersionError
from safeweights_peft.files import MAX_DIMS

T = TypeVar("T")
Choice = TypeVar("Choice", bound=StrEnum)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Fields:
    """A JSON object and what messages call it.

    Attributes:
        data: The parsed JSON; anything but an object is refused.
        where: The file and the place in it.
    """

    data: Any
    where: str

    def __post_init__(self) -> None:
        """Refuse anything but an object."""
        if not isinstance(self.data, Mapping):
            raise CorruptAdapterError(
                f"{self.where}: expected a JSON object, found {type(self.data).__name__}; "
                "do not use this adapter"
            )

    def message(self, key: str, expected: str, found: str) -> str:
        """Say what is wrong with one field."""
        return (
            f"{self.where}: {key}: expected {expected}, found {found[:80]}; do not use this adapter"
        )

    def only(self, allowed: Collection[str]) -> None:
        """Refuse fields that the format does not know."""
        for key in self.data:
            if key not in allowed:
                raise CorruptAdapterError(
                    self.message(repr(key[:80]), f"only {', '.join(sorted(allowed))}", "this field")
                )

    def take(self, key: str, kind: type[T]) -> T:
        """Take a field of exactly one type; a bool is no integer."""
        value = self.data.get(key)
        if type(value) is not kind:
            found = type(value).__name__ if key in self.data else "nothing"
            raise CorruptAdapterError(self.message(key, kind.__name__, found))
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        """Take a field of one type that may be null or missing."""
        return None if self.data.get(key) is None else self.take(key, kind)

    def integer(self, key: str, least: int) -> int:
        """Take an integer."""
        value = self.take(key, int)
        if value < least:
            raise CorruptAdapterError(self.message(key, f"at least {least}", str(value)))
        return value

    def integers(self, key: str, least: int) -> tuple[int, ...]:
        """Take a list of sizes or strides."""
        values = self.take(key, list)
        if len(values) > MAX_DIMS or any(type(v) is not int or v < least for v in values):
            asked = f"at most {MAX_DIMS} integers of at least {least}"
            raise CorruptAdapterError(self.message(key, asked, repr(values)))
        return tuple(values)

    def texts(self, key: str) -> tuple[str, ...]:
        """Take a list of non-empty strings."""
        values = self.take(key, list)
        if any(type(value) is not str or not value for value in values):
            raise CorruptAdapterError(self.message(key, "non-empty strings", repr(values)))
        return tuple(values)

    def one_of(self, key: str, allowed: Collection[str]) -> str:
        """Take one of some strings."""
        name = self.take(key, str)
        if name not in allowed:
            raise CorruptAdapterError(self.message(key, f"one of {', '.join(allowed)}", repr(name)))
        return name

    def member(self, key: str, choices: type[Choice]) -> Choice:
        """Take a member of a closed enum, which a newer format version may have widened."""
        name = self.take(key, str)
        try:
            return choices(name)
        except ValueError:
            raise UnsupportedVersionError(
                f"{self.where}: {key}: expected one of {', '.join(choices)}, found {name[:80]!r}; "
                "install a newer safeweights_peft"
            ) from None

    def digest(self, key: str) -> str | None:
        """Take a digest or null."""
        value = self.optional(key, str)
        if value is not None and not _DIGEST.fullmatch(value):
            raise CorruptAdapterError(
                self.message(key, "sha256: and 64 hexadecimal digits", repr(value))
            )
        return value

    def number(self, key: str) -> float:
        """Take a number that is finite in float32."""
        value = self.data.get(key)
        if type(value) not in (int, float) or not abs(value) <= _FLOAT32_MAX:
            raise CorruptAdapterError(
                self.message(key, "a number that is finite in float32", repr(value))
            )
        return float(value)
