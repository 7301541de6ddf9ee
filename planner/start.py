"""What a command does before it imports anything else: each takes about a second, a fifth of which these
lines save. For `planner.cli` alone, because they hold for the whole process."""

import atexit
import gc
import os

# Imports and a search make a hundred thousand objects of which hardly any is garbage in a cycle; looking for
# those after every 700 took a tenth of the time. What long commands leave behind is still collected.
gc.set_threshold(100_000, 20, 100)
# The process ends, and its memory with it: there is no need to look for garbage once more.
atexit.register(gc.freeze)
# Plugins of pydantic are looked for in every installed package; no command has a use for them.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
