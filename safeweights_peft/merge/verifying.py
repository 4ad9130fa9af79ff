"""Check an adapter by itself, and against a checkpoint."""

from dataclasses import dataclass

from safeweights_peft.checkpoint import CheckpointReader
from safeweights_peft.errors import SafeWeightsError
from safeweights_peft.format import read_artifact, read_metadata
from safeweights_peft.merge.fit import PathLike, base_state


@dataclass(frozen=True)
class Check:
    """One result of :func:`verify`.

    Attributes:
        name: What was checked: "config", "tensors" or "base".
        ok: Whether it holds.
        detail: What was found.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """The results of :func:`verify`, up to the first that does not hold.

    Attributes:
        checks: The results, in order.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)


def verify(adapter_dir: PathLike, base_dir: PathLike | None = None) -> VerifyReport:
    """Check an adapter by itself, and against a checkpoint if one is given.

    Args:
        adapter_dir: A safety patch or a safety map.
        base_dir: A checkpoint; the base and the merged model both pass, and the detail tells which.

    Returns:
        The results; a broken adapter is a result, not an exception.
    """
    checks: list[Check] = []
    step = "config"
    try:
        metadata = read_metadata(adapter_dir)
        checks.append(Check(step, True, f"{metadata.mode}, {len(metadata.tensors)} parameters"))
        step = "tensors"
        artifact = read_artifact(adapter_dir)
        entries = sum(part.size for part in artifact.indices.values())
        checks.append(Check(step, True, f"{entries} entries, as the config says"))
        if base_dir is not None:
            step = "base"
            state = base_state(CheckpointReader(base_dir), metadata, artifact.indices)
            checks.append(Check(step, True, f"holds the {state} values"))
    except SafeWeightsError as reason:
        checks.append(Check(step, False, str(reason)))
    return VerifyReport(tuple(checks))
