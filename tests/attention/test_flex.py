"""FlexAttention: the mask is the layout and of its size, and the backend is chosen by rule."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from conformance import HEADS, adaptive, changed, dilated, oracle, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import AttentionConfig, SparsePatternConfig, UnavailableError, build
from attention.layout import build_layout
from attention.ops import flex, kernels
from attention.ops.kernels import TRUST
from attention.sizes.flex import FLEX_SHARE, flex_list_bytes
from attention.sizes.row_bounds import rows_of

CPU = torch.device("cpu")


def patterned(pattern_type, branches=(), block=16, **fields):
    return AttentionConfig(
        variant="block_sparse",
        pattern=SparsePatternConfig(pattern_type=pattern_type, block_size=block, **fields),
        segment_lengths=[n * block for n, _ in branches],
        dilation_rates=[r for _, r in branches],
    )


PATTERNS = {
    "local_window": patterned("local_window", local_window_size=64),
    "global_local": patterned("global_local", local_window_size=32, global_tokens=20),
    "dilated_sparse": patterned("dilated_sparse", [(4, 1), (16, 3)], sparsity_ratio=0.4),
}
every_pattern = pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS.keys())
causal_or_not = pytest.mark.parametrize("causal", [False, True])


def dense_of(counts, indices, blocks):
    """[blocks, blocks] bool from counts [1, 1, rows] and indices [1, 1, rows, longest]."""
    dense = torch.zeros(blocks, blocks, dtype=torch.int64)
    for row in range(blocks):
        columns = indices[0, 0, row, : counts[0, 0, row]].long()
        dense[row].index_add_(0, columns, torch.ones_like(columns))
    assert dense.max() <= 1
    return dense.bool()


def layout_matrix(layout):
    dense = torch.zeros(layout.blocks, layout.blocks, dtype=torch.bool)
    for i in range(layout.blocks):
        dense[i, layout.row(i).tolist()] = True
    return dense


def sides(mask, blocks):
    """(partial, full) by rows and (partial, full) by columns."""
    return [
        dense_of(*pair, blocks)
        for pair in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
            (mask.q_num_blocks, mask.q_indices),
            (mask.full_q_num_blocks, mask.full_q_indices),
        )
    ]


def mask_of(layout, causal):
    return flex.block_mask(layout, causal, flex.block_lists(layout, causal, CPU))


def assert_is_the_layout(layout, causal):
    mask = mask_of(layout, causal)
    partial, full, partial_t, full_t = sides(mask, layout.blocks)
    own = torch.eye(layout.blocks, dtype=torch.bool)
    active = layout_matrix(layout)
    assert torch.equal(partial, active & own if causal else torch.zeros_like(own))
    assert torch.equal(full, active & ~own if causal else active)
    assert torch.equal(partial_t, partial.T)
    assert torch.equal(full_t, full.T)


@settings(max_examples=50)
@given(name=st.sampled_from(sorted(PATTERNS)), seq=st.integers(1, 500), causal=st.booleans())
def test_mask_rows_are_the_layout_and_columns_its_transpose(name, seq, causal):
    assert_is_the_layout(build_layout(PATTERNS[name], seq, causal), causal)


@causal_or_not
@every_pattern
def test_torch_reads_the_mask_as_the_layout(config, causal):
    layout = build_layout(config, 256, causal)
    mask = mask_of(layout, causal)
    assert torch.equal(mask.to_dense()[0, 0].bool(), layout_matrix(layout))
    assert mask.shape[-2:] == (256, 256)
    assert mask.BLOCK_SIZE == (16, 16)


@causal_or_not
def test_lists_grow_with_the_longest_row_and_never_with_blocks_times_blocks(causal):
    """On a GPU, whose kernels take narrow rows; the CPU's, run in studies alone, do not."""
    config = patterned("local_window", block=128, local_window_size=1024)
    seq = 1 << 20
    layout = build_layout(config, seq, causal)
    lists = flex.block_lists(layout, causal, torch.device("meta"))
    longest = int(layout.counts.max())
    assert len(lists) == 8
    assert all(x.dtype == torch.int32 for x in lists)
    assert all(x.shape in ((1, 1, layout.blocks), (1, 1, layout.blocks, x.shape[-1])) for x in lists)
    assert all(x.shape[-1] <= longest for x in lists[1::2])


