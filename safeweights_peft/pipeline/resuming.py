"""Where an interrupted job leaves what it goes on from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def work_dir_beside(out: Path, identity: dict[str, Any]) -> Path:
    """Names the checkpoints' directory after everything that the result depends on.

    Args:
        out: where the result will appear; the directory is beside it.
        identity: plain JSON.

    Returns:
        The directory, which need not exist.
    """
    text = json.dumps(identity, sort_keys=True)
    return out.with_name(f".{out.name}.{hashlib.sha256(text.encode()).hexdigest()[:12]}.work")
