"""How indices and values are laid out in the file: one pair of pure functions per encoding.

Here live encoding and decoding. Checks on what was decoded do not: see ``io``. Format version 1 has
the one encoding "plain"; another is another member of ``Encoding`` and another case here.
"""

from typing import assert_never

from safeweights_peft.delta import Array, index_dtype
from safeweights_peft.format.metadata import Encoding


def encode_indices(encoding: Encoding, indices: Array, numel: int) -> Array:
    """Turn flat indices into what is stored.

    Args:
        encoding: The layout.
        indices: Ascending flat indices; ``(count,)``.
        numel: Number of entries of their tensor.

    Returns:
        The stored array.
    """
    match encoding:
        case Encoding.PLAIN:
            return indices.astype(index_dtype(numel), copy=False)
        case _:
            assert_never(encoding)


def decode_indices(encoding: Encoding, stored: Array) -> Array:
    """Turn what is stored into flat indices; undoes :func:`encode_indices`.

    Args:
        encoding: The layout.
        stored: The stored array, not checked yet.

    Returns:
        The indices, to be checked by the caller.
    """
    match encoding:
        case Encoding.PLAIN:
            return stored
        case _:
            assert_never(encoding)
