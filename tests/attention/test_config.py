"""Configs are strict values: what is accepted survives JSON unchanged, what is refused says why."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from attention.config import (
    PATTERN_TYPES,
    SCHEMA_VERSION,
    AdaptiveConfig,
    AttentionConfig,
    MultiheadConfig,
    ShardingConfig,
    SparsePatternConfig,
    Value,
)
from attention.errors import AttentionPlannerError, ConfigError, DistributedError, OutOfMemoryError

BRANCHES: dict[str, Any] = {"segment_lengths": [2048, 4096], "dilation_rates": [1, 2]}
LOCAL: dict[str, Any] = {"pattern_type": "local_window"}
SCORER: dict[str, Any] = {"num_heads": 8, "head_dim": 64}
PROJECTIONS: dict[str, Any] = {"embed_dim": 512, "num_heads": 8}

# One smallest config of each kind, as plain data: what a JSON file would hold.
VALID: dict[str, dict[str, Any]] = {
    "dense": {"variant": "dense"},
    "dilated": {"variant": "dilated", **BRANCHES},
    "dilated_uncovered": {
        "variant": "dilated",
        "segment_lengths": [64],
        "dilation_rates": [2],
        "uncovered": "zero",
    },
    "local_window": {"variant": "block_sparse", "pattern": LOCAL},
    "global_local": {"variant": "block_sparse", "pattern": {"pattern_type": "global_local"}},
    "dilated_sparse": {"variant": "block_sparse", "pattern": {}, **BRANCHES},
    "adaptive": {"variant": "adaptive", "pattern": {}, "adaptive": SCORER},
    "multihead": {"variant": "dense", "multihead": PROJECTIONS},
    "sharded": {"variant": "dense", "sharding": {}},
}


# --- strategies ---------------------------------------------------------------------------------

sizes = st.integers(1, 1 << 20)
ratios = st.floats(0.0, 1.0, exclude_min=True)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def some_of(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments with any subset of the fields, so that defaults are drawn too."""
    return st.fixed_dictionaries({}, optional=fields)


@st.composite
def multiheads(draw: st.DrawFn) -> MultiheadConfig:
    kv_heads, group, head_dim = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 128))
    heads = kv_heads * group
    return MultiheadConfig(
        embed_dim=heads * head_dim,
        num_heads=heads,
        **draw(some_of(kv_heads=optional(st.just(kv_heads)), bias=st.booleans(), checkpoint=st.booleans())),
    )


@st.composite
def branch_lists(draw: st.DrawFn, multiple: int = 1) -> dict[str, list[int]]:
    """Branches whose lengths are multiples of a block and whose rates fit their segments."""
    lengths = [multiple * n for n in draw(st.lists(st.integers(1, 1 << 12), min_size=1, max_size=4))]
    return {"segment_lengths": lengths, "dilation_rates": [draw(st.integers(1, n)) for n in lengths]}


@st.composite
def shardings(draw: st.DrawFn, variant: str, backend: str) -> ShardingConfig:
    by_keys = variant != "adaptive" and backend in ("auto", "sdpa")
    fields = some_of(
        ring_size=optional(st.integers(1, 1 << 16)),
        exchange=st.sampled_from(["auto", "heads", *(["keys"] if by_keys else [])]),
        shards=st.sampled_from(["contiguous", *(["zigzag"] if variant == "dense" else [])]),
        timeout_s=st.integers(1, 600) | st.floats(0.1, 600.0),
        travel=st.sampled_from(["auto", "float32"]),
    )
    return ShardingConfig(**draw(fields))


