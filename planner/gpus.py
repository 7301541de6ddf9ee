"""Known NVIDIA cards: memory, rates, and which kernels run on them. Imports no torch.

The figures are in `data/gpus.json`, each card's with its `source`. What no document says is None there,
and what is derived here says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from attention.errors import ConfigError
from attention.sizes.whole_calls import CUDNN_CAPABILITIES

if TYPE_CHECKING:
    from planner.workload import Dtype

GIB: Final = 1 << 30
_DATA = Path(__file__).with_name("data") / "gpus.json"
_NOISE = re.compile(r"nvidia|geforce|tesla|\(r\)|\(tm\)|[^a-z0-9]")
_SIZE = re.compile(r"[ -]\d+ ?gb$", re.IGNORECASE)
_NOT_CUDA: Final = {
    "AMD": r"amd.*|.*(instinct|radeon).*|mi\d{2,3}[a-z]?|rx(vega)?\d{2,4}(xtx?|gre|m|s)?|"
    r"[5-9]\d\d0(xtx?|gre)|w[67]\d00|gfx\d+\w*|.*strixhalo|8060s",
    "Intel": r"intel.*|arc.*|a[357][1578]0m?|b5[78]0|gaudi\d?|datacentergpu.*|max1[15]\d0|irisxe|flex1[47]0",
    "Apple": r"apple.*|m\d(pro|max|ultra)?(\d+core)?",
    "Google": r"google.*|(cloud)?tpu.*|v\d(e|p|litepod.*)",
    "Amazon": r"(aws)?(trainium|inferentia|trn|inf)\d?.*",
    "Huawei": r"(huawei)?ascend.*",
}
"""What is not NVIDIA's, by maker: patterns of whole names, plain."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card as planning sees it."""

    key: str
    """Short name, as in `--gpu rtx4060`."""
    aliases: tuple[str, ...] = ()
    """Other names it goes by."""
    name: str
    """Name as CUDA reports it."""
    architecture: str
    """Maxwell, Pascal, Volta, Turing, Ampere, Ada, Hopper or Blackwell."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    nominal_bytes: int
    """Memory as sold. The 8 GB on a box are 8 GiB: 8,589,934,592 bytes."""
    memory_type: str
    """GDDR, HBM or LPDDR generation, the last shared with the system; empty where not known."""
    ecc: bool
    """Whether error correction is on as shipped. GDDR pays for it with a sixteenth of the memory."""
    usable_bytes: int
    """Bytes that CUDA reports in total, before any context, display or other process."""
    usable_source: str
    """Where `usable_bytes` is from; begins with `derived:` where no report of this card was found."""
    bandwidth: float | None
    """Bytes a second of the card's memory."""
    rates: Mapping[str, float | None] = field(hash=False)
    """Peak dense FLOP/s by dtype: 16-bit on tensor cores with float32 accumulation where there are any,
    float32 and float64 without them. None where not known or not native (bfloat16 below 8.0, float16
    below 6.0)."""
    sm_count: int | None
    """Streaming multiprocessors."""
    l2_bytes: int | None
    """Bytes of the level-2 cache."""
    source: str
    """Where the figures are from, and which of them are derived."""


@cache
def known() -> tuple[Gpu, ...]:
    """All cards of the data file, oldest architecture first."""
    rows: list[dict[str, Any]] = json.loads(_DATA.read_text(encoding="utf-8"))["cards"]
    return tuple(_gpu(row, rows) for row in rows)


def find(name: str) -> Gpu:
    """The card called `name`: by key, alias or full name, or by a prefix that only one card has.

    Case, spaces, dashes and the words NVIDIA, GeForce and Tesla do not matter; nor does a leading RTX or
    GTX. A name that fits no card or several is a `ConfigError` that names the nearest; of what is not
    NVIDIA's it says that.
    """
    wanted = _plain(name)
    exact = [gpu for gpu in known() if wanted in _forms(gpu)]
    if len(exact) == 1:
        return exact[0]
    _refuse_others(name, wanted)
    begun = [gpu for gpu in known() if wanted and any(form.startswith(wanted) for form in _forms(gpu))]
    if len(begun) == 1:
        return begun[0]
    raise _unknown(name, wanted, exact or begun)


def matching(name: str) -> tuple[Gpu, ...]:
    """The card called `name`, or else all with `name` in a name of theirs; ConfigError if there is none.

    Names are read as in `find`; what is nothing but a maker's or a series' (`geforce`) is in all of them.
    """
    wanted = _plain(name)
    exact = tuple(gpu for gpu in known() if wanted in _forms(gpu))
    if not exact:
        _refuse_others(name, wanted)
    cards = exact or tuple(gpu for gpu in known() if any(wanted in form for form in _forms(gpu)))
    if not cards:
        raise _unknown(name, wanted, [])
    return cards


