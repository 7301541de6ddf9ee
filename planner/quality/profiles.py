"""Attention profiles: where the mass of a dense softmax lies, as a few numbers. Imports no torch.

Letters: `q` a query's position, `k` a key's, `n` tokens, `j` an exponential.

The profile's mass of the pair (q, k), over the keys that q is permitted (causal: k <= q; else all), is

    sink_mass [k < sink_tokens] / (sinks permitted)
    + far_mass / (keys permitted)
    + sum over j of shares[j] exp(-|q - k| / scales[j]) / Z_j(q)

with Z_j(q) the sum of the exponential over the keys permitted, so that the masses of a query sum to 1 at
the edges of the sequence too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final, Self

from pydantic import BeforeValidator, Field, model_validator

from attention.config import Positive, Value, as_tuple
from attention.errors import ConfigError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Scale = Annotated[float, Field(gt=0.0, le=1e9)]


class Profile(Value):
    """How a dense attention spreads its mass; the shares of all components sum to 1."""

    name: str
    source: str
    """Where the shape is from, and what in it is assumed."""
    sink_mass: Share = 0.0
    """Mass on the first tokens, whatever they say; equally on each."""
    sink_tokens: Positive = 4
    """How many first tokens are sinks; at most 64."""
    scales: Annotated[tuple[Scale, ...], BeforeValidator(as_tuple)] = ()
    """Tokens over which each exponential of the distance falls to 1/e."""
    shares: Annotated[tuple[Share, ...], BeforeValidator(as_tuple)] = ()
    """Mass of each exponential."""
    far_mass: Share = 0.0
    """Mass on planted tokens: keys anywhere in the permitted context, all equally likely."""

    @property
    def local_mass(self) -> float:
        """Mass of all exponentials together."""
        return math.fsum(self.shares)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len(self.scales) != len(self.shares):
            raise ValueError(
                f"scales and shares pair up, got {len(self.scales)} and {len(self.shares)} of them; "
                "give as many shares as scales"
            )
        if self.sink_tokens > 64:
            raise ValueError(f"sink_tokens is at most 64, got {self.sink_tokens}; take a larger share as far")
        total = math.fsum((self.sink_mass, self.far_mass, *self.shares))
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"sink_mass, far_mass and shares sum to 1, got {total:.9g} (sink_mass={self.sink_mass}, "
                f"far_mass={self.far_mass}, shares={list(self.shares)}); scale them to 1"
            )
        return self


ASSUMED = (
    " The shares and scales themselves are this project's assumption, chosen to have that shape; measure "
    "your model's q and k for figures of its own."
)
"""A remark on every preset that follows a publication."""

PRESETS: Final[Mapping[str, Profile]] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile(
                name="balanced",
                source="Sinks on four first tokens (StreamingLLM, arXiv 2309.17453), most of the rest near, "
                "a tenth anywhere: few heads retrieve (under 5%, arXiv 2404.15574), but those decide what "
                "can be found." + ASSUMED,
                sink_mass=0.2, scales=(16.0, 256.0, 4096.0), shares=(0.35, 0.25, 0.1), far_mass=0.1,
            ),
            Profile(
                name="local",
                source="Text or signals in which neighbours matter: no sinks to speak of, little far away. "
                "An assumption throughout; no publication is behind it.",
                sink_mass=0.02, scales=(8.0, 64.0, 512.0), shares=(0.4, 0.35, 0.2), far_mass=0.03,
            ),
            Profile(
                name="streaming",
                source="Half on the first four tokens and most of the rest recent, the A-shape of heads that "
                "MInference (arXiv 2407.02490) describes and StreamingLLM (arXiv 2309.17453) relies on."
                + ASSUMED,
                sink_mass=0.5, scales=(16.0, 256.0), shares=(0.3, 0.17), far_mass=0.03,
            ),
            Profile(
                name="retrieval",
                source="Heads that copy from anywhere in the context (retrieval heads, arXiv 2404.15574; the "
                "vertical lines of MInference, arXiv 2407.02490): a quarter is planted far tokens." + ASSUMED,
                sink_mass=0.2, scales=(16.0, 1024.0, 16384.0), shares=(0.2, 0.2, 0.15), far_mass=0.25,
            ),
        )
    }
)  # a row of numbers a profile  # fmt: skip
"""Profiles by name."""

DEFAULT: Final = "balanced"
"""The preset where none is asked for."""


def preset(name: str) -> Profile:
    """The preset called `name`; ConfigError with the known ones if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"no profile is called {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