@st.composite
def configs(draw: st.DrawFn) -> AttentionConfig:
    """Any config that should be accepted, of every variant and pattern."""
    variant = draw(st.sampled_from(["dense", "dilated", "block_sparse", "adaptive"]))
    kwargs: dict[str, Any] = draw(
        some_of(
            multihead=optional(multiheads()),
            scale=optional(st.floats(0.0, exclude_min=True, allow_infinity=False)),
            backend=st.sampled_from(["auto", "sdpa", "flex"]),
            workspace_bytes=st.integers(64 * 1024, 1 << 40),
            pool=st.sampled_from(["auto", "on", "off"]),
            pool_bytes=optional(sizes),
            cache_entries=st.integers(0, 1000),
            cache_bytes=st.integers(0, 1 << 40),
        )
    )
    if variant == "dilated":
        kwargs |= draw(branch_lists())
        if 1 not in kwargs["dilation_rates"]:
            kwargs["uncovered"] = "zero"
    if variant in ("block_sparse", "adaptive"):
        pattern = kwargs["pattern"] = SparsePatternConfig(
            **draw(
                some_of(
                    pattern_type=st.sampled_from(PATTERN_TYPES),
                    sparsity_ratio=ratios,
                    block_size=st.integers(1, 512),
                    local_window_size=sizes,
                    global_tokens=sizes,
                )
            )
        )
        if variant == "block_sparse" and pattern.pattern_type == "dilated_sparse":
            kwargs |= draw(branch_lists(multiple=pattern.block_size))
        elif draw(st.booleans()):
            kwargs |= draw(branch_lists())  # inert here, and allowed
    if variant == "adaptive":
        heads = kwargs.get("multihead")
        kwargs["adaptive"] = AdaptiveConfig(
            num_heads=heads.num_heads if heads else draw(st.integers(1, 64)),
            head_dim=heads.head_dim if heads else draw(st.integers(1, 256)),
            **draw(some_of(score_dim=sizes)),
        )
    if draw(st.booleans()):
        kwargs["sharding"] = draw(shardings(variant, kwargs.get("backend", "auto")))
    return AttentionConfig(variant=variant, **kwargs)


# --- values -------------------------------------------------------------------------------------


@given(configs())
def test_json_round_trip_is_exact(config: AttentionConfig):
    text = config.to_json()
    back = AttentionConfig.from_json(text)
    assert back == config
    assert hash(back) == hash(config)
    assert back.to_json() == text
    assert AttentionConfig.from_json(config.to_json(indent=2).encode()) == config


@given(configs())
def test_plain_data_builds_the_same_config(config: AttentionConfig):
    """Nested dicts for parts and lists for tuples, as `json.load` gives them."""
    assert AttentionConfig(**json.loads(config.to_json())) == config


@given(configs())
def test_copies_and_pickles_are_equal(config: AttentionConfig):
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


@given(configs())
def test_branches_pair_lengths_with_rates(config: AttentionConfig):
    assert [length for length, _ in config.branches] == list(config.segment_lengths)
    assert [rate for _, rate in config.branches] == list(config.dilation_rates)


@given(configs())
def test_inert_names_existing_fields_in_order(config: AttentionConfig):
    fields = SparsePatternConfig.model_fields.keys() | {"segment_lengths", "dilation_rates"}
    assert set(config.inert) <= fields
    assert list(config.inert) == sorted(config.inert)


@pytest.mark.parametrize("kind", VALID)
def test_json_holds_every_field_and_the_schema_version(kind: str):
    data = json.loads(AttentionConfig(**VALID[kind]).to_json())
    assert data.keys() == AttentionConfig.model_fields.keys() - ({"sharding"} - VALID[kind].keys())
    assert data["schema_version"] == SCHEMA_VERSION == 1


