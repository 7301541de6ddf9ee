"""The studies: their names, and the question that each answers. Imports no torch; the module of a study,
`studies/<name, with _ for ->.py`, is loaded when it runs."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Final

from attention.errors import ConfigError

QUESTIONS: Final[dict[str, str]] = {
    "config-impact": "Does configuration B need twice the memory of configuration A?",
    "memory-breakdown": "What do ring-style buffers cost, and what do four optimisations give back?",
    "weights-storage": "What do attention weights take, dense and as active blocks?",
    "memory-pool": "Where does a memory pool help, and where not?",
    "memory-per-token": "How many bytes does a token take, from 2K to 1M tokens?",
    "floors": "How far above q, k, v and out does each attention go?",
    "dilation": "What does dilation change in memory, time, mass and reach?",
    "segments": "What does the segment length change?",
    "block-size": "What does the block size change?",
    "sparsity": "What does the fraction of blocks kept change?",
    "implementations": "Which attention is fastest and which leanest at 16K tokens?",
    "max-sequence": "How long a sequence fits 1 to 80 GB, by attention?",
    "million-tokens": "What do one and ten million tokens need?",
    "scaling": "What do 1 to 1,024 GPUs hold, exchange and take?",
    "ring-measured": "What do ranks send, hold and compute, measured?",
    "practical-limits": "Which attention for which length on cards of 8 to 80 GB?",
    "accuracy": "How far are predictions of memory and time from measurements?",
    "model-speed": "How fast are the planner's own models?",
    "fits": "Does what is recommended fit, for real?",
    "search": "How near does the search come to the exact optimum?",
    "tuning": "Does tuning find something as fast as the models' pick, or faster?",
    "min-mass": "What does attention mass cost, and why is the gate at 0.8?",
    "pareto": "What can be had for less memory, less time or less mass?",
    "published": "How far are predicted seconds of GPU kernels from what others published?",
    "peers": "How fast and how lean is each attention against FlexAttention and dense SDPA?",
}
"""In the order in which `all` runs them and lists show them."""


def names(requested: tuple[str, ...]) -> tuple[str, ...]:
    """The studies asked for, each once, `all` for all of them; ConfigError for an unknown name."""
    unique: dict[str, None] = {}
    for name in requested:
        if name != "all" and name not in QUESTIONS:
            near = get_close_matches(name, QUESTIONS, 1)
            suggestion = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"there is no study {name[:60]!r}; {suggestion}`planner study --list` has them all"
            )
        unique |= dict.fromkeys(QUESTIONS if name == "all" else (name,))
    return tuple(unique)
