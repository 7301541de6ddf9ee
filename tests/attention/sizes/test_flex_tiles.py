"""FlexAttention's tiles are torch's wherever block and card take those, and else run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attention.sizes.flex_tiles import (
    LARGEST,
    MOST_CHANNELS,
    SMALLEST,
    FlexTile,
    backward_tile,
    declared_block,
    forward_shared,
    forward_tile,
    kernel_options,
    shared_bytes,
    torch_backward,
    torch_forward,
    unfit_sizes,
)

CARDS = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
CHANNELS = range(SMALLEST, MOST_CHANNELS + 1)
BLOCKS = [16, 32, 64, 128, 256, 1024]
every_card = pytest.mark.parametrize("card", CARDS)
either_size = pytest.mark.parametrize("itemsize", [2, 4])

RECORDED = Path(__file__).with_name("flex_shared.json")
"""Shared memory of torch's kernels as Triton 3.7 compiles them: direction, capability, itemsize,
head_dim, tile, bytes."""


def recorded(direction):
    for what, card, itemsize, head_dim, tile, taken in json.loads(RECORDED.read_text(encoding="utf-8")):
        if what == direction:
            yield (card // 10, card % 10), itemsize, head_dim, FlexTile(*tile), taken


def test_shared_memory_going_forward_is_what_triton_takes():
    for card, itemsize, head_dim, tile, taken in recorded("forward"):
        most = forward_shared(tile, head_dim, itemsize, card)
        exact = card[0] not in (10, 11) or itemsize == 4
        assert most == taken if exact else most >= taken, (card, itemsize, head_dim, tile)


def channels(head_dim):
    """As the kernels round them up."""
    return 1 << (head_dim - 1).bit_length()


def test_tiles_going_backward_fit_as_triton_compiles_them():
    """Cards before 9.0 and from 12.0 on have the same code. Smaller tiles, recorded in part, take less."""
    taken = {
        (8 if card[0] == 12 else card[0], itemsize, channels(head_dim), tile): used
        for card, itemsize, head_dim, tile, used in recorded("backward")
    }
    for card in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        for itemsize in (2, 4):
            for head_dim in range(SMALLEST + 1, MOST_CHANNELS + 1):
                alike = (8 if card[0] == 12 else card[0], itemsize, channels(head_dim))
                largest = taken[*alike, backward_tile(LARGEST, head_dim, itemsize, card)]
                assert largest <= shared_bytes(card), (card, itemsize, head_dim)
                for block in (16, 32, 64):
                    smaller = taken.get((*alike, backward_tile(block, head_dim, itemsize, card)), 0)
                    assert smaller <= largest, (card, itemsize, head_dim, block)


@either_size
@every_card
def test_every_tile_divides_its_block_and_fits_the_card(card, itemsize):
    for head_dim in CHANNELS:
        for block in BLOCKS:
            forward, backward = (
                tile(block, head_dim, itemsize, card) for tile in (forward_tile, backward_tile)
            )
            for tile in (forward, backward):
                assert min(tile.held, tile.walked) >= SMALLEST
                assert block % tile.held == block % tile.walked == 0
            assert backward.held % backward.walked == 0  # the kernels insist on it
            assert forward_shared(forward, head_dim, itemsize, card) <= shared_bytes(card)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128])
@every_card
def test_torch_chooses_for_itself_where_its_tiles_fit(card, head_dim):
    for block in (128, 256, 1024):
        assert kernel_options(block, 4 * block, head_dim, 2, card) == {}


@either_size
@every_card
def test_torchs_tile_is_taken_wherever_it_divides_and_fits(card, itemsize):
    for head_dim in CHANNELS:
        for block in BLOCKS:
            torchs = torch_forward(head_dim, itemsize, card)
            divides = max(torchs.held, torchs.walked) <= block
            fits = forward_shared(torchs, head_dim, itemsize, card) <= shared_bytes(card)
            assert (forward_tile(block, head_dim, itemsize, card) == torchs) == (divides and fits)


def test_smaller_blocks_are_named_in_the_options_and_not_in_the_mask():
    options = kernel_options(16, 4096, 64, 2, (8, 0))
    assert declared_block(16) == LARGEST
    blocks = {"SPARSE_Q_BLOCK_SIZE", "SPARSE_KV_BLOCK_SIZE", "BLOCK_M", "BLOCK_N"}
    blocks |= {"BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"}
    assert {name for name, value in options.items() if value == 16} == blocks
    assert {name: options[name] for name in options.keys() - blocks} == {
        "fwd_num_stages": 3,
        "fwd_num_warps": 4,
        "bwd_num_stages": 2,
        "bwd_num_warps": 4,
    }
    assert declared_block(256) == 256


def test_held_and_walked_are_named_the_other_way_round_going_backward():
    options = kernel_options(64, 4096, 32, 2, (8, 0))
    assert (options["BLOCK_M1"], options["BLOCK_N1"]) == (32, 64)
    assert (options["BLOCK_M2"], options["BLOCK_N2"]) == (64, 32)


def test_a_last_block_that_is_short_is_said_to_torch():
    """With 384 tokens, a multiple of 128, torch would read 512 of blocks of 256."""
    assert kernel_options(256, 384, 64, 2, (8, 0)) == {"IS_DIVISIBLE": False}
    assert kernel_options(128, 1000, 64, 2, (8, 0)) == {"IS_DIVISIBLE": False}


def test_short_sequences_run_on_the_same_kernel():
    assert kernel_options(128, 127, 64, 2, (8, 0))["FORCE_USE_FLEX_ATTENTION"]
    assert "FORCE_USE_FLEX_ATTENTION" not in kernel_options(128, 128, 64, 2, (8, 0))


@pytest.mark.parametrize(
    "head_dim, itemsize, card, why",
    [
        (64, 2, (7, 5), "needs compute capability 8.0, this GPU has 7.5"),
        (64, 8, (8, 0), "no float64"),
        (8, 2, (8, 0), "16 to 256 channels a head, head_dim is 8"),
        (257, 2, (9, 0), "16 to 256 channels a head, head_dim is 257"),
    ],
)
def test_what_no_tile_serves_is_refused_with_the_reason(head_dim, itemsize, card, why):
    assert why in unfit_sizes(head_dim, itemsize, card)


def test_all_else_runs():
    for card in CARDS:
        for itemsize in (2, 4):
            assert not any(unfit_sizes(head_dim, itemsize, card) for head_dim in CHANNELS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
@every_card
def test_torchs_tiles_are_those_of_the_torch_that_is_installed(card, monkeypatch):
    """From 2.13 on they are as here; in older ones some differ."""
    heuristics = pytest.importorskip("torch._inductor.template_heuristics.triton").CUDAConfigHeuristic()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: card)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in CHANNELS:
            sizes = (head_dim, dtype.itemsize, card)
            (forward,) = heuristics.get_flex_attn_fwd_configs(head_dim, dtype)
            (backward,) = heuristics.get_flex_attn_bwd_configs(head_dim, dtype)
            assert torch_forward(*sizes) == (
                forward.block_m,
                forward.block_n,
                forward.num_stages,
                forward.num_warps,
            )
            held, walked, stages, warps = torch_backward(*sizes)
            assert (walked, held, held, walked, stages, warps) == (
                backward.block_m1,
                backward.block_n1,
                backward.block_m2,
                backward.block_n2,
                backward.num_stages,
                backward.num_warps,
            )
