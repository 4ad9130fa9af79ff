"""An adapter's entries in a checkpoint: where they are, what they hold, whose they are."""

from dataclasses import replace

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import WEIGHT_DTYPES, Array, digest
from safeweights_peft.errors import BaseMismatchError
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.records import Mode, State, TensorRecord, entries_by_block, state_of
from safeweights_peft.tables import short_digest


def find_state(reader: CheckpointReader, artifact: Artifact) -> State:
    """Return whose entries a checkpoint and its tied copies hold; refuse others and a mixture."""
    metadata, indices, state = artifact.metadata, artifact.indices, State.EITHER
    for name, record in metadata.tensors.items():
        for copy in find_copies(reader, record):
            entries = gather_entries(reader, name, copy, indices[name])
            own = state_of(entries, record)
            if not state & own:
                # What other parameters have ruled out is no longer expected of this one: a half
                # merged base is neither a base nor a merged model.
                base = metadata.base_model_name_or_path or "the base of the adapter"
                base += f" at revision {metadata.revision}" if metadata.revision else ""
                digests = {
                    State.BASE: (record.base_digest, base),
                    State.MERGED: (record.merged_digest, f"{base} with the patch merged in"),
                }
                recorded = [digests[left] for left in state]
                expected = [f"{short_digest(own)} ({whose})" for own, whose in recorded if own]
                key = "" if copy.keys[0] == name else f"{copy.keys[0]} of "
                raise BaseMismatchError(
                    f"{name}: expected in {key}{reader.directory} the values with digest "
                    f"{' or '.join(expected)}, found {short_digest(digest(entries))} (another "
                    f"model); use {base}"
                )
            state &= own
    return state


def check_safety(reader: CheckpointReader, artifact: Artifact) -> None:
    """Check that a checkpoint holds a map's base, or a patch's base with the patch merged in."""
    try:
        state = find_state(reader, artifact)
    except BaseMismatchError as error:
        if artifact.metadata.mode is not Mode.SPA:
            raise
        # A patch that was trained on the map changes its entries: the likeliest mistake.
        raise BaseMismatchError(
            f"{error}; or give the patch as --map, where one is merged into {reader.directory}"
        ) from error
    if not state & artifact.metadata.mode.safe_state:
        raise BaseMismatchError(
            f"{reader.directory}: expected the base with the safety patch merged in, found it "
            "without; give the checkpoint that `safeweights merge` wrote"
        )


def gather_entries(
    reader: CheckpointReader, name: str, record: TensorRecord, indices: Array
) -> Array:
    """Read a parameter's entries from the checkpoint tensors that hold them; ``(count,)``."""
    placed = _place(reader, record)
    for block in placed.blocks:
        reader.check_tensor(
            block.key,
            block.shape,
            record.dtype,
            name=name,
            error=BaseMismatchError,
            hint="use the base that the adapter was made for",
        )
    pieces = entries_by_block(placed, indices)
    return reader.gather_pieces(pieces, indices.size, WEIGHT_DTYPES[record.dtype])


def find_copies(reader: CheckpointReader, record: TensorRecord) -> list[TensorRecord]:
    """Return a record in the checkpoint's own keys, then one for each tied copy that is there."""
    placed = _place(reader, record)
    own = placed.blocks[0]
    # Two keys may be one tensor here, where the prefix that told them apart is not saved.
    tied = dict.fromkeys(map(reader.find_key, record.tied_keys))
    keys = [key for key in tied if key not in (None, own.key)]
    return [placed, *(replace(placed, blocks=(replace(own, key=str(key)),)) for key in keys)]


def _place(reader: CheckpointReader, record: TensorRecord) -> TensorRecord:
    # A file may hold a tied tensor by another of its names (tied tensors are one block). A key that
    # is nowhere stays as it is, for the message of whoever reads it.
    blocks = []
    for block in record.blocks:
        keys = map(reader.find_key, (block.key, *record.tied_keys))
        blocks.append(replace(block, key=next(filter(None, keys), block.key)))
    return replace(record, blocks=tuple(blocks), tied_keys=())
