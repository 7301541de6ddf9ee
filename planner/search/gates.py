"""What an answer has to keep to, each gate a value: by how much a candidate exceeds it, and the question
without it. Imports no torch.

Who enforces them: `solve` for the grid (`passing`, `first`), `refine` for trials of Optuna, `climb` for
steps, all by `evaluate.excess` and `evaluate.failed`; `relax` and `explain` ask what lies beyond them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, NamedTuple

from planner.search.scenario import Scenario
from planner.units import LARGEST


class Gate(NamedTuple):
    """One constraint on answers. Checking, explaining and relaxing read all of it here."""

    name: str
    limit: Callable[[Scenario], Any]
    """What the question asks for; None where it asks for nothing."""
    beyond: Callable[[Any, Any], Any]
    """(figure, limit) -> by how much the limit is exceeded, 0 or less where it is met; numbers, or arrays of
    figures."""
    loosened: Callable[[Scenario], Scenario]
    """The question without this constraint."""

    def excess(self, scenario: Scenario, figure: Any) -> Any:
        """By how much a candidate's figure exceeds this gate; None where the question has no such gate."""
        limit = self.limit(scenario)
        return None if limit is None else self.beyond(figure, limit)


def _share_above(figure: Any, limit: Any) -> Any:
    return (figure - limit) / limit


MEMORY: Final = Gate(
    "memory",
    limit=lambda scenario: scenario.budget,
    beyond=_share_above,
    loosened=lambda scenario: scenario.but(budget=LARGEST),
)
"""Of the upper bound's bytes."""
MASS: Final = Gate(
    "mass",
    limit=lambda scenario: scenario.gates.min_mass,
    beyond=lambda mass, least: least - mass,
    loosened=lambda scenario: scenario.but(gates=replace(scenario.gates, min_mass=None)),
)
"""Of the share of dense attention's mass."""
REACH: Final = Gate(
    "reach",
    limit=lambda scenario: scenario.gates.layers,
    beyond=lambda layers, limit: 0.0 if layers is not None and layers <= limit else 1.0,
    loosened=lambda scenario: scenario.but(gates=replace(scenario.gates, layers=None)),
)
"""Of one candidate's layers until the last token hears of all, None for never: it is met or not."""
SECONDS: Final = Gate(
    "seconds",
    limit=lambda scenario: scenario.gates.max_seconds,
    beyond=_share_above,
    loosened=lambda scenario: scenario.but(gates=replace(scenario.gates, max_seconds=None)),
)
"""Of a call's seconds."""

GATES: Final = (MEMORY, MASS, REACH, SECONDS)
"""In the order in which answers name them."""
