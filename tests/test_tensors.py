"""The torch rule and the numpy rule are one: bitwise, over all 16-bit bases."""

import numpy as np
import pytest
import torch

from safeweights_peft import delta
from safeweights_peft.modeling.tensors import add_rounded, to_numpy, to_torch

VALUES = [0.0, -0.0, 1e-45, 3e-39, 1e-8, 0.003, -0.1, 1 / 3, 1.0, -7.25, 65504.0, 3e38, -3e38]
SCALES = [1.0, 0.5, -1.0, 0.1, 1 / 3, 1e-3, 1e6]


def every_finite(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    bases = bits.view(dtype)
    return bases[bases.isfinite()]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_base_gets_the_same_bits_in_torch_as_in_numpy(dtype, scale):
    bases = every_finite(dtype)
    for value in VALUES:
        values = torch.full(bases.shape, value)
        ours = to_numpy(add_rounded(bases, values, scale))
        theirs = delta.add_rounded(to_numpy(bases), to_numpy(values), scale)
        assert np.array_equal(ours.view(np.int16), theirs.view(np.int16)), value


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
def test_float32_bases_get_the_same_bits_in_torch_as_in_numpy(values_dtype, scale):
    bases, values = torch.randn(100_000), (torch.randn(100_000) * 0.01).to(values_dtype)
    ours = to_numpy(add_rounded(bases, values, scale))
    theirs = delta.add_rounded(to_numpy(bases), to_numpy(values), scale)
    assert np.array_equal(ours.view(np.int32), theirs.view(np.int32))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64]
)
def test_arrays_come_back_as_the_same_tensors(dtype):
    tensor = (torch.randn(7) * 100).to(dtype)
    assert torch.equal(to_torch(to_numpy(tensor)), tensor)
    assert to_torch(to_numpy(tensor)).dtype is dtype


def test_arrays_and_tensors_share_memory_where_it_may_be_written():
    array, tensor = np.zeros(3, np.float32), torch.zeros(3, dtype=torch.bfloat16)
    to_torch(array)[0] = 1
    to_numpy(tensor)[0] = 1
    assert array[0] == tensor[0] == 1
    array.flags.writeable = False
    to_torch(array)[1] = 1
    assert array[1] == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_float8_base_that_was_loaded_in_float32_gets_its_own_dtypes_bits_back(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    every = every[~every.float().isnan()]
    again = to_numpy(every.float().to(dtype))
    assert again.dtype.name == str(dtype).removeprefix("torch.")
    assert again.tobytes() == to_numpy(every).tobytes()
