"""Work that two processes do together."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_two_processes(work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Runs a function with each process's rank, and with arguments, in a gloo group of two."""
    mp.spawn(_run, (work, folder, arguments), nprocs=2)


def _run(rank: int, work: Callable[..., None], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    work(rank, *arguments)
    # DDP must be gone before its group is. Where it holds the group last, it ends it with the
    # interpreter locked, while a thread of the group waits for that lock: both wait forever.
    gc.collect()
    dist.destroy_process_group()
