"""Sizes are read as written, and nothing else is."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention import ConfigError
from planner.units import bytes_option, format_bytes, parse_bytes, parse_count


@pytest.mark.parametrize(
    "text, value",
    [("8GB", 8 * 10**9), ("8 gb", 8 * 10**9), ("7.75GiB", int(7.75 * 2**30)), ("512MiB", 2**29),
     ("1000", 1000), (4096, 4096), ("1.5kb", 1500), (".5MB", 500_000), ("80GB", 80 * 10**9),
     ("2.01GB", 2_010_000_000), ("8.GB", 8 * 10**9)],
)  # pairs (text, value)  # fmt: skip
def test_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text, value", [("131072", 131072), ("128K", 131072), ("1M", 2**20), ("0.5k", 512)])
def test_counts(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "GB", "8XB", "-8GB", "8GB8", "0", "0GB", "1e9", "nan", "inf", "8,5GB", "٨GB", "9" * 40,
     "1" + "0" * 25, "2000000TB", True, None, 1.5, "8 G B"],
)  # list of words  # fmt: skip
def test_nonsense_is_refused(text):
    with pytest.raises(ConfigError, match="budget"):
        parse_bytes(text, "budget")


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text):
    for parse in (parse_bytes, parse_count):
        with contextlib.suppress(ConfigError):
            assert parse(text) > 0


@pytest.mark.parametrize(
    "count, text", [(8e9, "8.00 GB"), (16_800_000, "16.80 MB"), (512, "512 B"), (0, "0 B")]
)
def test_format(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    "count, text",
    [
        (5_211_000_000, "5.22GB"),
        (8 * 10**9, "8.00GB"),
        (16_800_000, "16.80MB"),
        (1_234_567_890_123, "1.24TB"),
        (512, "512"),
    ],
)
def test_an_option_is_rounded_up(count, text):
    assert bytes_option(count) == text


@given(st.integers(1, 2**59))
def test_an_option_is_read_back_as_no_less_and_hardly_more(count):
    assert count <= parse_bytes(bytes_option(count)) <= count * 1.01


@pytest.mark.parametrize("text", ["100.7", "63.5", "1.9", "1.3K", "0.5", "1.0001M"])
def test_the_fraction_of_a_count_is_refused_not_cut(text):
    with pytest.raises(ConfigError, match="--seq must be a whole number, got"):
        parse_count(text, "--seq")


@pytest.mark.parametrize("text, value", [("1.5K", 1536), ("100.0", 100), ("0.25M", 262_144)])
def test_a_fraction_that_is_a_whole_count_is_read(text, value):
    assert parse_count(text) == value