def of_device(name: str, total_bytes: int | None) -> Gpu:
    """The card that CUDA calls `name` and says to have so many bytes: where a card is sold with several
    memories, all of which CUDA calls the same, that with the nearest. ConfigError as in `find`."""
    if total_bytes is None:
        return find(name)
    bare = _plain(_SIZE.sub("", name))
    alike = [gpu for gpu in known() if bare and _plain(_SIZE.sub("", gpu.name)) == bare] or matching(name)
    return min(alike, key=lambda gpu: abs(gpu.usable_bytes - total_bytes))


def generic(vram_bytes: int) -> Gpu:
    """The card that a budget without a card's name stands for.

    `vram_bytes` is taken at its word, as what CUDA would report in total; 8 x 10^9 is below the 8.32 x 10^9
    that an 8 GB card reports. Everything else is an assumption: compute capability 8.0, the lowest on
    which all kernels run, and the rates of an RTX 3060 in round figures.
    """
    if isinstance(vram_bytes, bool) or not isinstance(vram_bytes, int) or vram_bytes <= 0:
        raise ConfigError(f"vram must be a positive number of bytes, got {vram_bytes!r}; write e.g. 8GB")
    size = _size(vram_bytes)
    return Gpu(
        key=f"generic-{size.lower()}",
        name=f"generic {size} card",
        architecture="Ampere",
        capability=(8, 0),
        nominal_bytes=vram_bytes,
        memory_type="",
        ecc=False,
        usable_bytes=vram_bytes,
        usable_source="assumption: the given bytes are what CUDA reports in total",
        bandwidth=360e9,
        rates=MappingProxyType({"float16": 25e12, "bfloat16": 25e12, "float32": 12.5e12, "float64": 0.2e12}),
        sm_count=28,
        l2_bytes=3 << 20,
        source="assumption: compute capability 8.0 and, in round figures, the rates of an RTX 3060; "
        "name the card with --gpu, or calibrate",
    )


def check_budget(gpu: Gpu, budget: int, what: str) -> None:
    """ConfigError where `budget`, as `what` has it, is more bytes than the card has."""
    if budget > gpu.usable_bytes:
        raise ConfigError(
            f"{what} is {budget:,} bytes, and {gpu.name} has {gpu.usable_bytes:,} that can be used; "
            f"ask for less, leave {what} out for all of it, or name no card"
        )


def backends(gpu: Gpu, dtype: Dtype) -> tuple[str, ...]:
    """Kernels that run `dtype` on this card, the preferred first.

    `cudnn` (cuDNN's SDPA; 16 bits, 9.0 and 10.x, dense and dilated), `flash` (SDPA; 16 bits, 8.0 and up),
    `efficient` (SDPA; 5.0 to 12.1; bfloat16 from 8.0), `flex` (compiled FlexAttention, for block-sparse
    layouts; 8.0 and up here, though Triton runs from 7.0) and `plain` (matrix products; everything, for
    float64 the only one).
    """
    modern = gpu.capability >= (8, 0)
    kernels: list[str] = []
    if modern and dtype in ("float16", "bfloat16"):
        kernels += ["cudnn", "flash"] if gpu.capability[0] in CUDNN_CAPABILITIES else ["flash"]
    if dtype != "float64" and (5, 0) <= gpu.capability <= (12, 1) and (modern or dtype != "bfloat16"):
        kernels.append("efficient")
    if modern and dtype != "float64":
        kernels.append("flex")
    return (*kernels, "plain")


def native_bfloat16(gpu: Gpu) -> bool:
    """Whether the card computes in bfloat16; below 8.0 it is emulated, and slow."""
    return gpu.capability >= (8, 0)


def torch_builds(gpu: Gpu) -> str:
    """A phrase that names the PyTorch builds with kernels for this card."""
    if gpu.capability < (7, 0):
        return f"PyTorch up to 2.14, in the cu126 builds: later ones have no kernels for {gpu.architecture}"
    if gpu.capability < (7, 5):
        return "the cu126 builds of PyTorch: CUDA 13 has no kernels for Volta"
    if gpu.capability == (8, 7):
        return "NVIDIA's builds of PyTorch for Jetson: those of PyTorch do not run on its driver"
    if gpu.capability == (11, 0):
        return "PyTorch 2.9 or newer, in the cu130 builds or newer, for aarch64"
    if gpu.capability >= (10, 0):
        return "PyTorch 2.7 or newer, in the cu128 builds or newer"
    return "any build of PyTorch for CUDA"


