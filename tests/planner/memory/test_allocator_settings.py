"""Settings are read as torch reads them, and give the sizes that torch's allocator works with."""

import pytest

from attention import ConfigError
from planner.memory.allocator_settings import AllocatorSettings

MIB = 1 << 20


# Sizes.


@pytest.mark.parametrize(
    "size, block",
    [
        (1, 512),
        (511, 512),
        (512, 512),
        (513, 1024),
        (MIB, MIB),
        (MIB + 1, MIB + 512),
        (10**9 + 1, 10**9 + 512),
    ],
)
def test_sizes_round_up_to_512(size, block):
    assert AllocatorSettings().round_size(size) == block


@pytest.mark.parametrize(
    "size, block",
    [
        (1200, 1536),  # not above 512 x 4, so to 512 as without divisions
        (2048, 2048),
        (2049, 2560),
        (5000, 5120),
        (4096, 4096),
        (7169, 8192),
        (100 * MIB, 112 * MIB),
    ],
)
def test_divisions_round_up_to_steps_between_powers_of_two(size, block):
    assert AllocatorSettings(roundup_power2_divisions=4).round_size(size) == block


def test_divisions_go_by_the_size_of_the_request():
    slots = AllocatorSettings.parse("roundup_power2_divisions:[64:8,128:1,256:2,>:4]")
    assert slots.round_size(65 * MIB) == 72 * MIB
    assert slots.round_size(129 * MIB) == 129 * MIB
    assert slots.round_size(257 * MIB) == 384 * MIB
    assert slots.round_size(513 * MIB) == 640 * MIB
    last = AllocatorSettings.parse("roundup_power2_divisions:[16384:8,32768:2]")  # has no end
    assert last.round_size(33 * 1024 * MIB) == 48 * 1024 * MIB
    assert last.round_size(65 * 1024 * MIB) == 96 * 1024 * MIB


# Parsing.


def test_settings_are_read_as_torch_writes_them():
    text = (
        "max_split_size_mb: 512 ,roundup_power2_divisions:[256:1,512:2,1024:4,>:8],"
        "garbage_collection_threshold:0.8,expandable_segments:False,max_non_split_rounding_mb:40,"
        "large_segment_size_mb:30,backend:native,pinned_use_background_threads:True,"
    )
    assert AllocatorSettings.parse(text) == AllocatorSettings(
        max_split_size=512 * MIB,
        max_non_split_rounding=40 * MIB,
        roundup_power2_divisions=(1,) * 9 + (2, 4) + (8,) * 5,
        garbage_collection_threshold=0.8,
        large_segment_size=30 * MIB,
    )
    assert AllocatorSettings.parse("") == AllocatorSettings()
    assert AllocatorSettings.parse("expandable_segments:True") == AllocatorSettings(expandable_segments=True)


@pytest.mark.parametrize(
    "value, slots",  # as torch 2.13 answers from AcceleratorAllocatorConfig::roundup_power2_divisions
    [
        ("4", (4,) * 16),
        ("[]", (0,) * 16),
        ("[64:8,128:2,256:4,512:2,1024:4,>:1]", (8,) * 7 + (2, 4, 2, 4) + (1,) * 5),
        ("[256:1,1024:4]", (1,) * 9 + (0, 4) + (0,) * 5),
        ("[256:0,512:2,>:4]", (0,) * 9 + (2,) + (4,) * 6),
        ("[1:2,131072:8]", (2,) + (0,) * 14 + (8,)),
    ],
)
def test_divisions_are_read_as_torch_reads_them(value, slots):
    assert AllocatorSettings.parse(f"roundup_power2_divisions:{value}").roundup_power2_divisions == slots


@pytest.mark.parametrize(
    "text, said",
    [
        ("max_split_size:64", "max_split_size:64"),
        ("per_process_memory_fraction:0.5", "cap of the replay"),
        ("backend:cudaMallocAsync", "cudaMallocAsync"),
        ("max_split_size_mb", "max_split_size_mb must be a whole number, got ''"),
        ("max_split_size_mb:64x", "'64x'"),
        ("max_split_size_mb:-1", "'-1'"),
        ("max_split_size_mb:19", "at least large_segment_size"),
        ("max_split_size_mb:30,large_segment_size_mb:40", "large_segment_size=41943040"),
        ("max_non_split_rounding_mb:10", "max_non_split_rounding"),
        ("large_segment_size_mb:10", "large_segment_size"),
        ("expandable_segments:true", "True or False, got 'true'"),
        ("garbage_collection_threshold:0", "between 0 and 1"),
        ("garbage_collection_threshold:1.0", "between 0 and 1"),
        ("garbage_collection_threshold:nan", "'nan'"),
        ("roundup_power2_divisions:3", "powers of two"),
        ("roundup_power2_divisions:[4:3]", "powers of two"),
        ("roundup_power2_divisions:[3:2]", "got '3'"),
        ("roundup_power2_divisions:[4:2", "closing bracket"),
    ],
)
def test_nonsense_settings_are_refused(text, said):
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        AllocatorSettings.parse(text)


def test_settings_round_trip_as_json():
    settings = AllocatorSettings(max_split_size=64 * MIB, roundup_power2_divisions=4)
    assert AllocatorSettings.from_json(settings.to_json()) == settings
