"""Programs cut to sections, without tensors: their calls meet exactly the pairs that the pattern and the
documents let meet, of the queries that there are, and ask for no more than is reserved."""

from __future__ import annotations

import random
from itertools import chain, pairwise

import numpy as np
import pytest
from conformance import configs
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import backward_needs, beyond, forward_needs
from test_program import FIXED, assert_calls_meet_as_said, met, shape_of, tiles_of
from test_sizes import expanded, random_config, random_shape

from attention import AttentionConfig, build
from attention.ops.extent import extent_of
from attention.ops.maskless import maskless
from attention.ops.program import Gather
from attention.reference import multiplicity
from attention.sections import CutProgram, TokenSection, sections_of
from attention.sizes.arena import arena_bytes
from attention.sizes.shape import chunk_tokens
from attention.sizes.tiles import backward_sizes, forward_sizes

# Sections


def test_sections_are_documents_as_far_as_there_are_queries():
    assert sections_of((5,), 0) == (TokenSection(0, 5, 0, 5),)
    assert sections_of((5,), 4) == (TokenSection(4, 5, 0, 5),)
    assert sections_of((2, 3, 1), 0) == (
        TokenSection(0, 2, 0, 2),
        TokenSection(2, 5, 2, 5),
        TokenSection(5, 6, 5, 6),
    )
    assert sections_of((2, 3, 1), 3) == (TokenSection(3, 5, 2, 5), TokenSection(5, 6, 5, 6))
    assert sections_of((2, 3, 1), 5) == (TokenSection(5, 6, 5, 6),)


# Pairs


def cut_problem(config, shape, *lengths):
    """The problem of a config over documents of these lengths, one list a batch item, or over whole ones."""
    return build(config)._cut_problem(shape, lengths or None)[0]


def expected_of(config, shape, lengths):
    """How often each (head, query, key) is to be met: as the pattern has it over the whole sequence, within
    documents, by the queries that there are."""
    found = multiplicity(config, shape.seq, shape.heads, shape.causal).numpy().copy()
    document = np.repeat(np.arange(len(lengths)), lengths)
    found *= document[:, None] == document
    found[:, : shape.origin] = 0
    return found


def assert_honest(tiles, shape, covers):
    """Tiles follow each other and hold what they say. A query sees some key of each call that it is in: a
    kernel says nothing true of one that sees none."""
    edges = [shape.origin, *chain.from_iterable((tile.start, tile.stop) for tile in tiles), shape.seq]
    assert edges == sorted(edges)
    if covers:
        assert all(a == b for a, b in zip(edges[::2], edges[1::2], strict=True))
    for tile in tiles:
        assert_calls_meet_as_said(tile, shape)
        assert all(map(sees_something, tile.calls))


def sees_something(call):
    """Whether every query of a call sees one of its keys."""
    queries, keys = call.queries[0].length, call.keys.length
    if call.mask == "band":
        return all(first < stop for first, stop in map(call.seen, (0, queries - 1)))
    if call.mask in ("causal", "diagonal"):
        return call.edge >= 0 and keys > 0
    return keys > 0


def assert_right(config, shape, lengths):
    problem = cut_problem(config, shape, lengths)
    for cut_for in (shape, shape.backward()):
        tiles = list(problem.tiles(0, cut_for))
        np.testing.assert_array_equal(met(tiles, cut_for), expected_of(config, shape, lengths))
        assert_honest(tiles, cut_for, problem.covers)
    without = [maskless(tile, shape) for tile in problem.tiles(0, shape)]
    np.testing.assert_array_equal(met(without, shape), expected_of(config, shape, lengths))


def cut_shape(seq, queries, **sizes):
    """The shape of a call whose queries are the last of a sequence."""
    shape = shape_of(seq, **sizes)._replace(origin=seq - queries)
    names = ("seq", "heads", "kv_heads", "head_dim", "itemsize", "workspace", "origin")
    chunk = chunk_tokens(cpu=sizes.get("cpu", True), **{name: getattr(shape, name) for name in names})
    return shape._replace(chunk=sizes.get("chunk", chunk))


