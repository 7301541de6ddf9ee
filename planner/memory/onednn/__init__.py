"""Scratch of oneDNN's products on CPUs, and what it buys to follow oneDNN that far.

Only a `multihead` config in a 16-bit type on a CPU with AVX512_BF16, AVX512_FP16 or AMX comes here: torch
leaves its projections to oneDNN, which takes scratch from torch for each product. How much follows from how
oneDNN divides a product among threads, and that from heuristics that have no closed form: `gemm.py` follows
those of the vector units, `amx.py` and `amx_threads.py` those of the matrix unit.

Two simpler answers, over 800 usual workloads (embed_dim 512 to 4,096, 1K to 32K tokens, batch 1 to 8, dense
and windows, inference and training), in percent of the peak:

    unit          threads    taken for nothing: short by     an upper bound: long by
                             median   90%    most            median   90%    most    within 3%
    AVX512_BF16   1 to 8        0.0   0.0     0.0               0.0   0.0     0.0       100%
                  16 to 64      0.0  11.2    80.2               0.0   0.4     9.9        98%
    AVX512_FP16   1 to 8        0.0   0.0    16.8               0.0   0.0     3.2        99%
                  16 to 64      0.0  19.6    87.6               0.0   6.5   336.5        83%
    AMX           1 to 8        0.0   0.0     1.9               0.0  18.6    20.8        70%
                  16 to 64      0.0  24.6    63.0              14.8 118.5   830.9        36%

The bound has for each thread the largest block of each matrix that sizes allow, and where threads may share
the inner dimension, sums of all of the result for each. So with up to 8 threads little would be missed, and
with more a product can be most of the peak: gradients of weights, when each thread sums all of them. For
vector units the bound, a dozen lines, does nearly as well as the heuristics (60 lines of `gemm.py`). For the
matrix unit it does not: the other two files keep predictions from being too large by what the table says.

Whoever measures again runs `python tests/planner/memory/onednn/test_worth.py`, where the bound is, and
`pytest -m slow` on it, which holds the claims. Heuristics change between releases of oneDNN: where
`tests/planner/memory/onednn/test_gemm.py` fails on such a CPU, they have.
"""