def test_json_of_a_config_for_one_device_says_nothing_of_ranks():
    """Records and fingerprints of before depend on it."""
    assert AttentionConfig(variant="dense").to_json() == (
        '{"schema_version":1,"variant":"dense","segment_lengths":[],"dilation_rates":[],"pattern":null,'
        '"adaptive":null,"multihead":null,"uncovered":"refuse","scale":null,"backend":"auto",'
        '"workspace_bytes":16777216,"pool":"auto","pool_bytes":null,"cache_entries":100,"cache_bytes":67108864}'
    )
    assert "sharding" not in AttentionConfig(variant="dense").model_dump()
    shared = AttentionConfig(variant="dense", sharding=ShardingConfig(ring_size=8))
    assert json.loads(shared.to_json())["sharding"] == {
        "ring_size": 8,
        "exchange": "auto",
        "shards": "contiguous",
        "timeout_s": 600.0,
        "travel": "auto",
    }
    assert shared.model_copy(update={"sharding": None}) == AttentionConfig(variant="dense")


@pytest.mark.parametrize("kind", VALID)
def test_hashable_whatever_sequences_it_was_built_from(kind: str):
    as_lists = AttentionConfig(**VALID[kind])
    as_tuples = AttentionConfig(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in VALID[kind].items()}
    )
    assert {as_lists: 1}[as_tuples] == 1
    assert type(as_lists.segment_lengths) is type(as_lists.dilation_rates) is tuple


def test_different_configs_differ():
    assert len({AttentionConfig(**data) for data in VALID.values()}) == len(VALID)


