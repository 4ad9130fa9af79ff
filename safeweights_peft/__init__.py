"""Safety patches for language models: find, train, protect and share the weights that matter.

Importing this package is enough for PEFT and transformers to load safety patches, whether it comes
before them or after. It is light: ``__init__.pyi`` lists the public names, and each is imported
when it is first used.
"""

from safeweights_peft.startup import end_at_interrupts

end_at_interrupts()  # before the other imports, which take longer

# isort: split
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

import lazy_loader  # noqa: E402
from wrapt import when_imported  # noqa: E402

_find, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and seldom asked for

        return version("safeweights-peft")
    return _find(name)


@when_imported("peft")
def _register(_: ModuleType) -> None:
    from safeweights_peft.tuner.model import register

    register()