def caution(gpu: Gpu) -> str | None:
    """What one has to know of this card before relying on a prediction for it; None if nothing."""
    if "Laptop" in gpu.name:
        return (
            f"a laptop's maker sets the power of {gpu.name} and with it the speed: seconds are those of the "
            "lowest clock that is listed, and may be half as many; calibrate on the laptop"
        )
    if gpu.memory_type.startswith("LPDDR"):
        return (
            f"the memory of {gpu.name} is the system's: what the system and its programs hold is not the "
            "GPU's; say how much with --others (others_bytes)"
        )
    return None


def _gpu(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> Gpu:
    nominal = row["memory_gb"] * GIB
    usable, source = row["usable_bytes"], row["usable_source"]
    if usable is None:
        usable, source = _derive(row, rows)
    return Gpu(
        key=row["key"],
        aliases=tuple(row["aliases"]),
        name=row["name"],
        architecture=row["architecture"],
        capability=(row["capability"][0], row["capability"][1]),
        nominal_bytes=nominal,
        memory_type=row["memory_type"],
        ecc=row["ecc"],
        usable_bytes=usable,
        usable_source=source,
        bandwidth=row["bandwidth"],
        rates=MappingProxyType(row["rates"]),
        sm_count=row["sm_count"],
        l2_bytes=row["l2_bytes"],
        source=row["source"],
    )


def _derive(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> tuple[int, str]:
    """Usable bytes by the usable share of a reported card of the same kind of memory.

    That is the next smaller card of the same architecture (or as large), else of any, else the smallest
    larger; of several the one with the least share. Smaller, because drivers keep a larger share of a
    smaller card.
    """
    alike = [other for other in rows if other["usable_bytes"] and _memory(other) == _memory(row)]
    smaller = [other for other in alike if other["memory_gb"] <= row["memory_gb"]]
    near = [other for other in smaller if other["architecture"] == row["architecture"]]
    if smaller:
        model = max(near or smaller, key=lambda other: (other["memory_gb"], -_share(other)))
    else:
        model = min(alike, key=lambda other: (other["memory_gb"], _share(other)))
    usable = row["memory_gb"] * model["usable_bytes"] // model["memory_gb"]
    return usable >> 20 << 20, f"derived: the share that {model['name']} reports, {_share(model):.1%}"


def _memory(row: Mapping[str, Any]) -> str:
    for kind in ("HBM", "LPDDR"):
        if row["memory_type"].startswith(kind):
            return kind
    return "GDDR and error correction" if row["ecc"] else "GDDR"


def _share(row: Mapping[str, Any]) -> float:
    return float(row["usable_bytes"] / (row["memory_gb"] * GIB))


def _plain(name: str) -> str:
    return _NOISE.sub("", name.lower())


@cache
def _forms(gpu: Gpu) -> frozenset[str]:
    """All ways to write a card's name, plain."""
    forms = {_plain(name) for name in (gpu.key, gpu.name, *gpu.aliases)}
    return frozenset(forms | {form[3:] for form in forms if form[:3] in ("rtx", "gtx")})


def _refuse_others(name: str, wanted: str) -> None:
    """ConfigError where a name is that of another maker's."""
    if re.search("nvidia|geforce|tesla|quadro", name.lower()):
        return
    for maker, pattern in _NOT_CUDA.items():
        if re.fullmatch(pattern, wanted[:60]):
            raise ConfigError(
                f"{name[:60]!r} is {maker}'s and not an NVIDIA card: CUDA alone is known here, and no "
                "prediction of memory or seconds would hold for it; `planner gpus` lists the cards"
            )


def _unknown(name: str, wanted: str, several: list[Gpu]) -> ConfigError:
    from difflib import SequenceMatcher

    def likeness(gpu: Gpu) -> float:
        return max(SequenceMatcher(None, wanted, form).ratio() for form in _forms(gpu))

    nearest = ", ".join(gpu.key for gpu in sorted(several or known(), key=likeness, reverse=True)[:3])
    if several:
        return ConfigError(
            f"GPU {name[:60]!r} could be {len(several)} cards, e.g. {nearest}; "
            "write more of the name; `planner gpus` lists all"
        )
    return ConfigError(f"GPU {name[:60]!r} is not known; nearest are {nearest}; `planner gpus` lists all")


def _size(count: int) -> str:
    """8GB, 7.75GiB or 8.32GB: exact where two decimals allow."""
    for unit, text in ((10**9, "GB"), (GIB, "GiB")):
        if count * 100 % unit == 0:
            return f"{count / unit:g}{text}"
    return f"{count / 10**9:.2f}GB"
