"""The parts of the stand-in that need no CUDA build of torch: what is read, generated and refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attention.errors import ConfigError, UnavailableError
from planner.gpus import find as find_gpu
from planner.standin import elf
from planner.standin.build import CORE, cuda_symbols, cuda_versions, folder, stub_source, version_script
from planner.standin.environment import SITE, card_variables
from planner.standin.torch_build import TorchBuild, check_platform, check_version, find

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")

USER = """
extern int cudaMalloc(void **, unsigned long); extern int ncclSend(void); extern int cudnnSetStream(void);
extern int cudnnConvolutionForward(void); extern int puts(const char *);
int used(void) {
    void *p;
    return cudaMalloc(&p, 8) + ncclSend() + cudnnSetStream() + cudnnConvolutionForward() + puts("");
}
"""


def compiled(source: str, made: Path, *options: str) -> None:
    file = made.with_suffix(".c")
    file.write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", str(file), "-o", str(made), *options], check=True)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> TorchBuild:
    """A torch whose only library takes versioned and plain symbols of two of CUDA's."""
    home = tmp_path_factory.mktemp("torch")
    (home / "lib").mkdir()
    script = home / "script"
    script.write_text("VERSION_A { cudaMalloc; };")
    compiled(
        "int cudaMalloc() {}",
        home / "libcudart.so.13",
        "-Wl,-soname,libcudart.so.13",
        f"-Wl,--version-script={script}",
    )
    compiled("int ncclSend() {}", home / "libnccl.so.2", "-Wl,-soname,libnccl.so.2")
    compiled(
        USER,
        home / "lib" / "libtorch_toy.so",
        f"-L{home}",
        "-l:libcudart.so.13",
        "-Wl,--no-as-needed",
        "-l:libnccl.so.2",
    )
    return TorchBuild(
        python=Path(sys.executable), home=home, version="2.13.0", cuda=(13, 0), arches=(80, 90), triton=False
    )


@needs_gcc
def test_elf_says_what_a_library_wants(toy):
    found = elf.read(toy.libraries[0])
    assert {"libcudart.so.13", "libnccl.so.2", "libc.so.6"} <= set(found.needed)
    assert found.wanted["cudaMalloc"] == "VERSION_A"
    assert found.wanted["ncclSend"] == ""
    assert found.wanted["puts"].startswith("GLIBC")
    assert "used" in found.given
    assert cuda_versions([found])["libcudart.so.13"] == {"VERSION_A"}
    assert set(cuda_symbols([found])) == {
        "cudaMalloc",
        "ncclSend",
        "cudnnSetStream",
        "cudnnConvolutionForward",
    }


def test_elf_refuses_another_file(tmp_path):
    other = tmp_path / "libx.so"
    other.write_text("not a library, whatever its name")
    with pytest.raises(ValueError, match=r"libx\.so is no 64-bit"):
        elf.read(other)


@needs_gcc
def test_a_build_answers_to_every_name_and_is_kept(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = folder(toy)
    assert {path.name for path in made.iterdir()} == {
        *("libcudart.so.13", "libnccl.so.2", "libcuda.so.1", "libcuda.so", "libnvidia-ml.so.1", CORE)
    }
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    code = f"""
import ctypes, os
for name in {[CORE, "libcudart.so.13", "libnccl.so.2"]!r}:
    ctypes.CDLL(os.path.join({str(made)!r}, name), mode=ctypes.RTLD_GLOBAL)
library = ctypes.CDLL({str(toy.libraries[0])!r})
library.used()
count = ctypes.c_int(5)
print(ctypes.CDLL("libcudart.so.13").cudaGetDeviceCount(ctypes.byref(count)), count.value)
"""
    card = card_variables(find_gpu("rtx4090"), gpus=3)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | card, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "3"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert folder(toy) == made


@needs_gcc
def test_builds_that_cannot_be(toy, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UnavailableError, match=r"cannot be kept in .*XDG_CACHE_HOME"):
        folder(toy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="gcc, and there is none on PATH"):
        folder(toy)
    broken = tmp_path / "gcc"
    broken.write_text("#!/bin/sh\necho cannot >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(UnavailableError, match=r"could not build .*cannot"):
        folder(toy)
    assert not list((tmp_path / "cache").rglob("*.so*"))
    assert not list((tmp_path / "cache" / "attention-planner" / "standin").iterdir())


def test_stubs_of_libraries_that_are_not_there_fail_by_name():
    text = stub_source(
        ["cudnnConvolutionForward", "cudnnCreateTensorDescriptor", "cublasSgemm_v2", "cusolverDnXgeev"]
    )
    assert 'standin_unknown("cudnnConvolutionForward", 3000)' in text
    assert 'standin_unknown("cusolverDnXgeev", 9)' in text
    assert "int cublasSgemm_v2() { return 0; }" in text
    assert "cudnnCreateTensorDescriptor(void **out) { *out = calloc(1, 256); return 0; }" in text


def test_a_symbol_is_in_the_version_it_is_asked_for():
    versions = {"a": frozenset({"A", "unused"}), "b": frozenset[str]()}
    assert version_script(versions, {"y": "A", "x": "A", "z": ""}) == '"A" { global: x; y; };\n'


@pytest.mark.parametrize("system, machine", [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "aarch64")])
def test_other_platforms_are_refused(system, machine):
    with pytest.raises(UnavailableError, match=f"needs Linux on x86-64, and this is {system} on {machine}"):
        check_platform(system, machine)


@pytest.mark.parametrize("version", ["1.13.1", "2.5.0", "3.0.0", "unknown"])
def test_a_torch_it_was_not_made_for_is_refused(version):
    with pytest.raises(UnavailableError, match=f"this is torch {version}"):
        check_version(version)


def test_a_python_that_cannot_be_asked(tmp_path):
    with pytest.raises(UnavailableError, match="cannot be run"):
        find(tmp_path / "no-python")
    with pytest.raises(UnavailableError, match="no Python that answers"):
        find("/bin/false")


def test_a_card_that_cannot_be():
    card = find_gpu("rtx4090")
    with pytest.raises(ConfigError, match="1 to 16 GPUs, got 0"):
        card_variables(card, gpus=0)
    with pytest.raises(ConfigError, match="are taken from the start"):
        card_variables(card, vram=1 << 20)


def test_the_users_sitecustomize_runs_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    path = os.pathsep.join([str(SITE), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", "import sys; print('torch' in sys.modules)"],
        env=os.environ | {"PYTHONPATH": path, "STANDIN_LIBRARIES": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["theirs", "False"]
