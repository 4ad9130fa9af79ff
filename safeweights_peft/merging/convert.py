"""Write an adapter again in another encoding, and prove that it is still the same adapter."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import Array, SparseDelta, bits_differ
from safeweights_peft.errors import FormatError
from safeweights_peft.files import PathLike, check_apart, check_target, publish
from safeweights_peft.merging.sums import (
    ParameterEntries,
    add_up,
    combine,
    describe_patch,
    gather_base,
)
from safeweights_peft.patch.artifacts import Adapter, Artifact, SafetyMap, StoredPatch, in_encoding
from safeweights_peft.patch.io import (
    file_bytes,
    read_adapter,
    read_artifact,
    read_map,
    write_adapter,
    write_map,
)
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Encoding, TensorRecord

_CHOICES = (Encoding.PLAIN, Encoding.COMPACT)  # the others follow from what is selected


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did."""

    out_dir: str
    encoding: str  # that was asked for
    content_id: str  # the adapter's, in either encoding
    entries: int
    changed_values: int  # that are other numbers now, with the same merged entries
    before_bytes: int  # of the tensors, as everywhere
    after_bytes: int
    before_bytes_per_entry: float
    after_bytes_per_entry: float


def convert(
    adapter_dir: PathLike,
    encoding: Encoding | str,
    out_dir: PathLike,
    base_dir: PathLike | None = None,
    *,
    overwrite: bool = False,
) -> ConvertReport:
    """Write a safety patch or a safety map in another encoding.

    With a base, and at scale 1, the compact encoding stores a patch's values as steps from the
    base's entries. Then the merged entries stay the same, bit for bit, and a value becomes the
    difference of the two. Without a base, values keep their bits.

    Args:
        adapter_dir: The patch or map.
        encoding: "plain" or "compact"; a parameter that is not smaller compact stays plain. What
            is plain and fills whole rows or columns is stored by their numbers.
        out_dir: The new directory, which appears whole or not at all.
        base_dir: The base's checkpoint; also needed to turn steps into values again.
        overwrite: Replace an existing non-empty directory, whatever it holds.

    Returns:
        What was converted.

    Raises:
        FormatError: What was written is not the same adapter, or ``out_dir`` is in the way of an
            input.

    Example:
        >>> from safeweights_peft import convert
        >>> report = convert("demo/run/patch", "plain", "plain", "demo/base")
        >>> report.content_id.startswith("sha256:")
        True
    """
    if encoding not in _CHOICES:
        raise FormatError(
            f"encoding: expected one of {', '.join(_CHOICES)}, found {encoding!r}; choose one"
        )
    check_target(Path(out_dir), overwrite, FormatError)
    inputs = {"the adapter": adapter_dir} | ({"the base": base_dir} if base_dir else {})
    check_apart(Path(out_dir), inputs, FormatError)
    before = read_artifact(adapter_dir)
    base: list[ParameterEntries] | None = None
    if base_dir is not None and not isinstance(before, SafetyMap):
        # Read once, and held: at 1 % of the weights it is small. Another base is refused here, by
        # the names that were given, not by the draft's.
        patches = combine([describe_patch(before, str(adapter_dir))])
        base = list(gather_base(CheckpointReader(base_dir), patches))
    with publish(Path(out_dir), overwrite, FormatError) as draft:
        if isinstance(before, SafetyMap):
            metadata, changed = _write_map(draft, before, Encoding(encoding)), 0
        else:
            metadata, changed = _write_patch(draft, before, Encoding(encoding), base)
        if metadata.content_id != before.metadata.content_id:
            raise FormatError(
                f"{out_dir}: expected content id {before.metadata.content_id}, found "
                f"{metadata.content_id}; this is a defect, keep {adapter_dir}"
            )
        sizes = [file_bytes(path)[1] for path in (adapter_dir, draft)]
    entries = sum(record.count for record in metadata.tensors.values())
    return ConvertReport(
        out_dir=str(out_dir),
        encoding=Encoding(encoding).value,
        content_id=str(metadata.content_id),
        entries=entries,
        changed_values=changed,
        before_bytes=sizes[0],
        after_bytes=sizes[1],
        before_bytes_per_entry=sizes[0] / max(entries, 1),
        after_bytes_per_entry=sizes[1] / max(entries, 1),
    )


def _write_map(draft: Path, safety_map: SafetyMap, encoding: Encoding) -> AdapterMetadata:
    write_map(draft, replace(safety_map, metadata=in_encoding(safety_map.metadata, encoding)))
    written = read_map(draft)
    _count_changed(written, safety_map.scores, written.scores, exact=True)
    return written.metadata


def _write_patch(
    draft: Path,
    patch: StoredPatch,
    encoding: Encoding,
    parameters: Sequence[ParameterEntries] | None,  # as the base holds them
) -> tuple[AdapterMetadata, int]:
    """Write a patch, and count the values that become other numbers with the same result."""
    held = {entries.name: entries.base for entries in parameters or ()}

    def read_held(name: str, record: TensorRecord, indices: Array) -> Array:
        return held[name]

    base = None if parameters is None else read_held
    before = patch.decode(base)
    draft_patch = replace(before, metadata=in_encoding(before.metadata, encoding))
    stepped = encoding is Encoding.COMPACT and base is not None and before.metadata.may_need_base
    write_adapter(draft, _widen(draft_patch) if stepped else draft_patch, base=base)
    written = read_adapter(draft, base)
    summary = describe_patch(written, str(draft))
    again = [replace(entries, terms=[(summary, ...)]) for entries in parameters or ()]
    deque(add_up(again), maxlen=0)  # compares with the merged digests
    first, second = (
        {name: delta.values for name, delta in adapter.deltas.items()}
        for adapter in (before, written)
    )
    return written.metadata, _count_changed(written, first, second, exact=not stepped)


def _widen(adapter: Adapter) -> Adapter:
    # Steps stand for float32 values; widening changes none.
    deltas = {
        name: SparseDelta(delta.shape, delta.indices, delta.values.astype(np.float32))
        for name, delta in adapter.deltas.items()
    }
    return Adapter(replace(adapter.metadata, values_dtype="float32"), deltas)


def _count_changed(
    written: Artifact, before: Mapping[str, Array], after: Mapping[str, Array], *, exact: bool
) -> int:
    changed = 0
    for name, values in before.items():
        differ = int(bits_differ(values.astype(np.float32), after[name].astype(np.float32)).sum())
        if differ and exact:
            raise FormatError(
                f"{name}: expected the same numbers in the {written.metadata.mode.artifact} as "
                f"before, found {differ} others; this is a defect, keep the old one"
            )
        changed += differ
    return changed
