"""gradleak: how much private training data can be rebuilt from the updates that federated-learning clients share?"""

import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

# OpenMP threads that wait busily make rounds 3 to 10 times slower on a machine with other work (docs/performance.md), and
# threads that sleep at once wake up late: libgomp waits for some microseconds, other runtimes sleep. Read when torch is
# first imported, so it must come before
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}

if TYPE_CHECKING:
    from gradleak.api import *  # noqa: F403

try:
    __version__ = version("gradleak")
except PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0"


#: Public functions that have the names of their modules.
_FUNCTIONS = ("evaluate", "invert")


class _Package(ModuleType):
    """Loads what is first asked for: a module, or all public names. torch takes seconds, and `gradleak --help` needs none."""

    def __getattr__(self, name: str) -> Any:
        if name != "__all__":
            if name.startswith("__"):
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            if name not in _FUNCTIONS and find_spec(f"{__name__}.{name}") is not None:
                return import_module(f"{__name__}.{name}")
        api = import_module("gradleak.api")
        globals().update({public: getattr(api, public) for public in api.__all__}, __all__=api.__all__)
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __setattr__(self, name: str, value: object) -> None:
        # python puts each module here when it is first imported, and the functions must stay
        if not (name in _FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray sends functions to its workers with the modules that they use, and knows only plain ones
        return import_module, (self.__name__,)

    def __dir__(self) -> list[str]:
        return sorted({*globals(), *import_module("gradleak.api").__all__})


sys.modules[__name__].__class__ = _Package