DOCUMENTS = {
    "one": (77,),
    "left padding": (11, 66),
    "right padding": (70, 7),
    "tokens": (1,) * 77,
    "packed": (3, 1, 29, 1, 1, 22, 12, 8),
    "halves of blocks": (4, 8, 8, 20, 37),
}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("name", FIXED)
def test_calls_meet_the_pairs_of_documents_and_queries(name, documents):
    rng = random.Random(f"{name} {documents}")
    for queries in (rng.choice((77, 76)), rng.choice((1, 7, 17))):
        sizes = {"kv_heads": rng.choice((1, 2, 4)), "packs": rng.random() < 0.5}
        causal = rng.random() < 0.5
        assert_right(FIXED[name], cut_shape(77, queries, causal=causal, **sizes), DOCUMENTS[documents])


@st.composite
def cut_lengths(draw, seq):
    """Documents of a sequence: few of any length, or many short ones, or padding and one."""
    most = draw(st.sampled_from([1, 2, 4, 12, seq]))
    inner = draw(st.sets(st.integers(1, seq - 1), max_size=most - 1)) if seq > 1 else ()
    return tuple(end - begin for begin, end in pairwise([0, *sorted(inner), seq]))


@st.composite
def cut_programs(draw, longest):
    """(config, shape with an origin, lengths of documents)."""
    seq = draw(st.integers(1, longest))
    kv_heads = draw(st.integers(1, 3))
    shape = cut_shape(
        seq,
        draw(st.one_of(st.just(seq), st.just(1), st.integers(1, seq))),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 8, 64, 256])),
        itemsize=draw(st.sampled_from([2, 4, 8])),
        causal=draw(st.booleans()),
        workspace=draw(st.sampled_from([1 << 16, 1 << 17, 1 << 22])),
        cpu=draw(st.booleans()),
        packs=draw(st.booleans()),
        widens=draw(st.booleans()),
        groups=draw(st.booleans()),
    )
    return draw(configs()), shape, draw(cut_lengths(seq))


@settings(max_examples=25)
@given(program=cut_programs(90))
def test_random_programs_meet_their_pairs(program):
    assert_right(*program)


@pytest.mark.slow
@settings(max_examples=5000)
@given(program=cut_programs(260))
def test_many_random_programs_meet_their_pairs(program):
    assert_right(*program)


def test_what_is_not_cut_stays_as_it_is():
    """Tiles that no edge of a document meets are the very same, so that a long document costs no more than a
    sequence of its own."""
    config = FIXED["local_window"]
    shape = cut_shape(4000, 4000, workspace=1 << 20, causal=True)
    whole = tiles_of(config, shape)
    found = list(cut_problem(config, shape, (2000, 2000)).tiles(0, shape))
    assert len(found) <= len(whole) + 2
    assert sum(tile in whole for tile in found) >= len(whole) - 4


@pytest.mark.parametrize("name", FIXED)
def test_one_query_is_few_calls(name):
    """Without masks, and as many as its keys need."""
    shape = cut_shape(3000, 1, causal=True, workspace=1 << 20)
    tiles = list(cut_problem(FIXED[name], shape).tiles(0, shape))
    assert len(tiles) <= 1
    assert all(call.mask in ("none", "tail") for tile in tiles for call in tile.calls)
    assert sum(len(tile.calls) for tile in tiles) <= 12


def test_batch_items_of_equal_documents_share_a_program():
    made = []

    def make(shape):
        made.append(shape)
        return tiles_of(FIXED["dense"], shape)

    shape = cut_shape(77, 77)
    program = CutProgram(make, [(77,), (7, 70), (77,)], 0)
    tiles = [list(program.tiles(item, shape)) for item in range(3)]
    assert len(made) == 2
    assert tiles[0] == tiles[2]
    for item, lengths in enumerate([(77,), (7, 70), (77,)]):
        np.testing.assert_array_equal(met(tiles[item], shape), expected_of(FIXED["dense"], shape, lengths))


# What is reserved


def over(problem, item=0):
    """What a pass over a batch item asks for beyond what is reserved for all of them."""
    shape, back = problem.shape, problem.shape.backward()
    extent, back_extent = (problem.reserves.extent(each) for each in (shape, back))
    tiles, back_tiles = (list(problem.tiles(item, each)) for each in (shape, back))
    return beyond(tiles, extent, shape, back_tiles, back_extent, kinds=False)


def sized(shape):
    return shape._replace(widens=shape.widens and shape.itemsize == 2)


def assert_enough(program, other):
    config, shape, lengths = program
    items = (lengths, other) if sum(other) == shape.seq else (lengths,)
    problem = cut_problem(config, sized(shape), *items)
    for item in range(len(items)):
        assert not over(problem, item)


