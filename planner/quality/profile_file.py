"""A profile measured from the q and k of a file. Imports no torch.

Letters: `n` tokens, `h` heads, `d` channels; `D` components of the dictionary, `B` bins of distance.
"""

from __future__ import annotations

import json
import lzma
import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from attention.errors import ConfigError
from attention.sizes.arrays import Floats
from planner.quality.profiles import PRESETS, Profile

QUERIES: Final = 256
"""Queries measured, of each head and batch entry taken."""
ROWS: Final = 4096
"""Most rows of softmax in all: heads and batch entries are thinned out to it."""
HEADER: Final = 1 << 24
"""Most bytes of a safetensors header."""
BYTES: Final = 1 << 32
"""Most bytes of a tensor: 262,144 tokens of 32 heads of 128 channels in float32."""
PACKED: Final = 20
"""Times its packed size that a large tensor may take: what unpacks to more is no q and no k."""
LARGE: Final = 1 << 26
SINKS: Final = 4
_TYPES: Final = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


_SUFFIXES: Final = (".npz", ".safetensors")
_UNREADABLE: Final = (
    OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OverflowError, MemoryError,
    # Packed in a way that Python has not, encrypted, or torn; headers that are no literals.
    NotImplementedError, RuntimeError, zlib.error, lzma.LZMAError, TypeError, tokenize.TokenError,
)  # list of words with comments on its rows  # fmt: skip


def read_tensors(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """q and k of the file, [batch, seq, heads, head_dim], of its own floating type; nothing in it is run.
    ConfigError for what cannot be read or is no q and k."""
    try:
        if path.suffix in _SUFFIXES and not path.is_file():
            raise ValueError("it is no file" if path.exists() else "there is no such file")
        if path.suffix == ".npz":
            return _checked(path, *_from_npz(path))
        if path.suffix == ".safetensors":
            return _checked(path, *_from_safetensors(path))
    except _UNREADABLE as error:
        raise ConfigError(f"cannot read q and k from {path}: {error or type(error).__name__}") from None
    raise ConfigError(
        f"a profile is read from .npz or .safetensors, got {path.name!r}; save q and k as either"
    )


def _from_npz(path: Path) -> list[NDArray[Any]]:
    with zipfile.ZipFile(path) as archive:
        for name in ("q", "k"):
            if f"{name}.npy" not in archive.namelist():
                raise ValueError(f"it has no array {name!r}; save it with numpy.savez(path, q=q, k=k)")
            entry = archive.getinfo(f"{name}.npy")
            if entry.file_size > BYTES:
                raise ValueError(f"{name} is larger than {BYTES:,} bytes; save fewer heads")
            if entry.file_size > max(LARGE, PACKED * entry.compress_size):
                raise ValueError(
                    f"{name} unpacks to {entry.file_size:,} bytes, more than {PACKED} times its packed size; "
                    "save it with numpy.savez, unpacked"
                )
    with np.load(path, allow_pickle=False) as file:
        return [file["q"], file["k"]]


def _from_safetensors(path: Path) -> list[NDArray[Any]]:
    """The format by hand: 8 bytes of header length, JSON, then the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER, size - 8):
            raise ValueError(f"its header claims {length} bytes of a file of {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ValueError("its header is no JSON") from None
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        spans = []
        tensors = []
        for name in ("q", "k"):
            dtype, shape, begin, end = _entry(header, name, size - 8 - length)
            spans.append((begin, end))
            file.seek(8 + length + begin)
            raw = np.frombuffer(file.read(end - begin), _TYPES[dtype])
            if dtype == "BF16":  # the upper half of a float32
                raw = (raw.astype(np.uint32) << 16).view(np.float32)
            tensors.append(raw.reshape(shape))
    (a, b), (c, d) = spans
    if max(a, c) < min(b, d):
        raise ValueError(f"q and k overlap, at bytes {a} to {b} and {c} to {d}")
    return tensors


def _entry(header: dict[str, Any], name: str, available: int) -> tuple[str, list[int], int, int]:
    """(dtype, shape, begin, end) of a tensor, all of it checked against the file."""
    entry = header.get(name)
    if not isinstance(entry, dict):
        raise ValueError(f"it has no tensor {name!r}; save the two as q and k")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise ValueError(f"{name} is of type {dtype!r}; use one of {', '.join(_TYPES)}")
    for numbers, what in ((shape, "shape"), (span, "data_offsets")):
        if (
            not isinstance(numbers, list)
            or len(numbers) > 4
            or not all(type(x) is int and x >= 0 for x in numbers)
        ):
            raise ValueError(
                f"{name} has {what} {str(numbers)[:80]}, which are no few whole numbers from 0 on"
            )
    if len(span) != 2 or not span[0] <= span[1] <= available or span[1] - span[0] > BYTES:
        raise ValueError(f"{name} claims bytes {str(span)[:80]} of {available}")
    need = math.prod(shape) * np.dtype(_TYPES[dtype]).itemsize
    if need != span[1] - span[0]:
        raise ValueError(
            f"{name} of shape {str(shape)[:80]} and type {dtype} takes {need} bytes, not {span[1] - span[0]}"
        )
    return dtype, shape, span[0], span[1]


def _checked(path: Path, q: NDArray[Any], k: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both with a batch dimension."""
    for name, x in (("q", q), ("k", k)):
        if x.dtype.kind != "f" or x.ndim not in (3, 4) or not x.size:
            raise ValueError(
                f"{name} must be floats [seq, heads, head_dim] or [batch, seq, heads, head_dim], got "
                f"{x.dtype} {list(x.shape)}"
            )
        if not all(np.isfinite(part).all() for part in x):
            raise ValueError(f"{name} holds NaN or infinity")
    q, k = (x if x.ndim == 4 else x[None] for x in (q, k))
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must agree in batch, seq and head_dim, and the "
            "heads of k divide those of q"
        )
    return q, k


