"""The caching allocator's rules by hand, its invariants by chance, and both against a slow model."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.memory.allocator import Allocator, fits, replay, smallest_cap
from planner.memory.allocator_settings import AllocatorSettings

MIB = 1 << 20
CUBLAS_WORKSPACE = 8_519_680  # bytes, cuBLAS before Hopper
EXPANDABLE = AllocatorSettings(expandable_segments=True)
SPLIT_64 = AllocatorSettings(max_split_size=64 * MIB)


def mib(*events):
    """Events in MiB, keyed by letters: ("a", 30), ("a", 0)."""
    return [(key, int(size * MIB)) for key, size in events]


def outcome(found):
    """(peak allocated, peak reserved, reserved) in MiB."""
    return found.peak_allocated / MIB, found.peak_reserved / MIB, found.reserved / MIB


# Sizes.


@pytest.mark.parametrize(
    "size, allocated, reserved",
    [
        (1, 512, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (CUBLAS_WORKSPACE, CUBLAS_WORKSPACE, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # the rest is above 1 MiB: split
        (11 * MIB, 12 * MIB, 12 * MIB),  # the rest is just 1 MiB: stays, and counts as allocated
        (12 * MIB - 1, 12 * MIB, 12 * MIB),
    ],
)
def test_one_allocation(size, allocated, reserved):
    found = replay([("a", size)])
    assert (found.peak_allocated, found.peak_reserved, found.peak_requested) == (allocated, reserved, size)


def test_large_segment_size_is_what_medium_requests_open():
    assert replay([("a", 2 * MIB)], AllocatorSettings(large_segment_size=12 * MIB)).reserved == 12 * MIB


# Reuse.


def test_small_pool_packs_segments_of_two_mebibytes():
    assert outcome(replay([(i, 512) for i in range(4096)])) == (2, 2, 2)
    assert outcome(replay([(i, 512) for i in range(4097)]))[1:] == (4, 4)
    assert outcome(replay(mib(("a", 1), ("b", 0.75), ("c", 0.5)))) == (2.25, 4, 4)


def test_pools_do_not_share():
    assert outcome(replay(mib(("a", 40), ("a", 0), ("b", 1)))) == (40, 42, 42)


def test_medium_requests_share_a_segment():
    found = replay([("workspace", CUBLAS_WORKSPACE), ("b", 8 * MIB), ("c", 5 * MIB // 2)])
    assert outcome(found) == (18.625, 20, 20)


def test_the_smallest_block_that_fits_is_taken():
    # If b went into the 40 MiB block, c would need a segment of its own.
    assert outcome(replay(mib(("x", 40), ("y", 30), ("x", 0), ("y", 0), ("b", 30), ("c", 40)))) == (
        70,
        70,
        70,
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_equal_blocks_the_lowest_is_taken(order):
    allocator = Allocator()
    blocks = [allocator.allocate(30 * MIB) for _ in range(2)]
    for which in order:
        allocator.free(blocks[which])
    assert allocator.allocate(30 * MIB).address == 0


def test_freed_neighbours_merge():
    thirds = mib(("a", 10), ("a", 0), ("x", 3), ("y", 3), ("z", 3))
    for order in itertools.permutations("xyz"):
        # Merged with what is left of the segment, they hold the 10 MiB that opened it.
        found = replay([*thirds, *((key, 0) for key in order), ("b", 10 * MIB)])
        assert found.peak_reserved == 10 * MIB


# max_split_size.


def test_oversize_blocks_serve_no_smaller_request():
    events = mib(("a", 64), ("a", 0), ("b", 30))
    assert outcome(replay(events)) == (64, 64, 64)
    assert outcome(replay(events, SPLIT_64)) == (64, 94, 94)
    assert outcome(replay(mib(("a", 62), ("a", 0), ("b", 30)), SPLIT_64)) == (62, 62, 62)


def test_oversize_requests_take_blocks_less_than_the_slack_larger_whole():
    assert outcome(replay(mib(("a", 82), ("a", 0), ("b", 64)), SPLIT_64)) == (82, 82, 82)
    assert Allocator(SPLIT_64).allocate(64 * MIB).size == 64 * MIB
    assert outcome(replay(mib(("a", 84), ("a", 0), ("b", 64)), SPLIT_64))[1:] == (148, 148)
    wider = SPLIT_64.model_copy(update={"max_non_split_rounding": 30 * MIB})
    assert outcome(replay(mib(("a", 84), ("a", 0), ("b", 64)), wider))[1:] == (84, 84)
    kept = replay(mib(("a", 82), ("a", 0), ("b", 64), ("c", 18)), SPLIT_64)
    assert kept.peak_allocated == kept.reserved == 100 * MIB  # b holds all of a's block


def test_a_miss_first_frees_one_oversize_block_that_would_do():
    found = replay(mib(("a", 70), ("b", 30), ("a", 0), ("b", 0), ("c", 40)), SPLIT_64, cap=100 * MIB)
    assert (found.reserved, found.retries, found.oom) == (70 * MIB, 0, None)


def test_or_the_largest_ones_until_there_is_enough():
    cached = [("a", 64), ("b", 64), ("c", 66), ("a", 0), ("b", 0), ("c", 0)]
    found = replay(mib(*cached, ("d", 130)), SPLIT_64, cap=220 * MIB)
    assert (found.reserved, found.retries) == (194 * MIB, 0)  # 66 and a 64 went, a 64 stayed


def test_or_everything_if_oversize_blocks_are_not_enough():
    # Without the 64 MiB block c would fit beside b, but that is not asked.
    cached = [("a", 64), ("b", 30), ("a", 0), ("b", 0)]
    found = replay(mib(*cached, ("c", 100)), SPLIT_64, cap=130 * MIB)
    assert (found.reserved, found.retries, found.oom) == (100 * MIB, 1, None)


def test_oversize_blocks_of_expandable_segments_are_only_unmapped():
    both = SPLIT_64.model_copy(update={"expandable_segments": True})
    found = replay(mib(("a", 70), ("a", 0), ("b", 30)), both, cap=100 * MIB)
    assert (found.reserved, found.retries) == (40 * MIB, 1)


# The cap.


def test_a_miss_releases_all_free_segments_and_tries_again():
    events = mib(("a", 40), ("s", 1), ("a", 0), ("s", 0), ("b", 50))
    assert replay(events).reserved == 92 * MIB
    found = replay(events, cap=92 * MIB)
    assert (found.reserved, found.retries) == (92 * MIB, 0)
    found = replay(events, cap=92 * MIB - 1)
    assert (found.reserved, found.retries, found.oom) == (50 * MIB, 1, None)


def test_running_out_is_a_value():
    # x leaves its 40 MiB to a, which holds the segment.
    found = replay(mib(("x", 40), ("x", 0), ("a", 10), ("b", 31), ("c", 1)), cap=60 * MIB)
    assert found.oom == (3, "b", 31 * MIB, 10 * MIB, 40 * MIB, 72 * MIB)
    assert (found.retries, found.reserved) == (1, 40 * MIB)
    assert found.oom.next_cap == smallest_cap(mib(("x", 40), ("x", 0), ("a", 10), ("b", 31)))


def test_segments_count_against_the_cap_and_requests_do_not():
    assert not fits([("a", 2 * MIB)], cap=20 * MIB - 1)
    assert fits([("a", 2 * MIB)], cap=20 * MIB)


def test_garbage_collection_frees_the_oldest_first():
    events = mib(("a", 20), ("a", 0), ("b", 40), ("b", 0), ("c", 60))
    collecting = AllocatorSettings(garbage_collection_threshold=0.5)
    without, found = replay(events, cap=100 * MIB), replay(events, collecting, cap=100 * MIB)
    assert (without.reserved, without.retries) == (60 * MIB, 1)
    assert (found.reserved, found.retries) == (100 * MIB, 0)  # a went, b is still cached
    assert replay(events, collecting) == replay(events)  # a fraction of nothing is nothing
    assert replay(events, collecting, cap=120 * MIB).peak_reserved == 120 * MIB  # 60 is not above half


def test_garbage_collection_goes_on_until_the_threshold_is_kept():
    events = mib(("a", 20), ("a", 0), ("b", 40), ("b", 0), ("c", 60))
    found = replay(events, AllocatorSettings(garbage_collection_threshold=0.3), cap=100 * MIB)
    assert (found.reserved, found.retries) == (60 * MIB, 0)  # a was not enough


def test_garbage_collection_leaves_segments_in_use():
    events = mib(("a", 40), ("a", 0), ("b", 5), ("c", 50))
    found = replay(events, AllocatorSettings(garbage_collection_threshold=0.1), cap=100 * MIB)
    assert (found.reserved, found.retries) == (90 * MIB, 0)


def test_a_larger_cap_can_fail_where_a_smaller_one_did_not():
    # At 80 MiB, b releases a's segment; at 95 it need not, c settles there, and d finds 40 MiB held by 3.
    events = mib(("a", 40), ("a", 0), ("b", 50), ("c", 3), ("b", 0), ("d", 60))
    assert [cap for cap in (79, 80, 89, 90, 99, 100, 150) if fits(events, cap * MIB)] == [80, 89, 100, 150]
    assert smallest_cap(events) == 80 * MIB


def test_smallest_cap_tries_every_cap_that_changes_anything():
    # From 62 MiB on, b leaves a's segment to d; below, d has to open one of 20 MiB, which would take 70.
    events = mib(("a", 12), ("a", 0), ("b", 30), ("c", 20), ("d", 3))
    assert smallest_cap(events) == replay(events).peak_reserved == 62 * MIB
    assert replay(events, cap=61 * MIB).oom.next_cap == 62 * MIB


def test_smallest_cap_can_be_below_what_is_allocated_without_a_cap():
    # Without a cap, d takes a's 24 MiB whole; if b released them, d and e fill b's 32.
    events = mib(("a", 24), ("a", 0), ("b", 31), ("b", 0), ("d", 23), ("e", 9))
    assert replay(events).peak_allocated == 33 * MIB
    assert smallest_cap(events) == 32 * MIB


def test_smallest_cap_is_found_to_two_mebibytes_where_garbage_is_collected():
    # From 104 MiB on, 52 are within the threshold when c comes, and a's segment is kept for d.
    events = mib(("a", 12), ("a", 0), ("b", 40), ("c", 50), ("d", 5))
    collecting = AllocatorSettings(garbage_collection_threshold=0.5)
    assert [cap for cap in range(90, 110) if fits(events, cap * MIB, collecting)] == list(range(104, 110))
    assert 104 * MIB <= smallest_cap(events, collecting) < 106 * MIB


# Expandable segments.


@pytest.mark.parametrize(
    "events, reserved",
    [
        ([("a", 1 / 1024)], 2),
        ([("a", 1.5)], 20),
        ([("a", 15), ("b", 10)], 40),  # tiles: 25 MiB on two pages
        ([("a", 30), ("a", 0), ("b", 50)], 60),  # grows what is cached, where segments would be 80
        ([("a", 30), ("b", 10), ("a", 0), ("c", 31)], 80),  # what cannot grow stays a hole
    ],
)
def test_expandable_pools_grow_by_pages(events, reserved):
    assert outcome(replay(mib(*events), EXPANDABLE))[1] == reserved


def test_expandable_blocks_are_split_to_512_bytes():
    assert replay(mib(("a", 11)), EXPANDABLE).peak_allocated == 11 * MIB


def test_only_whole_free_pages_are_unmapped_and_the_lowest_mapped_again():
    allocator = Allocator(EXPANDABLE)
    first, _ = allocator.allocate(30 * MIB), allocator.allocate(5 * MIB)
    allocator.free(first)
    allocator.release()
    assert allocator.reserved == 20 * MIB
    assert [[block.size // MIB for block in segment] for segment in allocator.segments()] == [[10, 5, 5]]
    again = allocator.allocate(25 * MIB)
    assert (again.address, allocator.reserved) == (0, 40 * MIB)
    assert [[block.size // MIB for block in segment] for segment in allocator.segments()] == [[25, 5, 5, 5]]


def test_a_block_that_can_grow_is_kept_for_what_needs_it():
    allocator = Allocator(EXPANDABLE)
    first, _, last = (allocator.allocate(size * MIB) for size in (20, 5, 15))
    allocator.free(first)
    allocator.free(last)
    assert allocator.allocate(10 * MIB).address == 0  # 15 MiB would fit more tightly, but lie at the end


def test_expandable_segments_fit_where_fragments_do_not():
    events = mib(("a", 30), ("a", 0), ("b", 40), ("b", 0), ("c", 12), ("d", 60))
    assert smallest_cap(events, EXPANDABLE) == 80 * MIB
    assert smallest_cap(events) == 90 * MIB


def test_expandable_pages_and_the_segment_in_their_place_both_count_against_the_cap():
    assert not fits([("a", 22 * MIB)], 39 * MIB, EXPANDABLE)
    assert fits([("a", 22 * MIB)], 40 * MIB, EXPANDABLE)
    # One page more, 60 MiB, would do for b, but set_per_process_memory_fraction counts 26 MiB.
    assert not fits(mib(("a", 30), ("b", 25)), 66 * MIB - 1, EXPANDABLE)
    assert fits(mib(("a", 30), ("b", 25)), 66 * MIB, EXPANDABLE)


# Events.


@pytest.mark.parametrize("events", [[("a", 0)], [("a", None)], [("a", 1), ("a", 1)], [("a", -1)]])
def test_events_that_cannot_be_are_refused(events):
    with pytest.raises(ValueError, match=f"event {len(events) - 1}"):
        replay(events)


# Invariants.

SIZES = st.one_of(
    st.integers(1, 4096),
    st.sampled_from([MIB, MIB + 1, 10 * MIB - 512, 10 * MIB, 11 * MIB, 64 * MIB, CUBLAS_WORKSPACE]),
    st.integers(MIB, 12 * MIB),
    st.integers(10 * MIB, 90 * MIB),
)
SETTINGS = st.sampled_from(
    [
        AllocatorSettings(),
        EXPANDABLE,
        AllocatorSettings(max_split_size=20 * MIB),
        AllocatorSettings(max_split_size=31 * MIB, garbage_collection_threshold=0.4),
        AllocatorSettings(garbage_collection_threshold=0.6, roundup_power2_divisions=4),
        AllocatorSettings(large_segment_size=11 * MIB, roundup_power2_divisions=2),
        EXPANDABLE.model_copy(update={"max_split_size": 40 * MIB, "large_segment_size": 32 * MIB}),
    ]
)
CAPS = st.one_of(st.none(), st.integers(20 * MIB, 400 * MIB))


@st.composite
def event_lists(draw, longest=40):
    events, live = [], []
    for key, (size, pick) in enumerate(
        draw(st.lists(st.tuples(SIZES, st.integers(0, 99)), max_size=longest))
    ):
        if live and pick % 5 < 2:
            events.append((live.pop(pick % len(live)), 0))
        else:
            events.append((key, size))
            live.append(key)
    return events


def check(allocator, live):
    segments = allocator.segments()
    for segment in segments:
        for block, after in itertools.pairwise(segment):
            assert block.address + block.size == after.address
            assert block.next is after
            assert after.prev is block
            assert not (block.free and after.free)
        page = 2 * MIB if allocator.settings.expandable_segments else MIB
        assert sum(block.size for block in segment) % page == 0
    blocks = [block for segment in segments for block in segment]
    assert all(block.size > 0 and block.size % 512 == 0 for block in blocks)
    assert {id(block) for block in blocks if not block.free} == {id(block) for block in live}
    assert sum(block.size for block in blocks) == allocator.reserved
    assert sum(block.size for block in live) == allocator.allocated
    assert sum(block.requested for block in live) == allocator.requested
    assert allocator.requested <= allocator.allocated <= allocator.reserved
    assert allocator.cap is None or allocator.peak_reserved <= allocator.cap


@settings(max_examples=150)
@given(event_lists(), SETTINGS, CAPS)
def test_blocks_tile_segments_and_counts_are_sums(events, chosen, cap):
    allocator, live, peaks = Allocator(chosen, cap), {}, (0, 0, 0)
    for key, size in events:
        if not size:
            allocator.free(live.pop(key))
        elif (block := allocator.allocate(size)) is not None:
            live[key] = block
        else:
            break
        check(allocator, live.values())
        now = allocator.allocated, allocator.reserved, allocator.requested
        before, peaks = peaks, (allocator.peak_allocated, allocator.peak_reserved, allocator.peak_requested)
        # A peak takes in what is held now; it only moves between two events where more was held for a moment.
        assert all(peak >= max(old, current) for peak, old, current in zip(peaks, before, now, strict=True))
    found = replay(events, chosen, cap)
    assert found[:5] == (
        *(max(p, q) for p, q in zip(peaks, found[:3], strict=True)),
        allocator.reserved,
        allocator.retries,
    )
    for block in live.values():
        allocator.free(block)
    check(allocator, [])
    allocator.release()
    assert (allocator.reserved, allocator.allocated, allocator.requested) == (0, 0, 0)
    assert allocator.segments() == []


def slow_replay(events, cap):
    """Default settings, written for plainness: segments as lists of [bytes, key or None]."""
    segments, retries = [], 0
    peak_allocated = peak_reserved = 0
    for event, (key, request) in enumerate(events):
        if not request:
            for _, segment in segments:
                for piece in segment:
                    if piece[1] == key:
                        piece[1] = None
                for at in range(len(segment) - 1, 0, -1):
                    if segment[at][1] is None is segment[at - 1][1]:
                        segment[at - 1][0] += segment.pop(at)[0]
            continue
        size = max(1, -(-request // 512)) * 512
        small = size <= MIB
        fresh = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        choices = [
            (piece[0], number, at)
            for number, (kind, segment) in enumerate(segments)
            for at, piece in enumerate(segment)
            if kind == small and piece[1] is None and piece[0] >= size
        ]
        if not choices:
            held = sum(piece[0] for _, segment in segments for piece in segment)
            if cap is not None and held + fresh > cap:
                segments = [one for one in segments if any(piece[1] is not None for piece in one[1])]
                retries += 1
                held = sum(piece[0] for _, segment in segments for piece in segment)
                if held + fresh > cap:
                    return peak_allocated, peak_reserved, retries, event
            segments.append((small, [[fresh, None]]))
            peak_reserved = max(peak_reserved, held + fresh)
            choices = [(fresh, len(segments) - 1, 0)]
        whole, number, at = min(choices)
        segment = segments[number][1]
        segment[at][1] = key
        if whole - size >= 512 if small else whole - size > MIB:
            segment[at][0] = size
            segment.insert(at + 1, [whole - size, None])
        used = sum(piece[0] for _, segment in segments for piece in segment if piece[1] is not None)
        peak_allocated = max(peak_allocated, used)
    return peak_allocated, peak_reserved, retries, None


@settings(max_examples=200)
@given(event_lists(), CAPS)
def test_replay_equals_a_slow_model(events, cap):
    found = replay(events, cap=cap)
    at = found.oom and found.oom.event
    assert (found.peak_allocated, found.peak_reserved, found.retries, at) == slow_replay(events, cap)


@settings(max_examples=40)
@given(event_lists(longest=14), SETTINGS)
def test_smallest_cap_is_the_first_that_fits(events, chosen):
    collects = chosen.garbage_collection_threshold > 0
    cap = smallest_cap(events, chosen)
    assert fits(events, cap, chosen)
    if not collects:
        assert not any(fits(events, lower, chosen) for lower in range(0, cap, 2 * MIB))
        assert cap == 0 or not fits(events, cap - 1, chosen)
    unlimited = replay(events, chosen)
    slack = max((chosen.segment_size(chosen.round_size(size)) for _, size in events if size), default=0)
    enough = unlimited.peak_reserved + (slack if chosen.expandable_segments else 0)
    if collects:
        enough = int(enough / chosen.garbage_collection_threshold) + 2
    assert cap <= enough
    assert replay(events, chosen, enough) == unlimited


@settings(max_examples=40)
@given(event_lists(), SETTINGS, CAPS)
def test_names_do_not_matter(events, chosen, cap):
    renamed = replay([(f"buffer {-key}", size or None) for key, size in events], chosen, cap)
    found = replay(events, chosen, cap)
    assert renamed[:5] == found[:5]
    assert (renamed.oom and renamed.oom.event) == (found.oom and found.oom.event)


@given(st.lists(SIZES, max_size=20))
def test_without_frees_expandable_pools_hold_their_pages_and_nothing_else(sizes):
    rounded = [AllocatorSettings().round_size(size) for size in sizes]
    small = sum(size for size in rounded if size <= MIB)
    large = sum(size for size in rounded if size > MIB)
    found = replay(list(enumerate(sizes)), EXPANDABLE)
    assert found.peak_allocated == small + large
    assert found.reserved == -(-small // (2 * MIB)) * 2 * MIB + -(-large // (20 * MIB)) * 20 * MIB
