"""Users' programs on cards that are not there: what they take, how they end, what is said of them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import planner

pytestmark = [pytest.mark.dry, pytest.mark.slow]
EXAMPLES = Path(__file__).resolve().parents[3] / "docs" / "examples"
PYTHON = os.environ.get("PLANNER_TESTS_PYTHON", sys.executable)
"""The Python that runs the examples; its packages may be others than these tests have."""
MIB = 1 << 20
GIB = 1 << 30
BILLION = "import torch\nx = torch.empty(1 << 30, dtype=torch.uint8, device='cuda')\n"
TOO_MUCH = "torch.empty(30 << 30, dtype=torch.uint8, device='cuda')"
LINEAR = (
    "import torch\nmodel = torch.nn.Linear(1024, 1024).cuda()\nx = torch.randn(256, 1024, device='cuda')\n"
)


@pytest.fixture(autouse=True)
def _cuda_build(dry_build):
    """Skips without one."""


def run(text: str, *arguments: str, **options):
    options.setdefault("gpu", "rtx4090")
    return planner.dry_run([sys.executable, "-c", text, *arguments], **options)


def example(name: str, *arguments: str, **options):
    return planner.dry_run([PYTHON, str(EXAMPLES / name), *arguments], **options)


def needs(package: str):
    return pytest.mark.usefixtures(f"_{package}")


@cache
def has(package: str) -> bool:
    """Whether PYTHON's packages have it."""
    asked = f"import importlib.util; raise SystemExit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([PYTHON, "-c", asked], check=False).returncode == 0


def _of(package: str):
    @pytest.fixture(name=f"_{package}")
    def needed():
        if not has(package):
            pytest.skip(f"needs {package}; PLANNER_TESTS_PYTHON names a Python that has it")

    return needed


_transformers, _peft, _torchvision = map(_of, ("transformers", "peft", "torchvision"))


def test_bytes_are_those_of_the_allocator():
    found = run("import torch\na = torch.empty(3 << 20, device='cuda')\nb = torch.empty(1, device='cuda')\n")
    assert (found.allocated, found.reserved) == (12 * MIB + 512, 12 * MIB + 2 * MIB)
    assert found.device == found.reserved + 426 * MIB
    assert found.used
    assert found.exit_code == 0


def test_a_plain_loop_with_workers_fits_and_its_steps_are_told():
    found = example("loop.py", "8", gpu="rtx4060")
    assert found.exit_code == 0
    assert len(found.steps) == 4
    assert found.steps[1].allocated == found.allocated > found.steps[0].allocated
    assert sum(held.bytes for held in found.largest) > 0.9 * found.allocated
    assert "loop.py:19 main" in found.largest[0].where
    assert any("loop.py" in warning and "item" in warning for warning in found.warnings)


def test_what_runs_out_exits_3_and_says_where_and_by_how_much():
    found = example("loop.py", "2048", gpu="rtx4060")
    assert found.exit_code == 3
    assert not found.out_of_memory.caught
    assert found.out_of_memory.requested > found.out_of_memory.free
    assert found.largest


def test_what_runs_out_and_is_caught_goes_on():
    text = (
        "import torch, sys\n"
        "for size in (64, 1):\n"
        "    try: x = torch.empty(size << 30, dtype=torch.uint8, device='cuda'); break\n"
        "    except torch.OutOfMemoryError: pass\n"
        "sys.exit(5)"
    )
    found = run(text)
    assert found.exit_code == 5
    assert found.out_of_memory.caught
    assert found.allocated == GIB


FORKS = (
    "import torch, multiprocessing\n"
    "def work(): torch.empty(1 << 30, dtype=torch.uint8, device='cuda')\n"
    "process = multiprocessing.get_context('fork').Process(target=work)\nprocess.start()\nprocess.join()"
)


@pytest.mark.parametrize(
    "text", [FORKS, BILLION + "import os; os._exit(0)", BILLION + "import os; os.chdir('/')"]
)
def test_however_a_process_begins_and_ends_its_bytes_are_told(text):
    found = run(text)
    assert (found.exit_code, found.allocated) == (0, GIB)


def test_what_is_killed_is_said():
    found = run(BILLION + "import os; os.kill(os.getpid(), 9)")
    assert (found.exit_code, found.used) == (137, True)
    assert any("ended before they could say" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    "rest", [TOO_MUCH, f"try: {TOO_MUCH}\nexcept RuntimeError as error: raise ValueError from error"]
)
def test_the_first_allocation_may_run_out_and_another_error_be_raised_for_it(rest):
    found = run("import torch\n" + rest)
    assert found.exit_code == 3
    assert found.out_of_memory.requested == 30 * GIB


