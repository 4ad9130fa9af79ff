"""Sparse changes of one tensor, the one rule that adds them, and the checks of their arrays."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from safeweights_peft.errors import BaseMismatchError, CorruptAdapterError, UnsupportedFeatureError

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Floating dtypes of values and of trainable models, by torch's names."""

WEIGHT_DTYPES: dict[str, np.dtype[Any]] = DTYPES | {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Floating dtypes of checkpoint tensors that can be changed, by torch's names."""

MAX_NUMEL = 2**63 - 1
"""Largest number of entries whose flat indices fit in int64."""

_WINDOW = 2**20


def add_rounded(base: Array, values: Array, scale: float = 1.0) -> Array:
    """Add scaled values to base entries, by :func:`sum_rounded`."""
    return sum_rounded(base, [(..., values, scale)])


def sum_rounded(base: Array, terms: Iterable[tuple[Any, Array, float]]) -> Array:
    """Add the scaled values of patches to base entries: the only arithmetic rule of the package.

    ``new = (base.float32 + s1 * v1 + s2 * v2 + ...)``, from left to right: each factor and value in
    float32, each product and each sum rounded to float32 (never fused), then one rounding to
    nearest even to the base's dtype. Overflow gives infinity, or NaN where the dtype has none.
    """
    # The torch twin is in `modeling/tensors.py`; a test holds the two bitwise equal. Not so a NaN:
    # torch changes its payload from processor to processor, so merging refuses it.
    if base.dtype not in WEIGHT_DTYPES.values():
        raise UnsupportedFeatureError(
            f"base: expected a dtype of {', '.join(WEIGHT_DTYPES)}, found {base.dtype.name}; "
            "use an unquantized checkpoint"
        )
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        total = np.asarray(base.astype(np.float32))
        for where, values, scale in terms:
            total[where] += np.float32(scale) * values.astype(np.float32)
        return total.astype(base.dtype)


def find_values(base: Array, tuned: Array) -> tuple[Array, Array]:
    """Find float32 values that, added, turn ``base`` into ``tuned`` exactly, and where they do."""
    # The sums that round to a tuned entry are an interval, which the exact difference is in or
    # borders on. So if any float32 value leads into it, the nearest one or a neighbour does. None
    # does where values near the difference are coarser than the tuned entry, as from 1 to 1e-30.
    limit = np.finfo(np.float32).max
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = tuned.astype(np.float32) - base.astype(np.float32)
    nearest = np.clip(nearest, -limit, limit)
    values, exact = nearest.copy(), ~bits_differ(add_rounded(base, nearest), tuned)
    for side in (-limit, limit):  # never beyond: values are finite
        missed = np.flatnonzero(~exact)
        neighbour = np.nextafter(nearest[missed], side)
        hits = ~bits_differ(add_rounded(base[missed], neighbour), tuned[missed])
        values[missed[hits]], exact[missed[hits]] = neighbour[hits], True
    return values, exact & np.isfinite(values)


def bits_differ(left: Array, right: Array) -> Array:
    """Compare bits, so that NaN equals itself and zeros of two signs differ."""
    bits = np.dtype(f"u{left.dtype.itemsize}")
    differ: Array = left.view(bits) != right.view(bits)
    return differ


class Hash:
    """A SHA-256 over arrays that can be continued in several ways without hashing any twice."""

    def __init__(self, *arrays: Array, after: "Hash | None" = None) -> None:
        """Hash the contiguous little-endian bytes of arrays, one after another."""
        self._sha: hashlib._Hash = after._sha.copy() if after else hashlib.sha256()
        for array in arrays:
            self._sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __str__(self) -> str:
        """Format the digest as records do."""
        return f"sha256:{self._sha.hexdigest()}"


def digest(*arrays: Array) -> str:
    """Hash the contiguous little-endian bytes of arrays, one after another."""
    return str(Hash(*arrays))


def index_dtype(numel: int) -> np.dtype[Any]:
    """Choose the dtype of the flat indices of a tensor."""
    return np.dtype(np.int32 if numel < 2**31 else np.int64)


def refuse(where: str, expected: str, found: object) -> NoReturn:
    """Raise the error for content that breaks a rule of the format."""
    raise CorruptAdapterError(
        f"{where}: expected {expected}, found {found}; do not use this adapter"
    )


def check_indices(name: str, indices: Array, shape: Sequence[int], *, copy: bool = False) -> Array:
    """Check that flat indices are integers, ascending, unique and in range; return them."""
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise CorruptAdapterError(
            f"{name}: expected integer indices of one dimension, found {indices.dtype.name} of "
            f"shape {list(indices.shape)}; write flat row-major indices"
        )
    if not indices.size:
        return indices
    # A mapped file may be sparse: terabytes of zeros that cost their sender nothing. So copy it
    # window by window, and check the copy, which nobody else can change.
    windows, last = [], indices[:0]
    for start in range(0, indices.size, _WINDOW):
        window = np.concatenate([last, indices[start : start + _WINDOW]])
        falls = np.flatnonzero(window[1:] <= window[:-1])
        if falls.size:
            at = int(falls[0])
            found = f"{window[at]} before {window[at + 1]} at position {start - last.size + at}"
            refuse(name, "ascending indices without repeats", found)
        windows += [window[last.size :]] if copy else []
        last = window[-1:]
    if copy:
        indices = np.concatenate(windows)
    numel = math.prod(shape)
    if int(indices[0]) < 0 or int(indices[-1]) >= numel:
        bad = indices[0] if int(indices[0]) < 0 else indices[-1]
        refuse(name, f"indices from 0 to {numel - 1}", bad)
    return indices


def check_finite(name: str, values: Array) -> None:
    """Check that floating values hold no NaN and no infinity."""
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        refuse(name, "finite values", f"{values[bad[0]]} at position {bad[0]}")


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """The change of some entries of one tensor, checked at construction.

    Attributes:
        shape: Shape of the tensor.
        indices: Flat row-major indices of the changed entries, ascending and unique; ``(count,)``.
        values: What to add at these entries, of a dtype in ``DTYPES``, finite; ``(count,)``.

    Example:
        >>> import numpy as np
        >>> from safeweights_peft import SparseDelta
        >>> delta = SparseDelta((2, 3), np.array([1, 5]), np.array([0.5, -1.0], np.float32))
        >>> delta.apply(np.zeros((2, 3), np.float32)).tolist()
        [[0.0, 0.5, 0.0], [0.0, 0.0, -1.0]]
    """

    shape: tuple[int, ...]
    indices: Array
    values: Array

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        if any(size < 0 for size in self.shape) or self.numel > MAX_NUMEL:
            raise CorruptAdapterError(
                f"shape: expected sizes from 0 and fewer than 2**63 entries, found "
                f"{list(self.shape)}; give the tensor's own shape"
            )
        check_indices("indices", self.indices, self.shape)
        if self.values.dtype not in DTYPES.values() or self.values.shape != self.indices.shape:
            raise CorruptAdapterError(
                f"values: expected {self.count} values of a dtype of {', '.join(DTYPES)}, found "
                f"{self.values.dtype.name} of shape {list(self.values.shape)}; give one per index"
            )
        check_finite("values", self.values)

    @classmethod
    def _of_checked(cls, shape: tuple[int, ...], indices: Array, values: Array) -> Self:
        """Build a delta from arrays that a reader has checked already."""
        delta = cls.__new__(cls)
        for name, value in {"shape": shape, "indices": indices, "values": values}.items():
            object.__setattr__(delta, name, value)
        return delta

    @property
    def numel(self) -> int:
        """Number of entries of the whole tensor."""
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """Number of changed entries."""
        return int(self.indices.size)

    def to_dense(self) -> Array:
        """Return the values as a dense tensor.

        Returns:
            An array of ``shape`` in the values' dtype, zero elsewhere.
        """
        dense = np.zeros(self.numel, self.values.dtype)
        dense[self.indices] = self.values
        return dense.reshape(self.shape)

    def gather(self, dense: Array) -> Array:
        """Take the entries of a dense tensor at the indices.

        Args:
            dense: A tensor of ``shape``.

        Returns:
            A copy of its entries; ``(count,)``.

        Raises:
            BaseMismatchError: The shapes differ.
        """
        if dense.shape != self.shape:
            raise BaseMismatchError(
                f"base: expected shape {list(self.shape)}, found {list(dense.shape)}; "
                "use the base that the delta was made for"
            )
        entries: Array = dense.reshape(-1)[self.indices]
        return entries

    def apply(self, base: Array, scale: float = 1.0) -> Array:
        """Add the scaled values to a copy of a dense tensor, by :func:`add_rounded`.

        Args:
            base: A tensor of ``shape``.
            scale: Finite factor on the values.

        Returns:
            The changed copy, in the base's dtype.
        """
        new = np.array(base, order="C")
        new.reshape(-1)[self.indices] = add_rounded(self.gather(base), self.values, scale)
        return new
