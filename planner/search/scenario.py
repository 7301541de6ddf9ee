"""One question as the search has it: workload, card, budget, gates and rates. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from attention.sizes.shape import Windows
from planner.calibration import Calibration
from planner.gpus import Gpu
from planner.memory import cuda_process
from planner.memory.dispatch import has_flex
from planner.memory.estimate import calibration_for, machine_of
from planner.memory.machines import Machine
from planner.quality.profiles import Profile
from planner.question.asked import Gates, Objective
from planner.ranks.links import Network
from planner.speed import seconds
from planner.workload import Workload


@dataclass(frozen=True)
class Scenario:
    """One question."""

    workload: Workload
    """Its `seq` is the longest of interest where the objective is `seq`."""
    card: Literal["cpu"] | Gpu
    budget: int
    """Bytes of each device for this attention, what is reserved for others taken off."""
    objective: Objective
    profile: Profile
    rates: seconds.Rates
    gates: Gates = field(default_factory=Gates)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `planner.estimate`: calibration, allocator, display, ..."""
    network: Network | None = None
    """How several GPUs are joined; None for one."""

    @cached_property
    def known(self) -> dict[str, dict[Any, Any]]:
        """Results that were computed for this question before, by name: `planner.search.evaluate` reads and
        writes them."""
        return {}

    def but(self, **changes: Any) -> Scenario:
        """The question with another budget, objective or gates; what is known of candidates holds for it."""
        other = replace(self, **changes)
        shared = ("known", "machine", "calibration", "outside")
        other.__dict__.update({name: getattr(self, name) for name in shared})
        return other

    @property
    def free_length(self) -> bool:
        """Whether the length is to be found."""
        return self.objective == "seq"

    @cached_property
    def machine(self) -> Machine:
        return machine_of(self.card, self.workload.dtype, self.options.get("threads"))

    @property
    def flex(self) -> bool:
        """Whether compiled FlexAttention runs here."""
        return has_flex(self.workload, self.machine)

    @property
    def windows(self) -> Windows:
        """Those that the kernel takes here."""
        return self.machine.windows(self.workload.head_dim, self.workload.itemsize)

    @cached_property
    def calibration(self) -> Calibration | None:
        return self.options.get("calibration") or calibration_for(
            self.card, self.machine, self.workload.dtype
        )

    @cached_property
    def outside(self) -> int:
        """Bytes of a GPU beside what plans list."""
        if isinstance(self.card, str):
            return 0
        context = self.options.get("context_bytes")
        if context is None and self.calibration is not None:
            context = self.calibration.terms.context
        lines = cuda_process.device_lines(
            self.card.architecture,
            display=self.options.get("display", "headless"),
            others_bytes=self.options.get("others_bytes", 0),
            context_bytes=context,
        )
        return int(cuda_process.total(lines))

    def at(self, seq: int) -> Workload:
        """The workload at another length."""
        return self.workload if seq == self.workload.seq else self.workload.model_copy(update={"seq": seq})
