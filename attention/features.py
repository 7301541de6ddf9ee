"""What a call may have beside q, k and v, and which attention refuses it. Imports no torch."""

from __future__ import annotations

from typing import Final, Literal

from attention.config import AttentionConfig

Feature = Literal["queries", "documents", "sinks", "weights"]
"""`queries`: q has fewer tokens than k and v. `documents`, `sinks`: given by these names. `weights`:
return_attention_weights=True."""

NAMES: Final[dict[Feature, str]] = {
    "queries": "fewer queries than keys",
    "documents": "documents=",
    "sinks": "sinks=",
    "weights": "return_attention_weights=True",
}

UNKNOWN: Final[dict[str, str]] = {
    "attn_mask": "masks are given by the config, is_causal and documents=",
    "attention_mask": "masks are given by the config, is_causal and documents=",
    "key_padding_mask": "give padding as documents of its own: documents=",
    "dropout": "there is no dropout of attention weights: pass none",
    "dropout_p": "there is no dropout of attention weights: pass none",
    "softcap": "scores are not capped",
    "alibi_slopes": "there are no biases by distance (ALiBi)",
    "position_bias": "there are no additive biases",
    "score_mod": "scores take no function of their own",
    "mask_mod": "masks are given by the config, is_causal and documents=",
    "block_mask": "masks are given by the config, is_causal and documents=",
    "sliding_window": "a window of W tokens is SparsePatternConfig(pattern_type='local_window', "
    "edges='token', local_window_size=W - 1)",
    "s_aux": "learned sinks are given as sinks=",
    "scale": "the scale is a field of the config: AttentionConfig(scale=...)",
    "scaling": "the scale is a field of the config: AttentionConfig(scale=...)",
    "enable_gqa": "fewer kv heads than heads need no flag",
}
"""Arguments of other attentions, and what to do instead."""


def unfit_feature(config: AttentionConfig, feature: Feature) -> str | None:
    """Why an attention does not take a feature; None if it does."""
    cuts = feature in ("queries", "documents")
    if cuts and config.variant == "adaptive":
        return (
            "its blocks are chosen by summaries over blocks of equally many queries and keys of one sequence"
        )
    if cuts and config.backend in ("flash", "cudnn"):
        return f"backend={config.backend!r} runs whole sequences alone; use backend='auto' or 'sdpa'"
    if feature != "weights" and config.backend == "flex":
        return "compiled FlexAttention is given blocks alone; use backend='auto' or 'sdpa'"
    return None


def together(one: Feature, other: Feature) -> str | None:
    """Why two features do not go together; None if they do."""
    if "weights" in (one, other) and {"queries", "documents"} & {one, other}:
        return "weights are given as blocks of one whole sequence"
    return None
