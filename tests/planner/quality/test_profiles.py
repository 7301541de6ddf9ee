"""Profiles: what they refuse, and what is measured from q and k."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from attention.errors import ConfigError
from planner.quality.profile_file import profile_from
from planner.quality.profiles import DEFAULT, PRESETS, Profile, preset


def saved(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensors(path, q, k, dtype="F32"):
    parts = [np.ascontiguousarray(x).tobytes() for x in (q, k)]
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    header = {
        name: {"dtype": dtype, "shape": list(x.shape), "data_offsets": ends[i : i + 2]}
        for i, (name, x) in enumerate((("q", q), ("k", k)))
    }
    return saved(path, header, b"".join(parts))


def linear(n, scale, dim=4):
    """q and k whose causal softmax is exp(-distance / scale) exactly."""
    q, k = np.zeros((n, 2, dim)), np.zeros((n, 1, dim))
    q[:, :, 0], k[:, 0, 0] = dim**0.5 / scale, np.arange(n)
    return q, k


def test_presets_are_whole_and_say_where_they_are_from():
    assert DEFAULT in PRESETS
    for name, profile in PRESETS.items():
        assert profile.name == name
        assert "ssumption" in profile.source
        assert Profile.from_json(profile.to_json()) == profile


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="choose one of balanced, local, streaming, retrieval"):
        preset("nope")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"far_mass": 0.5}, "sum to 1, got 0.5"),
        ({"scales": (1.0,), "shares": ()}, "pair up"),
        ({"sink_mass": 1.0, "sink_tokens": 65}, "at most 64"),
        ({"scales": (0.0,), "shares": (1.0,)}, "greater than 0"),
        ({"far_mass": float("nan")}, "finite"),
    ],
)
def test_a_profile_that_is_none_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Profile(name="x", source="", **fields)


@pytest.mark.parametrize("scale", [2.0, 32.0])
@pytest.mark.parametrize("batch", [False, True])
def test_an_exponential_is_measured_as_itself(tmp_path, scale, batch):
    q, k = (x[None] if batch else x for x in linear(512, scale))
    np.savez(tmp_path / "it.npz", q=q, k=k)
    profile = profile_from(tmp_path / "it.npz", causal=True)
    assert profile.scales == (scale,)
    assert profile.local_mass == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("file, name", [("mine.npz", "mine"), ("local.npz", "local.npz")])
def test_a_measured_profile_is_called_as_its_file_and_never_as_a_preset(tmp_path, file, name):
    q, k = linear(64, 2.0)
    np.savez(tmp_path / file, q=q, k=k)
    assert profile_from(tmp_path / file, causal=True).name == name


def test_no_preference_is_measured_as_far_mass(tmp_path):
    q, k = np.zeros((300, 1, 4), np.float16), np.zeros((300, 1, 4), np.float16)
    profile = profile_from(tensors(tmp_path / "x.safetensors", q, k, "F16"), causal=False)
    assert profile.far_mass == pytest.approx(1, abs=0.02)


def test_sinks_are_measured(tmp_path):
    q, k = np.ones((300, 1, 4), np.float32), np.zeros((300, 1, 4), np.float32)
    k[:4] = 4.0  # a logit of 8
    wide = (q.view(np.uint32) >> 16).astype(np.uint16), (k.view(np.uint32) >> 16).astype(np.uint16)
    profile = profile_from(tensors(tmp_path / "x.safetensors", *wide, "BF16"), causal=False)
    expected = 4 * np.exp(8) / (4 * np.exp(8) + 296)
    assert profile.sink_mass == pytest.approx(expected, abs=0.01)


GOOD = {"dtype": "F32", "shape": [4, 1, 2], "data_offsets": [0, 32]}


@pytest.mark.parametrize(
    "header, message",
    [
        (b"{", "no JSON"),
        (b"[" * 5000, "no JSON"),
        (b"[]", "no JSON object"),
        ({"q": GOOD}, "no tensor 'k'"),
        ({"q": GOOD, "k": GOOD}, "overlap"),
        ({"q": GOOD | {"dtype": "I64"}, "k": GOOD}, "type 'I64'"),
        ({"q": GOOD | {"dtype": []}, "k": GOOD}, "type"),
        ({"q": GOOD | {"shape": [4, -1, 2]}, "k": GOOD}, "whole numbers"),
        ({"q": GOOD | {"shape": 3}, "k": GOOD}, "whole numbers"),
        ({"q": GOOD | {"shape": [1 << 40, 1 << 40]}, "k": GOOD}, "takes"),
        ({"q": GOOD | {"data_offsets": [0, 1 << 40]}, "k": GOOD}, "claims bytes"),
        ({"q": GOOD | {"data_offsets": [32, 0]}, "k": GOOD}, "claims bytes"),
        ({"q": GOOD | {"data_offsets": [0]}, "k": GOOD}, "claims bytes"),
        ({"q": GOOD | {"data_offsets": [0, 31]}, "k": GOOD}, "takes 32 bytes"),
    ],
)
def test_hostile_safetensors_are_refused(tmp_path, header, message):
    path = saved(tmp_path / "x.safetensors", header, bytes(64))
    with pytest.raises(ConfigError, match=message):
        profile_from(path, causal=True)


@pytest.mark.parametrize("raw", [b"", b"abc", struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 99)])
def test_a_truncated_file_is_refused(tmp_path, raw):
    for name in ("x.safetensors", "x.npz"):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ConfigError, match="cannot read q and k"):
            profile_from(tmp_path / name, causal=True)


ONES = np.ones((4, 2, 2))


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"q": ONES}, "no array 'k'"),
        ({"q": ONES, "k": ONES * np.nan}, "NaN"),
        ({"q": ONES, "k": ONES[:3]}, "must agree"),
        ({"q": ONES[:, :1], "k": ONES}, "must agree"),
        ({"q": ONES[0], "k": ONES}, "q must be floats"),
        ({"q": ONES.astype(np.int64), "k": ONES}, "q must be floats"),
        ({"q": ONES[:0], "k": ONES[:0]}, "q must be floats"),
        ({"q": np.array([{}]), "k": ONES}, "allow_pickle"),
        ({"q": ONES[:1], "k": ONES[:1]}, "at least 2 tokens"),
    ],
)
def test_what_is_no_q_and_k_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ConfigError, match=message):
        profile_from(tmp_path / "x.npz", causal=True)


@pytest.mark.parametrize("name", ["missing.npz", "missing.safetensors", "x.pt"])
def test_a_file_that_is_not_there_or_of_another_kind(tmp_path, name):
    with pytest.raises(ConfigError, match=r"missing|\.npz or \.safetensors"):
        profile_from(tmp_path / name, causal=True)