def test_a_sitecustomize_of_the_user_is_run_and_nothing_is_lost(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.mine = 7")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, str(tmp_path)]))
    assert run(BILLION + "assert mine == 7").allocated == GIB


def test_a_python_that_keeps_the_stand_in_out_is_said():
    found = planner.dry_run([sys.executable, "-I", "-c", "0"], gpu="rtx4090")
    assert any("python -I" in warning for warning in found.warnings)


def test_a_smaller_card_has_less():
    text = "import torch\nx = torch.empty(2 << 30, dtype=torch.uint8, device='cuda')"
    assert run(text, vram="4GB").exit_code == 0
    assert run(text, vram="2GB").exit_code == 3


def test_a_crash_is_the_programs_own():
    found = run(LINEAR + "raise KeyError('no such key')")
    assert found.exit_code == 1
    assert found.error == "KeyError: 'no such key'"


def test_what_wants_cudnn_runs_without_and_is_said():
    text = (
        "import torch\nmodel = torch.nn.Conv2d(3, 8, 3).cuda()\n"
        "model(torch.randn(2, 3, 32, 32, device='cuda')).mean().backward()"
    )
    found = run(text)
    assert found.exit_code == 0
    assert any("cuDNN's convolutions" in name for name in found.unknown)


def test_a_loop_that_ends_on_its_loss_ends_and_is_said():
    text = (
        LINEAR + "loss = torch.tensor(1.0)\nwhile loss.item() > 1e-3:\n"
        "    loss = model(x).square().mean()\n    loss.backward()\n"
    )
    found = run(text)
    assert found.exit_code == 0


def test_a_compiled_step_trains():
    text = (
        LINEAR + "step = torch.compile(model)\noptimizer = torch.optim.SGD(model.parameters())\n"
        "for _ in range(2): step(x).square().mean().backward(); optimizer.step(); optimizer.zero_grad()"
    )
    found = run(text)
    assert found.exit_code == 0
    assert len(found.steps) == 2


def test_it_ends_after_as_many_steps_as_were_asked_for():
    text = (
        LINEAR + "optimizer = torch.optim.SGD(model.parameters())\n"
        "while True: model(x).mean().backward(); optimizer.step()"
    )
    found = run(text, steps=3)
    assert (found.exit_code, found.stopped, len(found.steps)) == (0, True, 3)


def test_a_snapshot_is_written_for_the_memory_viewer(tmp_path):
    path = tmp_path / "snapshot.pickle"
    assert run(LINEAR, snapshot=path).snapshot == str(path)
    assert path.stat().st_size > 1000


def test_the_allocators_settings_are_heard():
    text = "import torch\nx = torch.empty(11 << 20, dtype=torch.uint8, device='cuda')"
    assert run(text).reserved == 12 * MIB
    assert run(text, allocator="large_segment_size_mb:64").reserved >= 12 * MIB
    assert run(text, allocator="expandable_segments:True").reserved == 20 * MIB


def test_a_program_that_uses_no_card_is_said():
    found = run("import torch; torch.ones(3)")
    assert not found.used


def test_two_ranks_under_torchrun(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch, torch.distributed as dist\ndist.init_process_group('nccl')\n"
        "torch.cuda.set_device(dist.get_rank())\n"
        "model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1024, 1024).cuda())\n"
        "model(torch.randn(256, 1024, device='cuda')).mean().backward()\ndist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    found = planner.dry_run(command, gpu="h100-sxm", gpus=2)
    assert found.exit_code == 0
    assert [use.gpu for use in found.gpus] == [0, 1]
    assert any("NCCL" in name for name in found.unknown)


def test_the_command_prints_json_alone_and_exits_as_the_program(tmp_path):
    command = [sys.executable, "-m", "planner", "dry-run", "--gpu", "rtx4090", "--format", "json", "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", LINEAR + "print('mine'); raise SystemExit(7)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7
    assert json.loads(done.stdout)["exit_code"] == 7
    assert "mine" in done.stderr


@needs("transformers")
def test_llama_3_8b_trains_with_8192_tokens_on_80_gb_and_just_so():
    found = example("llama.py", "8192", gpu="h100-sxm")
    assert found.exit_code == 0
    assert found.allocated == pytest.approx(74.85 * GIB, rel=0.001)
    assert found.left < 4 * GIB
    assert len(found.steps) == 2
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 3e9  # no more than a laptop has


@needs("peft")
def test_llama_3_8b_with_lora_trains_on_24_gb_with_2048_tokens_and_not_with_8192():
    assert example("llama.py", "2048", "lora", gpu="rtx4090").exit_code == 0
    assert example("llama.py", "8192", "lora", gpu="rtx4090").exit_code == 3


@needs("torchvision")
def test_a_vision_transformer():
    found = example("vit.py", "32", gpu="gtx1080")
    assert found.exit_code == 0
    assert found.allocated > 4 * GIB
