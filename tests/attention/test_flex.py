"""FlexAttention: the mask is the layout and of its size, and the backend is chosen by rule."""

from __future__ import annotations

import pytest
import torch
from conformance import HEADS, adaptive, changed, dilated, oracle, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import AttentionConfig, SparsePatternConfig, UnavailableError, build
from attention.layout import build_layout
from attention.ops import flex

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
@given(
    name=st.sampled_from(sorted(PATTERNS)), seq=st.integers(1, 500), causal=st.booleans(),
)  # fmt: skip
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


# The choice


@pytest.fixture
def capable(monkeypatch):
    """A CUDA tensor as far as the rules look, and a way to set the capability."""

    def tensor(capability, dtype=torch.float16):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

        class Fake:
            device = torch.device("cuda", 0)

        Fake.dtype = dtype
        return Fake()

    return tensor


def asked(backend, config=PATTERNS["local_window"]):
    return changed(config, backend=backend)


def test_auto_takes_flex_where_it_serves_and_sdpa_elsewhere(capable):
    assert flex.resolve(asked("auto"), capable((8, 0))) == "flex"
    assert flex.resolve(asked("auto"), capable((9, 0), torch.float32)) == "flex"
    assert flex.resolve(asked("auto"), capable((7, 5))) == "sdpa"
    assert flex.resolve(asked("auto"), torch.zeros(1)) == "sdpa"


@pytest.mark.parametrize("capability", [(6, 1), (8, 0), (9, 0)])
def test_sdpa_is_given_whenever_it_is_asked_for(capable, capability):
    assert flex.resolve(asked("sdpa"), capable(capability)) == "sdpa"


@pytest.mark.parametrize(
    "config, capability, dtype, why",
    [
        (PATTERNS["local_window"], (7, 5), torch.float16, "needs compute capability 8.0, this GPU has 7.5"),
        (PATTERNS["local_window"], (8, 0), torch.float64, "no float64"),
        (patterned("local_window", block=8), (8, 0), torch.float16, "power of two from 16, got 8"),
        (patterned("local_window", block=48), (8, 0), torch.float16, "power of two from 16, got 48"),
        (AttentionConfig(variant="dense"), (8, 0), torch.float16, "variant 'dense'"),
        (dilated([(8, 1)]), (8, 0), torch.float16, "variant 'dilated'"),
        (adaptive(0.5, block=16), (8, 0), torch.float16, "variant 'adaptive'"),
    ],
)
def test_flex_is_refused_with_the_reason_and_auto_falls_back(capable, config, capability, dtype, why):
    q = capable(capability, dtype)
    assert why in flex.unfit(config, q)
    assert flex.resolve(asked("auto", config), q) == "sdpa"
    with pytest.raises(UnavailableError, match="use backend='auto' or 'sdpa'") as caught:
        flex.resolve(asked("flex", config), q)
    assert why in str(caught.value)


def test_flex_serves_what_the_rules_allow(capable):
    assert flex.unfit(patterned("local_window", block=128), capable((8, 0), torch.bfloat16)) is None


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
        found = flex.attend(q, k, v, mask, 0.25)
    expected = oracle(build(config), q, k, causal)(q, k, v)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
