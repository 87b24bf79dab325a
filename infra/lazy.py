"""Import a module when it is first used.

`longreach plan` imports files that use numpy only in other commands; importing numpy would double
its response time.

    if TYPE_CHECKING:
        import numpy as np
    else:
        np = lazy_module("numpy")
"""

import importlib
from types import ModuleType
from typing import Any


class _LazyModule(ModuleType):
    """A stand-in for a module. Its attributes are the module's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def lazy_module(name: str) -> Any:
    """Return a stand-in for a module that imports it when an attribute is first used."""
    return _LazyModule(name)