@st.composite
def layouts(draw):
    """(config, seq, causal) of a few hundred blocks at most, of sizes that FlexAttention takes."""
    block = draw(st.sampled_from([16, 32, 64]))
    branch = st.tuples(st.integers(1, 200), st.integers(1, 12))
    pattern = draw(st.sampled_from(sorted(PATTERNS)))
    config = patterned(
        pattern,
        draw(st.lists(branch, min_size=1, max_size=5)) if pattern == "dilated_sparse" else (),
        block=block,
        local_window_size=draw(st.integers(1, 5000)),
        global_tokens=draw(st.integers(1, 500)),
        sparsity_ratio=draw(st.sampled_from([0.01, 0.02, 0.1, 0.3, 0.5, 1.0])),
    )
    return config, draw(st.integers(1, 200 * block)), draw(st.booleans())


def list_bytes(config, seq, causal):
    """Bytes of the lists on a GPU."""
    lists = flex.block_lists(build_layout(config, seq, causal), causal, torch.device("meta"))
    return sum(x.nbytes for x in lists)


@settings(max_examples=200)
@given(case=layouts())
def test_the_closed_form_of_the_lists_is_enough_and_exact_for_windows(case):
    config, seq, causal = case
    most, real = flex_list_bytes(rows_of(config, seq, causal), seq), list_bytes(*case)
    assert real <= most
    if config.pattern.pattern_type != "dilated_sparse":
        # Under a causal mask a row's own block is in another list.
        assert most <= real + 8 * causal * -(-seq // config.pattern.block_size)


# The choice


class Fake:
    """A CUDA tensor as far as the rules look."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype, size):
        self.dtype, self.shape = dtype, torch.Size(size)
        self.nbytes = self.shape.numel() * dtype.itemsize


@pytest.fixture
def capable(monkeypatch):
    """q and k of a GPU of a capability, 8 heads of 64 channels unless it says otherwise."""

    def tensors(capability=(8, 0), dtype=torch.float16, size=(1, 4096, 8, 64), kv_heads=8):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setenv(TRUST, "1")
        monkeypatch.setattr(kernels, "flash_is_built", lambda: True)
        batch, seq, _, head_dim = size
        return Fake(dtype, size), Fake(dtype, (batch, seq, kv_heads, head_dim))

    return tensors


def asked(backend, config=PATTERNS["local_window"]):
    return changed(config, backend=backend)


def test_auto_takes_flex_where_it_serves_and_sdpa_elsewhere(capable):
    assert flex.resolve(asked("auto", PATTERNS["dilated_sparse"]), *capable((8, 0)), False) == "flex"
    assert flex.resolve(asked("auto"), *capable((9, 0), torch.float32), True) == "flex"
    # Windows of 16 bits are flash attention's own.
    assert flex.resolve(asked("auto"), *capable((8, 0)), False) == "sdpa"
    assert flex.resolve(asked("auto"), *capable((7, 5)), False) == "sdpa"
    assert flex.resolve(asked("auto"), torch.zeros(1), torch.zeros(1), False) == "sdpa"


@pytest.mark.parametrize("capability", [(6, 1), (8, 0), (9, 0)])
def test_sdpa_is_given_whenever_it_is_asked_for(capable, capability):
    assert flex.resolve(asked("sdpa"), *capable(capability), False) == "sdpa"


@pytest.mark.parametrize(
    "config, capability, dtype, why",
    [
        (PATTERNS["local_window"], (7, 5), torch.float16, "needs compute capability 8.0, this GPU has 7.5"),
        (PATTERNS["local_window"], (8, 0), torch.float64, "no float64"),
        (patterned("local_window", block=8), (8, 0), torch.float16, "power of two from 16, got 8"),
        (patterned("local_window", block=48), (8, 0), torch.float16, "power of two from 16, got 48"),
        (patterned("local_window", block=64, edges="token"), (8, 0), torch.float16, "edges='token'"),
        (AttentionConfig(variant="dense"), (8, 0), torch.float16, "variant 'dense'"),
        (dilated([(8, 1)]), (8, 0), torch.float16, "variant 'dilated'"),
        (adaptive(0.5, block=16), (8, 0), torch.float16, "variant 'adaptive'"),
    ],
)
def test_flex_is_refused_with_the_reason_and_auto_falls_back(capable, config, capability, dtype, why):
    q, k = capable(capability, dtype)
    assert why in flex.unfit(config, q)
    assert flex.resolve(asked("auto", config), q, k, False) == "sdpa"
    with pytest.raises(UnavailableError, match="use backend='auto' or 'sdpa'") as caught:
        flex.resolve(asked("flex", config), q, k, False)
    assert why in str(caught.value)


def test_flex_serves_what_the_rules_allow(capable):
    assert flex.unfit(patterned("local_window", block=128), capable((8, 0), torch.bfloat16)[0]) is None


GLOBAL = patterned("global_local", block=128, local_window_size=1024, global_tokens=64)


@pytest.mark.parametrize(
    "size, kv_heads, causal, backend",
    [
        ((1, 1 << 19, 8, 32), 8, False, "sdpa"),  # 134.3 MB of lists, and 134.2 are a sixteenth
        ((1, (1 << 19) - 1024, 8, 32), 8, False, "flex"),
        ((1, 1 << 19, 8, 32), 8, True, "flex"),  # rows before the global block's are short
        ((1, 1 << 20, 8, 32), 8, False, "sdpa"),
        ((3, 1 << 20, 8, 32), 8, False, "flex"),  # the batch shares them
        ((1, 1 << 20, 32, 32), 32, False, "flex"),
        ((1, 1 << 20, 32, 32), 1, False, "flex"),
        ((1, 1 << 20, 8, 32), 1, True, "sdpa"),
    ],
)
def test_auto_leaves_flex_where_its_lists_are_long_and_who_asks_for_it_gets_it(
    capable, size, kv_heads, causal, backend
):
    q, k = capable(dtype=torch.float32, size=size, kv_heads=kv_heads)
    assert flex.unfit(GLOBAL, q) is None
    assert flex.resolve(asked("auto", GLOBAL), q, k, causal) == backend
    assert flex.resolve(asked("flex", GLOBAL), q, k, causal) == "flex"


@settings(max_examples=100)
@given(
    case=layouts(), batch=st.integers(1, 2), kv_heads=st.sampled_from([1, 2]), dim=st.sampled_from([16, 32])
)
def test_lists_under_auto_are_never_more_than_a_sixteenth_of_q_k_v_and_out(case, batch, kv_heads, dim):
    config, seq, causal = case
    q, k = (Fake(torch.float32, (batch, seq, heads, dim)) for heads in (2, kv_heads))
    capability = mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0))
    with capability, mock.patch.dict(os.environ, {TRUST: "1"}):
        chosen = flex.resolve(asked("auto", config), q, k, causal)
    floor = 2 * (q.nbytes + k.nbytes)
    if chosen == "flex":
        assert FLEX_SHARE * list_bytes(*case) <= floor
    else:
        assert FLEX_SHARE * flex_list_bytes(rows_of(config, seq, causal), seq) > floor


# The kernel, compiled for the CPU: forward alone, which is all it has there


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("kv_heads", [2, HEADS])
@causal_or_not
@every_pattern
def test_compiled_forward_equals_the_oracle(config, causal, kv_heads):
    seq = 200
    q, k, v = qkv(seq, batch=2, kv_heads=kv_heads, dtype=torch.float32)
    mask = mask_of(build_layout(config, seq, causal), causal)
    with torch.no_grad():
        found = flex.attend(q, k, v, mask, 16, 0.25)
    expected = oracle(build(config), q, k, causal)(q, k, v)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
