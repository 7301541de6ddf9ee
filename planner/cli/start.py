"""The first steps of a command, before it imports anything else: an answer takes about a second, and these
lines save a third of another. For `planner.cli.main` alone, because they hold for the whole process."""

import atexit
import gc
import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# Imports and a search make a hundred thousand objects of which hardly any is garbage in a cycle; looking for
# those after every 700 took a tenth of the time. What long commands leave behind is still collected.
gc.set_threshold(100_000, 20, 100)
# The process ends, and its memory with it: there is no need to look for garbage once more.
atexit.register(gc.freeze)
# Plugins of pydantic are looked for in every installed package; no command has a use for them.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


class _Bar:
    """Stands for tqdm's progress bar, which is imported when there is one to show."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._real()(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    @staticmethod
    def _real() -> Any:
        if sys.modules.get("tqdm.auto") is _auto:
            del sys.modules["tqdm.auto"]
        return import_module("tqdm.auto").tqdm


# Optuna imports that bar, and with it asyncio and what notebooks need, which takes as long as all else of
# Optuna; no command has it shown.
_auto: Any = ModuleType("tqdm.auto")
_auto.tqdm = _Bar()
sys.modules.setdefault("tqdm.auto", _auto)
