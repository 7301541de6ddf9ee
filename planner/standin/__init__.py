"""A CUDA card that is not there: PyTorch's own CUDA build over a stand-in for CUDA's libraries.

Real are torch's caching allocator, the host side of every operator with what it allocates, the choice of
kernels, Inductor, Triton and its compiler, and the account of the card's memory: what is held from the start,
what is allocated, and that it runs out. Copies between host and device are made up to 64 MiB each and 1 GiB
together; what is read back and was not copied there is zero.

Not real are kernels, which are counted and not run, so that values are garbage; times; the occupancy of
multiprocessors and the registers of kernels. Not there are cuDNN, cuSOLVER, cuSPARSE and cuFFT: torch is told
to do without cuDNN, and what it would have taken is noted by name. Collectives of NCCL return at once and
hold no buffers. None of this was held against hardware.

Nothing here imports torch; the process that is run does, and only its own.

To read in this order: `interpreter` and `install` say which torch runs (`torch_for`), `torch_build` what that
torch is, `build` makes the libraries of `standin.c`, `environment` the variables of a program,
`site/sitecustomize.py` is what that program does first. `zygote` and `forked` run functions of tests and
sweeps, each in a fork.
"""
