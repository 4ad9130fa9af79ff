"""What failures of the system and of libraries are called, in one line with a way out."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from typing import NamedTuple

_MEMORY = "memory: expected enough for this job, found too little ({line}); {less}"


class Failure(NamedTuple):
    """One kind of failure: errors of a class whose message matches, and what is said of them."""

    # By name, with those of its ancestors: no library is imported to be told from others.
    name: str
    pattern: str
    text: str


FAILURES = (
    Failure("MemoryError", "", _MEMORY),
    Failure("OutOfMemoryError", "", _MEMORY),  # torch's on a GPU
    Failure(
        "RuntimeError",
        "DefaultCPUAllocator|unable to mmap|[Oo]ut of memory|start new thread",
        _MEMORY,
    ),
    Failure("OSError", "Cannot allocate memory", _MEMORY),
    Failure(
        "SafetensorError",
        "No space left|os error 28",
        "{place}: expected to be written, found {line}; free some space, and call again",
    ),
    Failure(
        "SafetensorError",
        "",
        "a .safetensors file: expected a whole one, found {line}; fetch the model or the adapter "
        "again",
    ),
    Failure(
        "UnpicklingError",
        "",
        "a pickled file: expected weights, found {line}; convert the model with transformers: "
        "save_pretrained writes safetensors",
    ),
    Failure(
        "TemplateError",
        "",
        "a chat template: expected one that renders a request, found {line}; use another template",
    ),
)

# What the system says, and the way out.
_SYSTEM = {
    errno.ENOSPC: "free some space, and call again",
    errno.EDQUOT: "free some of your quota, and call again",
    errno.EROFS: "give a path that can be written",
    errno.EACCES: "give another path, or ask for permission",
    errno.EPERM: "give another path, or ask for permission",
    errno.EFBIG: "give a path on a file system that takes larger files, or raise `ulimit -f`",
    errno.EMFILE: "raise `ulimit -n`, and call again",
    errno.EIO: "check the disk, and call again",
}

# Options that take less memory, of the commands that have them.
_LESS = {
    "--layers-per-pass": "--layers-per-pass 1",
    "--batch-size": "a smaller --batch-size",
    "--harmful-batch-size": "a smaller --harmful-batch-size",
    "--benign-batch-size": "a smaller --benign-batch-size",
    "--dtype": "--dtype bfloat16 if the model is stored so",
}
_IN_SETTINGS = "smaller batch sizes and score.layers_per_pass = 1 in --settings"


def describe_failure(error: BaseException, place: object, flags: Iterable[str]) -> str | None:
    """Say in one line what failed, where something is written to a place; None for a bug."""
    names = {ancestor.__name__ for ancestor in type(error).__mro__}
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
    for failure in FAILURES:
        if failure.name in names and re.search(failure.pattern, str(error)):
            ways = [way for flag, way in _LESS.items() if flag in flags]
            if ways == [_LESS["--dtype"]] and "--settings" in flags:  # as of `enhance`
                ways.insert(0, _IN_SETTINGS)
            less = f"give {', or '.join(ways)}, or use" if ways else "use"
            less += " a machine with more memory"
            return failure.text.format(line=line, place=place, less=less)
    if not isinstance(error, OSError):
        return None
    if error.errno is None or error.strerror is None:  # ours, with a message of its own
        return str(error)
    advice = _SYSTEM.get(error.errno, "see the message, and call again")
    where = error.filename if error.filename is not None else place
    return f"{where}: expected to be read or written, found {error.strerror}; {advice}"
