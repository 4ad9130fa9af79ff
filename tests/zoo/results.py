"""What became of an architecture: run its steps, keep the outcomes on disk."""

import json
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers

from safeweights_peft.errors import SafeWeightsError
from tests.zoo.journey import STEPS, Journey, Step

OK, REFUSED, FAULT = "ok", "refused", "fault"
NOT_BUILT, NOT_REACHED = "not built", "not reached"
LONGEST_LINE = 500  # of a refusal: more is no line
PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Outcome:
    """How a step ended: one of the words above."""

    step: str
    status: str
    message: str = ""
    seconds: float = 0.0


@dataclass
class Result:
    """All outcomes of an architecture."""

    name: str
    kind: str = ""
    outcomes: list[Outcome] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def having(self, status: str) -> dict[str, str]:
        """List the messages of the steps that ended so."""
        return {each.step: each.message for each in self.outcomes if each.status == status}


def run_architecture(name: str) -> Result:
    """Send an architecture through all steps, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of architectures and libraries that aren't ours
        transformers.logging.disable_progress_bar()
        journey = Journey(name, Path(folder))
        first, *others = STEPS
        outcomes = [_try(first, journey)]
        if outcomes[0].status == OK:
            outcomes += [_try(step, journey) for step in others]
        else:  # no fault of the package's
            outcomes = [replace(outcomes[0], status=NOT_BUILT)]
    return Result(name, journey.kind, outcomes, {each: version(each) for each in PACKAGES})


def write_result(result: Result, path: Path) -> None:
    """Keep a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> Result:
    """Read a result that was kept."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Result(**{**record, "outcomes": [Outcome(**each) for each in record["outcomes"]]})


def _try(step: Step, journey: Journey) -> Outcome:
    if step.needs and not journey.path(step.needs).exists():
        return Outcome(step.name, NOT_REACHED, f"needs {step.needs}")
    began = time.monotonic()
    try:
        step.run(journey)
        status, message = OK, ""
    except Exception as error:
        status, message = judge(error)
        message = message.replace(f"{journey.folder}/", "")
        _try_instead(step, journey)
    return Outcome(step.name, status, message, round(time.monotonic() - began, 1))


def judge(error: Exception) -> tuple[str, str]:
    """Tell a refusal in one line from a fault."""
    if isinstance(error, AssertionError):
        return FAULT, str(error)
    if not isinstance(error, SafeWeightsError):
        frames = traceback.extract_tb(error.__traceback__)[-1:]
        where = "".join(f" ({Path(each.filename).name}:{each.lineno})" for each in frames)
        return FAULT, f"{type(error).__name__}: {str(error)[:LONGEST_LINE]}{where}"
    line = str(error)
    if "\n" in line or len(line) > LONGEST_LINE:
        return FAULT, f"refused in {len(line)} characters: {line[:LONGEST_LINE]}"
    return REFUSED, line


def _try_instead(step: Step, journey: Journey) -> None:
    if step.instead is not None:
        try:
            step.instead(journey)
        except Exception:  # later steps say that they weren't reached
            return