@pytest.mark.parametrize(
    "value, field",
    [
        (AttentionConfig(**VALID["dilated"]), "variant"),
        (SparsePatternConfig(), "block_size"),
        (AdaptiveConfig(**SCORER), "score_dim"),
        (MultiheadConfig(**PROJECTIONS), "bias"),
        (ShardingConfig(), "ring_size"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Value) else value,
)
def test_frozen(value: Value, field: str):
    before = value.to_json()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(value, field, getattr(value, field))
    with pytest.raises(ValidationError, match="frozen"):
        delattr(value, field)
    assert value.to_json() == before


@pytest.mark.parametrize(
    "kind", [AttentionConfig, SparsePatternConfig, AdaptiveConfig, MultiheadConfig, ShardingConfig]
)
def test_keyword_only(kind: type[Value]):
    with pytest.raises(TypeError, match="positional"):
        kind("dense")  # type: ignore[misc]


def test_defaults_are_the_documented_ones():
    config = AttentionConfig(variant="dense")
    assert (config.backend, config.pool, config.uncovered) == ("auto", "auto", "refuse")
    assert (config.workspace_bytes, config.cache_bytes) == (16 * 2**20, 64 * 2**20)
    assert config.cache_entries == 100
    assert config.scale is config.pool_bytes is config.multihead is config.sharding is None
    sharding = ShardingConfig()
    assert (sharding.ring_size, sharding.exchange, sharding.shards) == (None, "auto", "contiguous")
    assert (sharding.timeout_s, sharding.travel) == (600, "auto")
    pattern = SparsePatternConfig()
    assert (pattern.pattern_type, pattern.sparsity_ratio, pattern.block_size) == ("dilated_sparse", 0.1, 128)
    assert (pattern.local_window_size, pattern.global_tokens) == (512, 64)


def test_multihead_head_dim():
    assert MultiheadConfig(embed_dim=768, num_heads=12, kv_heads=4).head_dim == 64


# --- refusals -----------------------------------------------------------------------------------


def with_pattern(**fields: Any) -> dict[str, Any]:
    return {"variant": "block_sparse", "pattern": LOCAL | fields}


def sharded(**fields: Any) -> dict[str, Any]:
    return {"variant": "dense", "sharding": fields}


# id: (what is asked for, words that the message must hold: the field, what arrived, what to do).
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    # a field at a time
    "no_variant": ({}, ["variant", "required"]),
    "unknown_variant": ({"variant": "denser"}, ["variant", "'denser'", "'dense', 'dilated'", "'adaptive'"]),
    "unknown_option": ({"variant": "dense", "head": 8}, ["head", "no such option", "spelling", "remove"]),
    "unknown_pattern_option": (with_pattern(block=64), ["pattern", "block", "no such option"]),
    "unknown_pattern_type": (with_pattern(pattern_type="ring"), ["pattern_type", "'ring'", "'global_local'"]),
    "newer_schema": ({"variant": "dense", "schema_version": 2}, ["schema_version", "should be 1", "got 2"]),
    "schema_as_text": ({"variant": "dense", "schema_version": "1"}, ["schema_version", "got '1'"]),
    "int_as_text": (with_pattern(block_size="16"), ["block_size", "integer", "'16'"]),
    "int_as_float": (with_pattern(block_size=16.0), ["block_size", "integer", "16.0"]),
    "int_as_bool": (with_pattern(block_size=True), ["block_size", "integer", "True"]),
    "float_as_text": (with_pattern(sparsity_ratio="0.1"), ["sparsity_ratio", "number", "'0.1'"]),
    "float_as_bool": (with_pattern(sparsity_ratio=True), ["sparsity_ratio", "number", "True"]),
    "bool_as_int": ({"variant": "dense", "multihead": PROJECTIONS | {"bias": 1}}, ["bias", "boolean", "1"]),
    "switch_as_bool": ({"variant": "dense", "pool": True}, ["pool", "'on'", "'off'", "True"]),
    "unknown_backend": ({"variant": "dense", "backend": "triton"}, ["backend", "'triton'", "'flex'"]),
    "unknown_uncovered": ({"variant": "dense", "uncovered": "nan"}, ["uncovered", "'zero'", "'nan'"]),
    "ratio_zero": (with_pattern(sparsity_ratio=0.0), ["sparsity_ratio", "greater than 0", "got 0.0"]),
    "ratio_above_one": (with_pattern(sparsity_ratio=1.5), ["sparsity_ratio", "equal to 1", "got 1.5"]),
    "ratio_nan": (with_pattern(sparsity_ratio=math.nan), ["sparsity_ratio", "finite", "nan"]),
    "block_size_zero": (with_pattern(block_size=0), ["block_size", "equal to 1", "got 0"]),
    "window_negative": (with_pattern(local_window_size=-1), ["local_window_size", "equal to 1", "got -1"]),
    "global_tokens_zero": (with_pattern(global_tokens=0), ["global_tokens", "equal to 1", "got 0"]),
    "ring_of_none": (sharded(ring_size=0), ["sharding.ring_size", "equal to 1", "got 0"]),
    "ring_as_text": (sharded(ring_size="8"), ["sharding.ring_size", "integer", "'8'"]),
    "unknown_exchange": (sharded(exchange="ring"), ["sharding.exchange", "'keys'", "'heads'", "got 'ring'"]),
    "unknown_shards": (sharded(shards="striped"), ["sharding.shards", "'zigzag'", "got 'striped'"]),
    "unknown_travel": (sharded(travel="bfloat16"), ["sharding.travel", "'float32'", "got 'bfloat16'"]),
    "no_time": (sharded(timeout_s=0), ["sharding.timeout_s", "equal to 0.1", "got 0"]),
    "all_time": (sharded(timeout_s=1e6), ["sharding.timeout_s", "43200", "got 1000000"]),
    "zigzag_of_windows": (
        with_pattern() | sharded(shards="zigzag") | {"variant": "block_sparse"},
        ["'zigzag'", "'dense'", "'block_sparse'", "'contiguous'"],
    ),
    "keys_of_adaptive": (
        VALID["adaptive"] | {"sharding": {"exchange": "keys"}},
        ["'keys'", "'adaptive'", "'heads' or 'auto'"],
    ),
    "keys_by_one_kernel": (
        {"variant": "dense", "backend": "flash", "sharding": {"exchange": "keys"}},
        ["'keys'", "'flash'", "'auto' or 'sdpa'", "'heads'"],
    ),
    "scale_nan": ({"variant": "dense", "scale": math.nan}, ["scale", "finite", "nan"]),
    "scale_inf": ({"variant": "dense", "scale": math.inf}, ["scale", "finite", "inf"]),
    "scale_zero": ({"variant": "dense", "scale": 0.0}, ["scale", "greater than 0", "got 0.0"]),
    "scale_negative": ({"variant": "dense", "scale": -1.0}, ["scale", "greater than 0", "got -1.0"]),
    "workspace_too_small": ({"variant": "dense", "workspace_bytes": 65535}, ["workspace_bytes", "65536"]),
    "pool_bytes_zero": ({"variant": "dense", "pool_bytes": 0}, ["pool_bytes", "equal to 1", "got 0"]),
    "cache_entries_negative": ({"variant": "dense", "cache_entries": -1}, ["cache_entries", "got -1"]),
    "cache_bytes_negative": ({"variant": "dense", "cache_bytes": -1}, ["cache_bytes", "got -1"]),
    "segments_a_number": (VALID["dilated"] | {"segment_lengths": 64}, ["segment_lengths", "tuple", "64"]),
    "segments_text": (VALID["dilated"] | {"segment_lengths": "64"}, ["segment_lengths", "tuple", "'64'"]),
    "segment_text": (VALID["dilated"] | {"segment_lengths": [64, "8"]}, ["segment_lengths.1", "'8'"]),
    "segment_zero": (VALID["dilated"] | {"segment_lengths": [0, 8]}, ["segment_lengths.0", "got 0"]),
    "rate_bool": (VALID["dilated"] | {"dilation_rates": [1, True]}, ["dilation_rates.1", "True"]),
    "rate_zero": (VALID["dilated"] | {"dilation_rates": [1, 0]}, ["dilation_rates.1", "got 0"]),
    "pattern_text": ({"variant": "block_sparse", "pattern": "local"}, ["pattern", "dictionary", "'local'"]),
    # parts
    "block_sparse_without_pattern": (
        {"variant": "block_sparse"},
        ["'block_sparse'", "needs pattern", "pass"],
    ),
    "adaptive_without_pattern": (
        {"variant": "adaptive", "adaptive": SCORER},
        ["'adaptive'", "needs pattern"],
    ),
    "adaptive_without_scorer": ({"variant": "adaptive", "pattern": {}}, ["needs adaptive", "pass adaptive"]),
    "dense_with_pattern": (
        {"variant": "dense", "pattern": {}},
        ["takes no pattern", "remove", "block_sparse"],
    ),
    "dilated_with_pattern": (VALID["dilated"] | {"pattern": {}}, ["takes no pattern", "remove"]),
    "dense_with_scorer": ({"variant": "dense", "adaptive": SCORER}, ["takes no adaptive", "remove"]),
    "dilated_with_scorer": (VALID["dilated"] | {"adaptive": SCORER}, ["takes no adaptive", "remove"]),
    "block_sparse_with_scorer": (with_pattern() | {"adaptive": SCORER}, ["takes no adaptive", "'adaptive'"]),
    "uncovered_on_dense": ({"variant": "dense", "uncovered": "zero"}, ["uncovered", "'dense'", "remove"]),
    "uncovered_on_sparse": (
        with_pattern() | {"uncovered": "zero"},
        ["uncovered", "'block_sparse'", "remove"],
    ),
    "uncovered_on_adaptive": (VALID["adaptive"] | {"uncovered": "zero"}, ["uncovered", "'adaptive'"]),
    "scorer_needs_heads": (VALID["adaptive"] | {"adaptive": {"head_dim": 64}}, ["num_heads", "required"]),
    "scorer_needs_head_dim": (VALID["adaptive"] | {"adaptive": {"num_heads": 8}}, ["head_dim", "required"]),
    "scorer_and_projections_disagree": (
        VALID["adaptive"] | {"multihead": {"embed_dim": 512, "num_heads": 4}},
        ["adaptive and multihead", "(8, 64)", "(4, 128)", "same"],
    ),
    # projections
    "embed_dim_not_a_multiple": (
        {"variant": "dense", "multihead": {"embed_dim": 100, "num_heads": 8}},
        ["embed_dim", "multiple", "embed_dim=100", "num_heads=8", "choose", "104"],
    ),
    "kv_heads_not_dividing": (
        {"variant": "dense", "multihead": PROJECTIONS | {"kv_heads": 3}},
        ["kv_heads must divide num_heads", "kv_heads=3", "num_heads=8"],
    ),
    "embed_dim_missing": ({"variant": "dense", "multihead": {"num_heads": 8}}, ["embed_dim", "required"]),
    # branches
    "more_lengths_than_rates": (
        VALID["dilated"] | {"dilation_rates": [1]},
        ["pair up", "got 2 and 1", "[2048, 4096]", "[1]", "as many"],
    ),
    "rates_without_lengths": ({"variant": "dense", "dilation_rates": [1]}, ["pair up", "got 0 and 1"]),
    "dense_with_branches": (
        {"variant": "dense", **BRANCHES},
        ["'dense'", "no segments", "[2048, 4096]", "remove", "variant='dilated'"],
    ),
    "dilated_without_branches": ({"variant": "dilated"}, ["at least one branch", "got none", "pass"]),
    "dilated_sparse_without_branches": (
        {"variant": "block_sparse", "pattern": {}},
        ["'dilated_sparse'", "at least one branch", "pass segment_lengths"],
    ),
    "rate_exceeds_segment": (
        {"variant": "dilated", "segment_lengths": [64, 8], "dilation_rates": [1, 9]},
        ["rate 9", "segment length 8", "at most 8"],
    ),
    "no_branch_of_rate_one": (
        {"variant": "dilated", "segment_lengths": [64, 64], "dilation_rates": [2, 4]},
        ["[2, 4]", "without output", "rate 1", "uncovered='zero'"],
    ),
    "segment_not_in_blocks": (
        {"variant": "block_sparse", "pattern": {"block_size": 64}}
        | BRANCHES
        | {"segment_lengths": [2048, 100]},
        ["segment length 100", "block_size 64", "64 or 128"],
    ),
}


