"""Seconds: arrays equal singles, more work is never faster, and what is not known is refused."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice, product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from attention.config import AttentionConfig
from attention.errors import ConfigError
from planner import gpus
from planner.calibration import Rates
from planner.configs import Columns, columns_of
from planner.fitting.speed_runs import KINDS, timing_samples
from planner.memory.machines import Cpu, Cuda
from planner.speed.gpu_kernels import STEPS, SequenceCall, kernel_name, kernel_seconds
from planner.speed.rates import NOT_MEASURED, default_cpu_rates, default_rates
from planner.speed.seconds import seconds, seconds_of, utilisation
from planner.workload import Dtype, Mode, Workload

ROOT = Path(__file__).resolve().parents[3]
CPU = Cpu(2)
CPU_RATES = default_rates(CPU)
CARD = gpus.find("rtx4090")
CARD_RATES = default_rates(CARD)
PLACES = [(CPU, CPU_RATES), (Cuda(CARD.capability), CARD_RATES)]
SIZES = np.array([16, 32, 64, 128, 256, 512])


def several(seq=None) -> list[Columns]:
    """Six candidates of each kind."""
    given = 20_000 if seq is None else seq
    ones = np.ones(6, np.int64)
    return [
        Columns("dense", seq=given * ones),
        Columns("dilated", seq=given, lengths=(8 * SIZES, 16 * SIZES), rates=(1, 2 * ones)),
        Columns("dilated", seq=given, lengths=(1000 * SIZES,), rates=(1,)),  # of which some are dense
        Columns("block_sparse", "local_window", seq=given, block_size=SIZES, window=600 + SIZES),
        Columns("block_sparse", "global_local", seq=given, block_size=SIZES, window=600, global_tokens=SIZES),
        Columns(
            "block_sparse",
            "dilated_sparse",
            seq=given,
            block_size=SIZES,
            sparsity_ratio=0.1,
            lengths=(8 * SIZES, 16 * SIZES),
            rates=(1, 2),
        ),
        Columns("adaptive", seq=given, block_size=SIZES, sparsity_ratio=0.05),
    ]


@pytest.mark.parametrize("place, mode, causal", list(product(PLACES, get_args(Mode), (False, True))))
def test_arrays_equal_singles(place, mode, causal):
    workload = Workload(seq=1, mode=mode, causal=causal, heads=4)
    for columns in several():
        found = seconds(columns, workload, *place)
        assert (found.shape, found.dtype) == ((6,), np.float64)
        assert ((found > 0) & np.isfinite(found)).all()
        for at in range(6):
            config = columns.config(at, workload)
            alone = seconds_of(config, workload.model_copy(update={"seq": 20_000}), *place)
            assert found[at] == pytest.approx(alone, rel=1e-9), config


def test_candidates_without_some_of_the_calls_of_others_equal_singles():
    """A window of several lengths on a card whose kernel takes none behind a query: some see every token."""
    seq, window = np.array([131_072, 65_536, 4096, 1]), np.array([128, 32_768, 64, 65_536])
    workspace = np.array([1 << 18, 1 << 17, 1 << 20, 1 << 23])
    columns = Columns(
        "block_sparse", "local_window", seq=seq, block_size=64, window=window, workspace=workspace
    )
    workload, pascal = Workload(seq=1, mode="training"), Cuda((6, 1))
    rates = default_rates(gpus.find("gtx1080"))
    many = seconds(columns, workload, pascal, rates)
    for n in range(4):
        one = columns.config(n, workload)
        single = seconds_of(one, workload.model_copy(update={"seq": int(seq[n])}), pascal, rates)
        assert many[n] == pytest.approx(single, rel=1e-9)


def test_many_are_as_few():
    workload = Workload(seq=1)
    windows = np.arange(20_000)
    columns = Columns("block_sparse", "local_window", seq=65_536, block_size=64, window=windows)
    found = seconds(columns, workload, CPU, CPU_RATES)
    part = seconds(columns.take(slice(9000, 9010)), workload, CPU, CPU_RATES)
    assert (found[9000:9010] == part).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", get_args(Mode))
def test_longer_is_slower(place, mode):
    lengths = np.array([1 << n for n in range(10, 18)])
    for causal in (False, True):
        workload = Workload(seq=1, mode=mode, causal=causal)
        for columns in (
            Columns("dense", seq=lengths),
            Columns("dilated", seq=lengths, lengths=(1024, 2048), rates=(1, 2)),
            Columns("block_sparse", "local_window", seq=lengths, block_size=64, window=512),
            Columns("adaptive", seq=lengths, block_size=64, sparsity_ratio=0.1),
        ):
            found = seconds(columns, workload, *place)
            assert (np.diff(found) >= 0).all()  # short calls take a GPU's host as long
            assert found[-1] > 5 * found[3]


def test_more_pairs_are_never_faster():
    workload = Workload(seq=1, dtype="float32")
    windows = 256 * np.arange(1, 40, 2)
    columns = Columns("block_sparse", "local_window", seq=65_536, block_size=128, window=windows)
    found = seconds(columns, workload, CPU, CPU_RATES)
    assert (found[1:] >= 0.95 * found[:-1]).all()  # tiles that share what they see save some
    assert found[-1] > 5 * found[0]
    kept = Columns("adaptive", seq=65_536, block_size=64, sparsity_ratio=np.linspace(0.01, 0.5, 20))
    assert (np.diff(seconds(kept, workload, CPU, CPU_RATES)) > 0).all()


@pytest.mark.parametrize("dtype, mode", list(product(get_args(Dtype), get_args(Mode))))
def test_every_kind_dtype_and_mode_has_a_figure(dtype, mode):
    for sample in islice(timing_samples("cpu", 3), 2 * len(KINDS)):
        workload = sample.workload.model_copy(update={"dtype": dtype, "mode": mode})
        for machine, rates in PLACES:
            assert 0 < seconds_of(sample.config, workload, machine, rates) < 1e3


def test_training_takes_longer_than_inference_and_sixteen_bits_less_on_a_gpu():
    def of(**fields) -> float:
        return seconds_of(AttentionConfig(variant="dense"), Workload(seq=32_768, **fields), *PLACES[1])

    assert 3 < of(mode="training") / of() < 4.5
    assert of() < of(dtype="float32") < of(dtype="float64")


@pytest.mark.parametrize("gpu", gpus.known(), ids=lambda gpu: gpu.key)
def test_every_known_card_has_rates_and_says_that_nobody_measured_them(gpu):
    rates = default_rates(gpu)
    assert rates.source.startswith(NOT_MEASURED)
    assert rates.device == gpu.key
    assert set(rates.peak) == set(rates.forward) == set(rates.backward)
    dense = Columns("dense", seq=np.array([16_384]))
    light = utilisation(dense, Workload(seq=1, dtype="float16", head_dim=128), Cuda(gpu.capability), rates)
    assert 0.1 < light[0] < 1.1  # cards boost beyond the clock that their peak is of


def test_a_card_without_bfloat16_refuses_it():
    turing = gpus.find("t4")
    with pytest.raises(ConfigError, match=r"no speed of bfloat16 is known on t4, only of float16"):
        seconds_of(
            AttentionConfig(variant="dense"),
            Workload(seq=64, dtype="bfloat16"),
            Cuda(turing.capability),
            default_rates(turing),
        )


def test_kernels_on_pascal_compute_sixteen_bits_in_single_precision():
    rates = default_rates(gpus.find("gtx1080"))
    assert rates.peak["float16"] == rates.peak["float32"]


@pytest.mark.parametrize("card", ["gtx1080", "v100-pcie-32gb", "rtx4090", "h100-sxm", "h20", "b200"])
@pytest.mark.parametrize("causal, kv_heads", [(False, None), (True, None), (False, 4)])
def test_a_dense_call_takes_what_its_kernel_takes(card, causal, kv_heads):
    """What is held against published seconds is what plans are made of."""
    gpu = gpus.find(card)
    workload = Workload(
        seq=8192, heads=16, kv_heads=kv_heads, head_dim=128, mode="training", causal=causal, batch=4
    )
    machine = Cuda(gpu.capability, gpu.sm_count)
    kernel = "cudnn" if machine.cudnn_from(128, 2, "auto") else kernel_name(gpu.capability, 128, 2)
    call = SequenceCall(kernel, "float16", 4, 16, kv_heads or 16, 128, 8192, 8192, causal)
    expected = sum(kernel_seconds(call, step, gpu) for step in STEPS)
    found = seconds_of(AttentionConfig(variant="dense"), workload, machine, default_rates(gpu))
    assert found == pytest.approx(expected, rel=0.03)  # and copies of grouped heads


def test_a_gpu_known_by_its_capability_alone_is_refused():
    with pytest.raises(ConfigError, match="name a card"):
        default_rates(Cuda((8, 0)))


def test_a_cpu_nobody_calibrated_says_so_and_scales_with_its_threads():
    one, four = default_cpu_rates(Cpu(1)), default_cpu_rates(Cpu(4))
    assert one.source.startswith(NOT_MEASURED)
    dense, workload = AttentionConfig(variant="dense"), Workload(seq=8192, dtype="float32")
    assert seconds_of(dense, workload, Cpu(1), one) / seconds_of(dense, workload, Cpu(4), four) > 3.5
    fast = default_cpu_rates(Cpu(1, frozenset({"bfloat16"})))
    assert fast.peak["bfloat16"] == 8 * one.peak["bfloat16"]


def test_flex_runs_where_it_is_asked_for():
    columns = Columns(
        "block_sparse", "local_window", seq=65_536, block_size=np.array([64, 65]), window=1024, backend="flex"
    )
    ours = seconds(
        Columns(
            "block_sparse",
            "local_window",
            seq=65_536,
            block_size=np.array([64, 65]),
            window=1024,
            backend="sdpa",
        ),
        Workload(seq=1),
        *PLACES[1],
    )
    found = seconds(columns, Workload(seq=1), *PLACES[1])
    assert (found == ours).tolist() == [False, True]  # its blocks are powers of two


@pytest.mark.parametrize("place", PLACES)
def test_utilisation_is_a_share(place):
    for mode, columns in product(get_args(Mode), several()):
        found = utilisation(columns, Workload(seq=1, mode=mode), *place)
        assert ((found > 0) & (found < 1.05)).all()


def test_utilisation_does_not_count_what_cudnn_saves():
    gpu = gpus.find("h100-sxm")
    dense, workload = columns_of(AttentionConfig(variant="dense"), 8192), Workload(seq=1, dtype="bfloat16")
    machines = [Cuda(gpu.capability, cudnn=cudnn) for cudnn in (False, True)]
    rates = default_rates(gpu)
    flash, cudnn = (utilisation(dense, workload, machine, rates) for machine in machines)
    assert flash < cudnn < 1
    quicker = seconds(dense, workload, machines[0], rates) / seconds(dense, workload, machines[1], rates)
    assert cudnn / flash == pytest.approx(quicker)


def test_rates_of_the_other_kind_of_device_are_refused():
    columns = Columns("dense", seq=64)
    with pytest.raises(ConfigError, match="rates are of rtx4090, the machine is a CPU"):
        seconds(columns, Workload(seq=1), CPU, CARD_RATES)
    with pytest.raises(ConfigError, match="rates are of cpu, the machine is a GPU"):
        seconds(columns, Workload(seq=1), Cuda((8, 9)), CPU_RATES)


def test_weights_are_refused():
    with pytest.raises(ConfigError, match="weights=True"):
        seconds(Columns("dense", seq=64), Workload(seq=1, weights=True), CPU, CPU_RATES)


def test_rates_survive_json():
    assert Rates.from_json(CARD_RATES.to_json()) == CARD_RATES


def test_no_torch_is_imported():
    code = (
        "import sys, planner.speed.seconds as s, planner.fitting.speed; from planner.configs import Columns; "
        "from planner.memory.machines import Cpu; from planner.workload import Workload; "
        "s.seconds(Columns('dense', seq=64), Workload(seq=1), Cpu(2), s.default_rates(Cpu(2))); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
