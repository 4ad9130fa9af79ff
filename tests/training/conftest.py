"""What all tests of training share."""

import pytest

from safeweights_peft.training import finetune


@pytest.fixture(autouse=True)
def _checkpoint_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "SAVE_SECONDS", 0)
