"""The settings of `PYTORCH_CUDA_ALLOC_CONF`, read as torch reads them, and the sizes that follow from them.

    AllocatorSettings.parse("expandable_segments:True,garbage_collection_threshold:0.8")

Written from `c10/core/AllocatorConfig.h` and `c10/cuda/CUDACachingAllocator.cpp` (torch 2.13), whose
constants are named beside ours. Imports neither torch nor NumPy.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Self

from pydantic import BeforeValidator, Field, model_validator

from attention.config import MIB, Positive, Value
from attention.errors import ConfigError

MIN_BLOCK: Final = 512  # kMinBlockSize: sizes are multiples of it
SMALL: Final = MIB  # kSmallSize: the largest request of the small pool
SMALL_SEGMENT: Final = 2 * MIB  # kSmallBuffer: segment, or expandable page, of the small pool
LARGE_REQUEST: Final = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own size
ROUND_LARGE: Final = 2 * MIB  # kRoundLarge: what such a segment is rounded up to
SLOTS: Final = 16  # kRoundUpPowerOfTwoIntervals: request sizes from 1 MiB, doubling, to 64 GiB

# Options torch knows that change nothing here: they are about pinned host memory, locks or graphs.
_WITHOUT_EFFECT: Final = {
    "pinned_use_background_threads",
    "pinned_max_round_threshold_mb",
    "pinned_max_cached_size_mb",
    "pinned_use_cuda_host_register",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_free_catch_all",
    "release_lock_on_cudamalloc",
    "graph_capture_record_stream_reuse",
}
_SIZES: Final = {
    "max_split_size_mb": "max_split_size",
    "max_non_split_rounding_mb": "max_non_split_rounding",
    "large_segment_size_mb": "large_segment_size",
}


def _slots(value: Any) -> Any:
    """One number of divisions stands for all slots; JSON brings a list."""
    if type(value) is int:
        return (value,) * SLOTS
    return tuple(value) if isinstance(value, list) else value


class AllocatorSettings(Value):
    """The settings of `PYTORCH_CUDA_ALLOC_CONF` that decide about device memory. Sizes in bytes."""

    max_split_size: Positive | None = None
    """Blocks of this size or more are never split and serve only requests of this size or more;
    None for no limit. Whole MiB, at least `large_segment_size`."""
    max_non_split_rounding: Positive | None = None
    """A request of `max_split_size` or more takes a cached block less than this much larger; None for
    `large_segment_size`, which it cannot be below."""
    roundup_power2_divisions: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        BeforeValidator(_slots),
        Field(min_length=SLOTS, max_length=SLOTS),
    ] = (0,) * SLOTS
    """Steps between powers of two that requests are rounded up to, per slot: [1, 2) MiB and all below,
    [2, 4) MiB, and so on, the last for 32 GiB and above. Powers of two; 0 and 1 are off. A single
    number is meant for every slot."""
    expandable_segments: bool = False
    """One range of addresses per pool that grows and shrinks by pages, in place of separate segments."""
    garbage_collection_threshold: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the cap above which a miss first frees cached segments, oldest first; 0 for off."""
    large_segment_size: int = Field(default=20 * MIB, gt=LARGE_REQUEST)
    """Segment of requests between 1 and 10 MiB, and page of the expandable large pool. Whole MiB."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for name in _SIZES.values():
            size = getattr(self, name)
            if size is not None and (size % MIB or size < self.large_segment_size):
                raise ValueError(
                    f"{name} must be whole MiB and at least large_segment_size, got {size} bytes with "
                    f"large_segment_size={self.large_segment_size}; choose e.g. {name}={64 * MIB}"
                )
        for divisions in self.roundup_power2_divisions:
            if divisions & (divisions - 1):
                raise ValueError(
                    f"roundup_power2_divisions must be powers of two, or 0 for off, got {divisions}; "
                    "choose e.g. 4"
                )
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """Settings from the text of `PYTORCH_CUDA_ALLOC_CONF` or `PYTORCH_ALLOC_CONF`.

        Refuses what torch 2.13 refuses, and numbers that torch reads by their first digits (`64x`).
        """
        fields: dict[str, Any] = {}
        for option in re.split(r",(?![^\[]*\])", "".join(text.split()).removesuffix(",")):
            name, _, value = option.partition(":")
            if name in _SIZES:
                fields[_SIZES[name]] = _whole(name, value) * MIB
            elif name == "expandable_segments":
                if value not in ("True", "False"):
                    raise ConfigError(f"{name} must be True or False, got {value!r}; write {name}:True")
                fields[name] = value == "True"
            elif name == "garbage_collection_threshold":
                if not re.fullmatch(r"0?\.[0-9]*[1-9][0-9]*", value, re.ASCII):
                    raise ConfigError(f"{name} must be between 0 and 1, got {value!r}; write e.g. {name}:0.8")
                fields[name] = float(value)
            elif name == "roundup_power2_divisions":
                fields[name] = _parse_divisions(value)
            elif option and name not in _WITHOUT_EFFECT and option != "backend:native":
                replayable = ", ".join((*_SIZES, "expandable_segments", "garbage_collection_threshold"))
                raise ConfigError(
                    f"allocator option {option!r} cannot be replayed; remove it (known: {replayable}, "
                    "roundup_power2_divisions), and give a memory fraction as the cap of the replay"
                )
        return cls(**fields)

    def round_size(self, size: int) -> int:
        """Bytes of the block that a request of `size` bytes needs."""
        if size < MIN_BLOCK:
            return MIN_BLOCK
        exponent = size.bit_length() - 1
        divisions = self.roundup_power2_divisions[min(max(exponent - 20, 0), SLOTS - 1)]
        step = (1 << exponent) // divisions if divisions > 1 and size > MIN_BLOCK * divisions else MIN_BLOCK
        return -(-size // step) * step

    def segment_size(self, rounded: int) -> int:
        """Bytes asked of the driver when no cached block serves a request of `rounded` bytes."""
        if rounded <= SMALL:
            return SMALL_SEGMENT
        if rounded < LARGE_REQUEST:
            return self.large_segment_size
        return -(-rounded // ROUND_LARGE) * ROUND_LARGE


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text, re.ASCII):
        raise ConfigError(f"{name} must be a whole number, got {text!r}; write e.g. {name}:64")
    return int(text)


def _parse_divisions(text: str) -> tuple[int, ...]:
    """`4`, or `[256:1,512:2,>:4]`: in MiB, the first also for all below it, `>` for all above the last.

    A slot between two that are named stays off, as in torch.
    """
    name = "roundup_power2_divisions"
    if not text.startswith("["):
        return (_whole(name, text),) * SLOTS
    if not text.endswith("]"):
        raise ConfigError(f"{name} has no closing bracket, got {text!r}; write e.g. [256:1,512:2,>:4]")
    slots, above = [0] * SLOTS, 0
    for position, pair in enumerate(text[1:-1].removesuffix(",").split(",") if text != "[]" else ()):
        start, _, value = pair.partition(":")
        divisions = _whole(name, value)
        if start == ">":
            slots[above:] = [divisions] * (SLOTS - above)
            continue
        mebibytes = _whole(name, start)
        if mebibytes.bit_count() != 1:
            raise ConfigError(
                f"{name}: intervals start at powers of two, got {start!r}; write e.g. 256:{value}"
            )
        slot = min(mebibytes.bit_length() - 1, SLOTS - 1)
        slots[slot] = divisions
        if position == 0:
            slots[:slot] = [divisions] * slot
        above = slot + 1
    return tuple(slots)
