"""The primitives that every attention here is made of.

    program    what is to be computed: spans, gathers, calls, tiles (no tensors)
    kernels    the platform's fused SDPA on 4-D views, forward and backward, with its log-sum-exp
    reserve    how large calls get and what a pass reserves, in closed form (no tensors)
    execute    runs a program forward and backward; the one autograd function
    weights    attention weights on request, as active blocks
    flex       compiled FlexAttention over the same layouts

Letters: B batch, S tokens, H query heads, G key and value heads, D channels a head, and of one
kernel call: N views in the batch, T queries, K keys.
"""
