"""Which shard of a checkpoint directory holds which tensor.

Here live the index and the checks on shard names. Tensor data does not: see ``reader``.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from safeweights_peft.errors import CheckpointError
from safeweights_peft.files import read_header, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLED = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class CheckpointIndex:
    """The shards of a checkpoint.

    Attributes:
        directory: Where they lie.
        weight_map: The shard's file name for each key.
    """

    directory: Path
    weight_map: dict[str, str]

    @property
    def shards(self) -> list[str]:
        """The file names of the shards, sorted."""
        return sorted(set(self.weight_map.values()))


def open_index(directory: Path) -> CheckpointIndex:
    """Find the shards of a checkpoint, from its only file or from its index."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found both; remove the stale one"
        )
    if single.is_file():
        keys = read_header(single, CheckpointError)
        return CheckpointIndex(directory, dict.fromkeys(keys, SINGLE_FILE))
    if not index.is_file():
        raise CheckpointError(_nothing_found(directory))
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map: expected an object of shard names, found "
            f"{type(weight_map).__name__}; fetch the index again"
        )
    for key, shard in weight_map.items():
        _check_shard_name(index, key, shard)
    found = CheckpointIndex(directory, weight_map)
    for shard in found.shards:
        if not (directory / shard).is_file():
            raise CheckpointError(
                f"{directory / shard}: expected a shard that {INDEX_FILE} names, found no file; "
                "fetch the checkpoint again"
            )
    return found


def _nothing_found(directory: Path) -> str:
    if any(next(directory.glob(pattern), None) for pattern in _PICKLED):
        found = "only pickled weights, which can run code when they are loaded"
        hint = "convert them with transformers: save_pretrained writes safetensors"
    else:
        found, hint = "neither", "give the directory of a model, not of an adapter"
    return f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found {found}; {hint}"


def _check_shard_name(index: Path, key: str, shard: object) -> None:
    """Refuse names that could leave the directory, on this system or on another."""
    plain = (
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and shard.isprintable()
        and ":" not in shard
        and PurePosixPath(shard).name == shard
        and PureWindowsPath(shard).name == shard
    )
    if not plain:
        raise CheckpointError(
            f"{index}: {key[:200]}: expected a file name ending in .safetensors without a path, "
            f"found {str(shard)[:200]!r}; do not use this checkpoint"
        )