def measured(q: NDArray[Any], k: NDArray[Any], causal: bool, *, name: str, source: str) -> Profile:
    """The profile whose mass by bins of distance is nearest to that of softmax(q k^T / sqrt(head_dim)), by
    non-negative least squares; q and k are [batch, seq, heads, head_dim].

    Measured are up to QUERIES queries, evenly spread over the later three quarters where there are that many
    (early ones have no context to speak of), of heads thinned out to ROWS rows. One row of scores is held
    at a time. What its first tokens have beyond the rest of the fit is sinks.
    """
    batch, n, heads, dim = q.shape
    if n < 2:
        raise ConfigError(f"a profile needs at least 2 tokens, got {n}; save a longer q and k")
    first = n // 4 if n >= 64 else 1
    at = np.unique(np.linspace(first, n - 1, QUERIES).astype(np.int64))
    pairs = [(b, h) for b in range(batch) for h in range(heads)]
    count = max(1, ROWS // len(at))
    pairs = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, count).astype(np.int64))]
    sinks = min(SINKS, n - 1)
    edges = _edges(n)
    scales = _scales(n)
    model = np.mean([_components(p, n, causal, sinks, edges, scales) for p in at.tolist()], axis=0)
    mass = np.zeros(len(edges))
    for b, h in pairs:
        keys = k[b, :, h // (heads // k.shape[2])].astype(np.float64)
        for position in at.tolist():
            scores = keys[: position + 1 if causal else n] @ q[b, position, h].astype(np.float64)
            scores = np.exp((scores - scores.max()) / math.sqrt(dim))
            mass += _binned(scores / scores.sum(), position, sinks, edges)
    # Sinks are a bin of their own; the rest of the mass has none of it.
    sink = np.zeros((len(edges), 1))
    sink[0] = 1.0
    shares = _nonnegative(np.concatenate([sink, model], axis=1), mass / (len(at) * len(pairs)))
    shares = np.round(shares / shares.sum(), 6)
    keep = [j for j in range(len(scales)) if shares[1 + j] > 0.002]
    total = float(shares[0] + shares[-1] + sum(shares[1 + j] for j in keep))
    return Profile(
        name=name,
        source=f"measured on {source}: {len(at)} queries of {len(pairs)} heads, {n} tokens",
        sink_mass=float(shares[0]) / total,
        sink_tokens=sinks,
        far_mass=float(shares[-1]) / total,
        scales=tuple(float(scales[j]) for j in keep),
        shares=tuple(float(shares[1 + j]) / total for j in keep),
    )


def _edges(n: int) -> NDArray[np.int64]:
    """Least distance of each bin but the first, which is the sinks': 0, 1, 2, 3, 4, 6, 8, 12, ..."""
    ends = [-1, 0, 1, 2, 3]
    while ends[-1] < n:
        ends.append(int(ends[-1] * 4 / 3) + 1)
    return np.array([end for end in ends if end < n], np.int64)


def _scales(n: int) -> Floats:
    """A dictionary of scales, each 4 times the last: closer ones no sample tells apart."""
    return np.asarray(2.0 * 4.0 ** np.arange(max(1, math.ceil(math.log(max(n / 2, 2), 4)))), np.float64)


def _binned(row: Floats, position: int, sinks: int, edges: NDArray[np.int64]) -> Floats:
    """A row of mass by bins: the sinks', then by distance."""
    away = np.abs(np.arange(len(row)) - position)
    where = np.searchsorted(edges, away, side="right") - 1
    where[:sinks] = 0
    return np.asarray(np.bincount(where, weights=row, minlength=len(edges)), np.float64)


def _components(
    position: int, n: int, causal: bool, sinks: int, edges: NDArray[np.int64], scales: Floats
) -> Floats:
    """[bins, scales + 1], the mass by bins of every exponential and of the uniform share, at one query."""
    count = position + 1 if causal else n
    away = np.abs(np.arange(count) - position).astype(np.float64)
    columns = [np.exp(-away / scale) for scale in scales] + [np.ones(count)]
    return np.stack([_binned(c / c.sum(), position, sinks, edges) for c in columns], axis=1)


def _nonnegative(a: Floats, b: Floats) -> Floats:
    """x >= 0 that makes |a x - b| least, by Lawson and Hanson's active set: free the coordinate that gains
    most, solve, and step back to the boundary while the solution crosses it."""
    x = np.zeros(a.shape[1])
    free = np.zeros(a.shape[1], np.bool_)
    for _ in range(3 * a.shape[1]):
        gain = np.where(free, -np.inf, a.T @ (b - a @ x))
        if gain.max() <= 1e-10:
            break
        free[gain.argmax()] = True
        while True:
            solved = np.zeros_like(x)
            solved[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            crossing = free & (solved <= 0)
            if not crossing.any():
                x = solved
                break
            step = (x[crossing] / (x[crossing] - solved[crossing] + 1e-300)).min()
            x = x + step * (solved - x)
            free &= x > 1e-12
            x[~free] = 0
    return x


def profile_from(path: str | Path, causal: bool) -> Profile:
    """The profile of the attention of the q and k in a file: `.npz` or `.safetensors`, tensors `q` and `k`
    [seq, heads, head_dim] or [batch, seq, heads, head_dim], k perhaps of fewer heads, dividing q's.

    A fixed sample of queries is measured. The profile is called as the file, with its ending where a preset
    has the name. ConfigError for whatever cannot be read or used.
    """

    file = Path(path)
    q, k = read_tensors(file)
    name = file.name if file.stem in PRESETS else file.stem
    return measured(q, k, causal, name=name or "measured", source=str(path))
