"""A safety patch in the coordinates of a checkpoint, for programs that patch weights themselves.

The normative text is ``docs/export.md``. What PEFT reads is made in ``pipeline``, with torch.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import Array, index_dtype
from safeweights_peft.errors import MergeError
from safeweights_peft.files import check_apart, check_target, publish, write_json
from safeweights_peft.merging.gather import PathLike, copies
from safeweights_peft.merging.sums import merged_entries
from safeweights_peft.patch.artifacts import AnyPatch
from safeweights_peft.patch.io import read_patch
from safeweights_peft.patch.records import entries_by_block

HEADER_FILE = "patch.json"
TENSORS_FILE = "patch.safetensors"
PATCH_FORMAT = "safeweights-vllm-patch"
PATCH_VERSION = 1


def export_vllm_patch(
    adapter_dir: PathLike, base_dir: PathLike, out_dir: PathLike, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write what a safety patch makes of its base's tensors: for each key, indices and new entries.

    The entries are those of a merged checkpoint, so whoever writes them over the base's has it.
    """
    check_target(Path(out_dir), overwrite, MergeError)
    check_apart(Path(out_dir), {"base_dir": base_dir, "adapter_dir": adapter_dir}, MergeError)
    adapter, reader = read_patch(adapter_dir), CheckpointReader(base_dir)
    found = _entries_by_key(reader, adapter)
    header = {
        "format": PATCH_FORMAT,
        "version": PATCH_VERSION,
        "base_model_name_or_path": adapter.metadata.base_model_name_or_path,
        "revision": adapter.metadata.revision,
        "tensors": {
            key: {
                "shape": list(reader.info(key).shape),
                "dtype": reader.info(key).dtype,
                "count": indices.size,
            }
            for key, (indices, _) in found.items()
        },
    }
    tensors = {f"indices/{key}": indices for key, (indices, _) in found.items()}
    tensors |= {f"values/{key}": entries for key, (_, entries) in found.items()}
    with publish(Path(out_dir), overwrite, MergeError) as draft:
        write_json(draft / HEADER_FILE, header)
        save_file(tensors, draft / TENSORS_FILE, metadata={"format": "pt"})
        size_bytes = (draft / TENSORS_FILE).stat().st_size
    return {
        "out_dir": str(out_dir),
        "tensors": len(found),
        "entries": sum(indices.size for indices, _ in found.values()),
        "size_bytes": size_bytes,
    }


def _entries_by_key(reader: CheckpointReader, adapter: AnyPatch) -> dict[str, tuple[Array, Array]]:
    """Sort merged entries by the tensor on disk that holds them; tied copies get the same."""
    found = {}
    for name, (indices, entries) in merged_entries(reader, [adapter]).items():
        for copy in copies(reader, adapter.metadata.tensors[name]):
            for key, (positions, local) in entries_by_block(copy, indices).items():
                if local.size:
                    order = np.argsort(local)  # a transposed tensor has them in another order
                    dtype = index_dtype(math.prod(reader.info(key).shape))
                    found[key] = local[order].astype(dtype), entries[positions][order]
    return dict(sorted(found.items()))