@settings(max_examples=60)
@given(data=st.data())
def test_what_is_reserved_is_enough(data):
    program = data.draw(cut_programs(400))
    assert_enough(program, data.draw(cut_lengths(program[1].seq)))


@pytest.mark.slow
@settings(max_examples=5000)
@given(data=st.data())
def test_what_is_reserved_is_enough_for_many(data):
    program = data.draw(cut_programs(700))
    assert_enough(program, data.draw(cut_lengths(program[1].seq)))


def random_lengths(rng, seq):
    """Documents as people pack them, one beside padding, or two that end anywhere."""
    kind = rng.choice(("packed", "left", "right", "halves", "one"))
    if kind == "one" or seq < 3:
        return (seq,)
    if kind == "packed":
        mean = max(seq // rng.choice((2, 3, 8, 20)), 1)
        edges = [0]
        while edges[-1] < seq:
            edges.append(min(edges[-1] + 1 + round(rng.expovariate(1 / mean)), seq))
        return tuple(b - a for a, b in pairwise(edges))
    first = rng.randint(1, seq - 1)
    if kind == "left":
        first = max(first // 10, 1)
    elif kind == "right":
        first = max(seq - first // 10 - 1, 1)
    return (first, seq - first)


def random_program(seed):
    """(config, shape, lengths) at sizes that people run, up to a million tokens; the sequence is cut where
    it takes too many calls."""
    rng = random.Random(seed)
    shape, config = random_shape(rng), None
    while not isinstance(config, AttentionConfig):
        config = random_config(rng, shape)
    share = rng.choice((0.0, 0.0, rng.random(), 1.0))
    while True:
        lengths = random_lengths(rng, shape.seq)
        queries = max(round(shape.seq * (1 - share)), 1)
        names = ("seq", "heads", "kv_heads", "head_dim", "itemsize", "workspace")
        sizes = {name: getattr(shape, name) for name in names} | {"origin": shape.seq - queries}
        shape = shape._replace(origin=shape.seq - queries, chunk=chunk_tokens(cpu=shape.groups, **sizes))
        problem = cut_problem(config, shape, lengths)
        if all(expanded(problem.tiles(0, each)) is not None for each in (shape, shape.backward())):
            return config, shape, lengths
        shape = shape._replace(seq=shape.seq // 3 + 1, origin=0)


def failures(seeds):
    """(seed, config, shape, lengths, what is beyond) of the first that ask for more than is reserved."""
    found = []
    for seed in seeds:
        config, shape, lengths = random_program(seed)
        if beyond_it := over(cut_problem(config, shape, lengths)):
            found.append((seed, config, shape, lengths, beyond_it))
        if len(found) == 5:
            break
    return found


def test_what_is_reserved_is_enough_at_the_sizes_that_people_run():
    assert not failures(range(25))


@pytest.mark.slow
def test_what_is_reserved_is_enough_for_5000_programs(seed):
    assert not failures(range(seed * 5000, (seed + 1) * 5000))


@pytest.mark.slow
def test_nothing_is_reserved_in_vain(seed):
    """What a program's calls ask for at most is what its extent says, because that is made of them."""
    for number in range(seed * 200, seed * 200 + 200):
        config, shape, lengths = random_program(number)
        problem, back = cut_problem(config, shape, lengths), shape.backward()
        tiles = list(problem.tiles(0, shape))
        asked = [
            (forward_needs(tiles, shape, False), forward_sizes(problem.reserves.extent(shape), shape, False)),
            (
                backward_needs(list(problem.tiles(0, back)), None, back, kinds=False),
                backward_sizes(problem.reserves.extent(back), back),
            ),
        ]
        for needs, sizes in asked:
            needed = {name: needs.get(name, 0) for name in sizes}
            gathers = any(isinstance(call.keys, Gather) for tile in tiles for call in tile.calls)
            assert arena_bytes(needed) >= (0.8 if gathers else 0.98) * arena_bytes(sizes), (
                number,
                needed,
                sizes,
            )


def test_the_extent_of_a_program_is_of_all_its_calls():
    shape = cut_shape(77, 77, causal=True)
    tiles = list(cut_problem(FIXED["local_window-token"], shape, (30, 47)).tiles(0, shape))
    extent = extent_of(tiles, shape)
    assert extent.tokens == max(tile.stop - tile.start for tile in tiles)
    assert len({kind.name for kind in extent.kinds}) == len(extent.kinds)
    assert extent.merges == any(tile.merge for tile in tiles)