@pytest.mark.parametrize("asked, words", REFUSED.values(), ids=REFUSED)
def test_refused_and_says_why(asked: dict[str, Any], words: list[str]):
    with pytest.raises(ConfigError) as caught:
        AttentionConfig(**asked)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("asked, words", REFUSED.values(), ids=REFUSED)
def test_refused_from_json_for_the_same_reason(asked: dict[str, Any], words: list[str]):
    with pytest.raises(ConfigError) as caught:
        AttentionConfig.from_json(json.dumps(asked))
    assert [word for word in words if word not in str(caught.value)] == []


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError, match=r"scale.*; pool.*; colour"):
        AttentionConfig(variant="dense", scale=-1.0, pool="maybe", colour="red")


@pytest.mark.parametrize("kind", [ConfigError, AttentionPlannerError, ValueError])
def test_a_refusal_is_caught_as(kind: type[Exception]):
    with pytest.raises(kind, match="block_size"):
        SparsePatternConfig(block_size=0)


def test_a_refusal_hides_pydantic():
    """The message is ours alone: no link to pydantic's site, no chained ValidationError."""
    with pytest.raises(ConfigError) as caught:
        AttentionConfig(variant="denser")
    assert "pydantic" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "Invalid JSON"),
        ('{"variant": "dense"', "Invalid JSON"),
        ("{'variant': 'dense'}", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        ("[]", "object"),
        ('"dense"', "object"),
        ("null", "object"),
    ],
)
def test_text_that_is_no_config_is_a_config_error(text: str | bytes, words: str):
    with pytest.raises(ConfigError, match=f"AttentionConfig.*{words}"):
        AttentionConfig.from_json(text)


