"""Safety patches and safety maps in memory.

Here live what reading gives and writing takes. Files do not: see ``io``.
"""

from dataclasses import dataclass, replace

from safeweights_peft.delta import Array, SparseDelta
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Encoding
from safeweights_peft.patch.stored import BaseEntries, StoredEntries


@dataclass(frozen=True, eq=False)
class Adapter:
    """A safety patch.

    Attributes:
        metadata: Its description, of mode "set".
        deltas: The change of each parameter, by its name in memory.
    """

    metadata: AdapterMetadata
    deltas: dict[str, SparseDelta]

    @property
    def indices(self) -> dict[str, Array]:
        """The flat indices of each parameter's entries, as a safety map has them; ``(count,)``."""
        return {name: delta.indices for name, delta in self.deltas.items()}

    def values(self, name: str, base: Array) -> Array:
        """Give the values of a parameter.

        Args:
            name: The parameter.
            base: The base's entries at its indices, checked; ``(count,)``.

        Returns:
            The values; ``(count,)``.
        """
        return self.deltas[name].values


@dataclass(frozen=True, eq=False)
class EncodedPatch:
    """A safety patch whose values are steps from the entries of a base that is not read yet.

    Attributes:
        metadata: Its description, of mode "set".
        entries: What is stored of each parameter, by its name in memory.
    """

    metadata: AdapterMetadata
    entries: dict[str, StoredEntries]

    @property
    def indices(self) -> dict[str, Array]:
        """The flat indices of each parameter's entries, as a safety map has them; ``(count,)``."""
        return {name: each.indices for name, each in self.entries.items()}

    def values(self, name: str, base: Array) -> Array:
        """Give the values of a parameter."""
        return self.entries[name].values_at(base)

    def decode(self, base: BaseEntries | None = None) -> Adapter:
        """Give the patch with its values."""
        deltas = {}
        for name, each in self.entries.items():
            wanted = base is not None and each.record.needs_base
            own = base(name, each.record, each.indices) if base is not None and wanted else None
            values = each.values(own)
            deltas[name] = SparseDelta._of_checked(each.record.shape, each.indices, values)
        return Adapter(self.metadata, deltas)


@dataclass(frozen=True, eq=False)
class SafetyMap:
    """A safety map.

    Attributes:
        metadata: Its description, of mode "spa".
        indices: The flat indices of each parameter's entries, by its name in memory; ``(count,)``.
        scores: The float32 score of each of these entries; ``(count,)``.
    """

    metadata: AdapterMetadata
    indices: dict[str, Array]
    scores: dict[str, Array]


AnyPatch = Adapter | EncodedPatch
"""A safety patch: each form has ``metadata``, ``indices`` and ``values`` on a base."""

Artifact = Adapter | EncodedPatch | SafetyMap
"""What a directory may hold; each has ``metadata`` and ``indices``."""


def in_encoding(metadata: AdapterMetadata, encoding: Encoding) -> AdapterMetadata:
    """Ask for an encoding of every parameter."""
    tensors = {
        name: replace(record, encoding=encoding, streams={}, digest=None)
        for name, record in metadata.tensors.items()
    }
    return replace(metadata, tensors=tensors)
