"""Encodings: what goes in comes out."""

import numpy as np
import pytest

from safeweights_peft.format import Encoding
from safeweights_peft.format.codec import decode_indices, encode_indices


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize(("numel", "dtype"), [(2**31 - 1, np.int32), (2**31, np.int64)])
def test_indices_survive_every_encoding(encoding: Encoding, numel: int, dtype: type) -> None:
    indices = np.array([0, 7, numel - 1])
    stored = encode_indices(encoding, indices, numel)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(decode_indices(encoding, stored), indices)