# --- what the checks must let through -------------------------------------------------------------

ALLOWED: dict[str, dict[str, Any]] = {
    "int_for_float": with_pattern(sparsity_ratio=1),
    "one_token_segment": {"variant": "dilated", "segment_lengths": [1], "dilation_rates": [1]},
    "rate_equals_segment": {"variant": "dilated", "segment_lengths": [8, 8], "dilation_rates": [1, 8]},
    "segments_not_in_blocks_when_unread": with_pattern(block_size=64)
    | {"segment_lengths": [100], "dilation_rates": [200]},
    "branches_on_adaptive_are_unread": VALID["adaptive"] | {"segment_lengths": [7], "dilation_rates": [9]},
    "rate_beyond_the_blocks_of_a_segment": {
        "variant": "block_sparse",
        "pattern": {"block_size": 64},
        "segment_lengths": [64],
        "dilation_rates": [100],
    },
    "dilated_sparse_without_rate_one": VALID["dilated_sparse"] | {"dilation_rates": [2, 4]},
    "uncovered_zero_though_covered": VALID["dilated"] | {"uncovered": "zero"},
    "caches_off": {"variant": "dense", "cache_entries": 0, "cache_bytes": 0},
    "smallest_workspace": {"variant": "dense", "workspace_bytes": 65536},
    "scorer_and_projections_agree": VALID["adaptive"] | {"multihead": PROJECTIONS},
}


