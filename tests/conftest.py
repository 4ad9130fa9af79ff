"""Shared set-up: offline, seeded, single-threaded, and the tiny models saved once per session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and tables would fold

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_models import (
    save_tiny_llama,
    save_tiny_mixtral,
    save_tiny_qwen3_moe,
    save_tiny_tokenizer,
)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # libraries under test may use the global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Llama with a tokenizer."""
    return save_tiny_tokenizer(save_tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="session")
def tiny_llama_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama with a tokenizer."""
    path = save_tiny_llama(tmp_path_factory.mktemp("llama-bf16"), dtype=torch.bfloat16)
    return save_tiny_tokenizer(path)


@pytest.fixture(scope="session")
def tiny_tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama whose lm_head is its embedding matrix, with a tokenizer."""
    path = tmp_path_factory.mktemp("tied-llama")
    return save_tiny_tokenizer(save_tiny_llama(path, tied=True, dtype=torch.bfloat16))


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Mixtral with a tokenizer."""
    path = save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"), dtype=torch.bfloat16)
    return save_tiny_tokenizer(path)


@pytest.fixture(scope="session")
def tiny_qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Qwen3-MoE with a tokenizer."""
    path = save_tiny_qwen3_moe(tmp_path_factory.mktemp("qwen3-moe"), dtype=torch.bfloat16)
    return save_tiny_tokenizer(path)
