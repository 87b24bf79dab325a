"""A module that is imported when something of it is first used.

`longreach plan` reads files that compute with numpy elsewhere; importing it would double the time
of an answer.

    if TYPE_CHECKING:
        import numpy as np
    else:
        np = lazy_module("numpy")
"""

import importlib
from types import ModuleType
from typing import Any


class _LazyModule(ModuleType):
    """Stands for a module; its attributes are the module's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def lazy_module(name: str) -> Any:
    """Return a stand-in for a module, which imports it when an attribute is asked for."""
    return _LazyModule(name)