@pytest.mark.parametrize("asked", ALLOWED.values(), ids=ALLOWED)
def test_allowed(asked: dict[str, Any]):
    config = AttentionConfig(**asked)
    assert AttentionConfig.from_json(config.to_json()) == config


# --- inert ----------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "sparsity_ratio": 0.5,
    "block_size": 64,
    "local_window_size": 256,
    "global_tokens": 32,
    "edges": "token",
}
BRANCH_FIELDS = {"segment_lengths", "dilation_rates"}


@pytest.mark.parametrize(
    "variant, pattern_type, inert",
    [
        ("block_sparse", "local_window", {"sparsity_ratio", "global_tokens"} | BRANCH_FIELDS),
        ("block_sparse", "global_local", {"sparsity_ratio"} | BRANCH_FIELDS),
        ("block_sparse", "dilated_sparse", {"local_window_size", "global_tokens", "edges"}),
        (
            "adaptive",
            "local_window",
            {"pattern_type", "local_window_size", "global_tokens", "edges"} | BRANCH_FIELDS,
        ),
    ],
)
def test_inert_names_what_was_given_and_is_not_read(variant: str, pattern_type: str, inert: set[str]):
    pattern = SparsePatternConfig(pattern_type=pattern_type, **EVERYTHING)
    scorer = SCORER if variant == "adaptive" else None
    config = AttentionConfig(variant=variant, pattern=pattern, adaptive=scorer, **BRANCHES)
    assert config.inert == tuple(sorted(inert))


def test_windows_end_at_blocks_unless_a_config_says_otherwise():
    written = '{"pattern_type": "local_window", "block_size": 64, "local_window_size": 256}'
    assert SparsePatternConfig.from_json(written).edges == "block"
    with pytest.raises(ConfigError, match="edges: Input should be 'block' or 'token', got 'tokens'"):
        SparsePatternConfig(edges="tokens")


@pytest.mark.parametrize(
    "pattern_type, edges, ends",
    [
        ("local_window", "token", True),
        ("global_local", "token", True),
        ("dilated_sparse", "token", False),
        ("local_window", "block", False),
    ],
)
def test_windows_alone_end_at_the_token(pattern_type: str, edges: str, ends: bool):
    pattern = SparsePatternConfig(pattern_type=pattern_type, edges=edges)
    assert AttentionConfig(variant="block_sparse", pattern=pattern, **BRANCHES).token_edges == ends
    assert not AttentionConfig(variant="adaptive", pattern=pattern, adaptive=SCORER).token_edges


