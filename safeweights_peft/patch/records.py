"""What an adapter records about one parameter, and whose entries a model holds there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Flag, StrEnum
from typing import Any

import numpy as np

from safeweights_peft.delta import WEIGHT_DTYPES, Array, digest
from safeweights_peft.errors import (
    AlreadyMergedError,
    BaseMismatchError,
    CorruptAdapterError,
    FormatError,
)
from safeweights_peft.patch.groups import Group, count_groups
from safeweights_peft.patch.placement import STEPS, Block, Stream
from safeweights_peft.tables import short_digest

# PEFT expects it before the name of every tensor of an adapter.
_PREFIX = "base_model.model."


class State(Flag):
    """Whose entries a model holds; ``&`` combines parameters."""

    OTHER = 0
    BASE = 1
    MERGED = 2
    EITHER = 3  # where merging changes nothing


class Mode(StrEnum):
    """Kind of artifact: a safety patch (SET) or a safety map (SPA)."""

    SET = "set"
    SPA = "spa"

    @property
    def artifact(self) -> str:
        """Name of the kind, for messages."""
        return "safety patch" if self is Mode.SET else "safety map"

    @property
    def content(self) -> str:
        """Kind of stream that goes with the indices."""
        return "values" if self is Mode.SET else "scores"

    @property
    def safe_state(self) -> State:
        """State of a model that has the artifact's safety."""
        return State.MERGED if self is Mode.SET else State.BASE


class Encoding(StrEnum):
    """Layout of indices and values; a reader refuses any other name."""

    PLAIN = "plain"
    COMPACT = "compact"
    ROWS = "rows"
    COLUMNS = "columns"

    @property
    def group(self) -> Group | None:
        """What the stored numbers count, where they are no flat indices."""
        groups: dict[str, Group] = {"rows": "row", "columns": "column"}
        return groups.get(self)


LINES = (Encoding.ROWS, Encoding.COLUMNS)


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """What an adapter records about one parameter."""

    shape: tuple[int, ...]  # in memory
    dtype: str  # in the checkpoint, a key of WEIGHT_DTYPES
    count: int = 0
    blocks: tuple[Block, ...]
    tied_keys: tuple[str, ...] = ()  # tensors to edit alike, where a checkpoint has them
    encoding: Encoding = Encoding.PLAIN
    streams: Mapping[str, Stream] = field(default_factory=dict)  # empty unless compact
    digest: str | None = None  # of the stored bytes: indices, then values or scores
    # Of plain indices, in a map with scores: the same in every encoding. None in format 1.0.
    content_digest: str | None = None
    base_digest: str | None = None  # of the base's entries at the indices, in `dtype`
    merged_digest: str | None = None  # of the merged entries at the adapter's scale; None in a map

    @property
    def numel(self) -> int:
        """Number of entries of the parameter."""
        return math.prod(self.shape)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every checkpoint key that the record names."""
        return tuple(block.key for block in self.blocks) + self.tied_keys

    @property
    def needs_base(self) -> bool:
        """Whether the values are stored as steps from the base's entries."""
        return self.stream("values").coding in STEPS

    @property
    def index_count(self) -> int:
        """Number of indices, or of rows or columns, as they are stored if they are not coded."""
        group = self.encoding.group
        return self.count if group is None else self.count // count_groups(self.shape, group)[1]

    def stream(self, kind: str) -> Stream:
        """Return how a stream is laid out."""
        return self.streams.get(kind, Stream())

    def frames(self, kind: str, plain: np.dtype[Any]) -> tuple[int, ...]:
        """List the decompressed size of each frame; ``plain`` is the dtype of plain entries."""
        stream = self.stream(kind)
        coded = WEIGHT_DTYPES[self.dtype] if stream.coding in STEPS else plain
        return stream.frames(self.count, coded.itemsize)


def state_of(entries: Array, record: TensorRecord) -> State:
    """Tell by digest whose entries, at a record's indices, these are; ``(count,)``."""
    # The same bytes in another dtype, as zeros are, belong to another model.
    if entries.dtype != WEIGHT_DTYPES[record.dtype]:
        return State.OTHER
    found, state = digest(entries), State.OTHER
    if found == record.base_digest:
        state |= State.BASE
    if found == record.merged_digest:
        state |= State.MERGED
    return state


def check_state(
    name: str,
    entries: Array,
    record: TensorRecord,
    expected: State = State.BASE,
    *,
    artifact: str = "adapter",
    hint: str = "give that one",
) -> State:
    """Return which of the expected states entries are in; refuse any other."""
    if expected is State.MERGED and record.merged_digest is None:
        raise FormatError(
            f"{name}: expected a merged_digest in the safety patch, found null; save the patch "
            "with save_pretrained, which computes it, and give its directory"
        )
    state = state_of(entries, record)
    if state & expected:
        return state & expected
    if state is State.MERGED:
        raise AlreadyMergedError(
            f"{name}: expected the base's entries, found the {artifact}'s merged ones; "
            "use the model as it is, or give the original base"
        )
    if state is State.BASE:
        raise BaseMismatchError(
            f"{name}: expected the base with the safety patch merged in, found the base without "
            "it; merge the patch first"
        )
    model, own = f"base that the {artifact} was made for", record.base_digest
    if expected is State.MERGED:
        model, own = "base with the safety patch merged in at its own scale", record.merged_digest
    raise BaseMismatchError(
        f"{name}: expected the {model} (entries of digest {short_digest(str(own))}), found "
        f"another ({short_digest(digest(entries))}); {hint}"
    )


def entries_by_block(
    record: TensorRecord, indices: Array
) -> dict[str, tuple[Array | slice, Array]]:
    """Group a parameter's entries by the checkpoint tensor that holds them."""
    return {block.key: block.locate(indices) for block in record.blocks}


def indices_key(parameter: str) -> str:
    """Name the safetensors entry that holds a parameter's indices."""
    return tensor_key(parameter, "indices")


def values_key(parameter: str) -> str:
    """Name the safetensors entry that holds a parameter's values."""
    return tensor_key(parameter, "values")


def tensor_key(parameter: str, kind: str) -> str:
    """Name the safetensors entry of a parameter's "indices", "values" or "scores"."""
    module, _, own = parameter.rpartition(".")
    if not module or not own:
        raise CorruptAdapterError(
            f"{parameter}: expected a parameter of a named module, found none; "
            "select parameters of submodules only"
        )
    return f"{_PREFIX}{module}.safeweights_{kind}__{own}"