@pytest.mark.parametrize("kind", VALID)
def test_nothing_is_inert_in_a_config_that_gives_only_what_is_read(kind: str):
    assert AttentionConfig(**VALID[kind]).inert == ()


# --- known gaps: each of these should pass, and will turn the build red when it starts to ----------


@pytest.mark.parametrize("kind", ["local_window", "adaptive"])
def test_inert_is_a_function_of_the_value(kind: str):
    config = AttentionConfig(**VALID[kind])
    assert AttentionConfig.from_json(config.to_json()).inert == config.inert


def test_a_refusal_from_json_names_the_config_once():
    with pytest.raises(ConfigError) as caught:
        AttentionConfig.from_json('{"variant": "denser"}')
    assert len(re.findall("AttentionConfig", str(caught.value))) == 1


def test_an_option_named_self_is_refused_like_any_other():
    with pytest.raises(ConfigError, match="no such option"):
        AttentionConfig.from_json('{"variant": "dense", "self": 1}')


@pytest.mark.parametrize("version", [True, 1.0])
def test_schema_version_is_an_int(version: object):
    with pytest.raises(ConfigError, match="schema_version"):
        AttentionConfig(variant="dense", schema_version=version)


def test_a_segment_shorter_than_a_block_is_offered_one_length():
    with pytest.raises(ConfigError) as caught:
        AttentionConfig(variant="block_sparse", pattern={}, segment_lengths=[64], dilation_rates=[1])
    assert "128 or 128" not in str(caught.value)


def test_out_of_memory_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(OutOfMemoryError("no room", requested=2, available=1)))
    assert (str(error), error.requested, error.available) == ("no room", 2, 1)


def test_errors_of_ranks_survive_a_process_boundary():
    fields = {"rank": 2, "peers": (0, 1), "missing": (1,), "step": "stage 3", "nbytes": 64, "seconds": 1.5}
    error = pickle.loads(pickle.dumps(DistributedError("rank 2 waited", **fields)))
    assert isinstance(error, AttentionPlannerError)
    assert isinstance(error, RuntimeError)
    assert (str(error), vars(error)) == ("rank 2 waited", fields)


def test_pydantics_own_ways_in_are_checked_too():
    config = AttentionConfig(variant="dilated", segment_lengths=[8], dilation_rates=[1])
    assert AttentionConfig.model_validate(config.model_dump()) == config
    assert config.model_copy() == config
    assert config.model_copy(update={"segment_lengths": [16]}).segment_lengths == (16,)
    with pytest.raises(ConfigError, match="dilation_rates"):
        config.model_copy(update={"dilation_rates": [1, 2]})
    with pytest.raises(ConfigError, match="variant"):
        AttentionConfig.model_validate({"variant": "sparse"})


# --- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        {"variant": "dilated", "segment_lengths": [8] * 17, "dilation_rates": [1] * 17},
        {"variant": "block_sparse", "pattern": {"block_size": 1 << 41}},
        {"variant": "dense", "multihead": {"embed_dim": 1 << 25, "num_heads": 1 << 24}},
        {"variant": "adaptive", "pattern": {}, "adaptive": {"num_heads": 8, "head_dim": 1 << 41}},
        {"variant": "dense", "workspace_bytes": 1 << 61},
    ],
)
def test_sizes_that_nobody_has_are_refused(parts):
    with pytest.raises(ConfigError, match=r"at most [0-9,]+, beyond which plans take hours|at most 16 items"):
        AttentionConfig.from_json(json.dumps(parts))


def test_an_error_stays_short_whatever_was_given():
    for lengths in ([1] * 200_000, ["x" * 10_000_000], ["x"] * 200_000):
        with pytest.raises(ConfigError) as caught:
            AttentionConfig(variant="dilated", segment_lengths=lengths, dilation_rates=(1,))
        assert len(str(caught.value)) < 2000
