"""Builds the stand-in for one PyTorch: a folder of shared libraries under the names that its own ask for.

`standin.c` is what was written by hand. What torch's libraries leave undefined besides becomes a stub, and
every name that they are linked to becomes a small library that leads to the one with the code. The folder is
kept, and made elsewhere and renamed, so that two builds at once are fine and nothing half-made is found.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from attention.errors import UnavailableError
from planner.files import cache_folder
from planner.standin import elf
from planner.standin.torch_build import TorchBuild

SOURCE: Final = Path(__file__).with_name("standin.c")
CORE: Final = "libstandin.so"
"""The library with the code; the others lead to it."""
_CUDA_LIBRARY = re.compile(r"lib(cu(?!rl)|nv|nccl)[\w-]*\.so(\.\d+)*$")
_CUDA_SYMBOL = re.compile(r"(__)?(cu(?!rl)|nccl|nvrtc|nvshmem|nvml)\w+$")
_LOADED_BY_NAME: Final = ("libcuda.so.1", "libnvidia-ml.so.1")
"""What torch and Triton open when they run; the driver brings them where there is one."""
_REFUSED: Final = {
    "cudnn": 3000,
    "cusolver": 9,
    "cusparseLt": 10,
    "cusparse": 10,
    "cufft": 16,
    "cuFile": 5001,
}
"""By library, its status for "not supported". What it computes takes memory that nobody knows here."""
_HARMLESS = re.compile(r"Create|Destroy|Set|Init|Version|Error|Stream|cuFileHandle|cuFileBuf")
_STANDARD: Final = ("-O1", "-fPIC", "-shared", "-w", "-pthread")


def folder(torch: TorchBuild) -> Path:
    """The built stand-in for this torch; builds it where it is not there yet, in seconds.

    UnavailableError without a compiler, or where the cache cannot be written.
    """
    home = cache_folder() / "standin" / f"{torch.version}-{_fingerprint(torch)}"
    if (home / CORE).exists():
        return home
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise UnavailableError(
            "a dry run builds a stand-in for CUDA's libraries with gcc, and there is none on PATH; install "
            "it, e.g. with `apt install gcc`"
        )
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{home.name}-", dir=home.parent) as made:
            _build(compiler, torch, Path(made))
            os.chmod(made, 0o755)
            try:
                os.rename(made, home)
            except OSError:
                if not (home / CORE).exists():  # another build was first, and its folder is as good
                    raise
    except OSError as error:
        raise UnavailableError(
            f"the stand-in for CUDA's libraries cannot be kept in {home.parent}: {error.strerror or error}; "
            "name a folder that can be written with XDG_CACHE_HOME"
        ) from error
    return home


def _fingerprint(torch: TorchBuild) -> str:
    """Another one for another torch, and for another stand-in."""
    found = hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes())
    for path in torch.libraries:
        found.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return found.hexdigest()[:12]


def _build(compiler: str, torch: TorchBuild, made: Path) -> None:
    libraries = [elf.read(path) for path in torch.libraries]
    versions = cuda_versions(libraries)
    stubs = made / "stubs.c"
    stubs.write_text(stub_source(cuda_symbols(libraries)))
    script = made / "versions"
    script.write_text(version_script(versions, cuda_symbols(libraries)))
    facts = {
        "STANDIN_CUDA": str(torch.cuda[0] * 1000 + torch.cuda[1] * 10),
        "STANDIN_CUDNN": str(_cudnn(versions)),
        "STANDIN_ARCHES": ",".join(map(str, torch.arches)),
    }
    _compile(
        compiler,
        [f"-D{name}={value}" for name, value in facts.items()],
        [f"-Wl,-soname,{CORE}", f"-Wl,--version-script={script}", str(SOURCE), str(stubs), "-ldl"],
        made / CORE,
    )
    for name, expected in versions.items():
        # The loader looks for the versions in the library of this name, and for the symbols everywhere.
        lead = made / "lead.c"
        lead.write_text(f'const char standin_{re.sub("[^a-zA-Z0-9]", "_", name)}[] = "{name}";\n')
        script.write_text("".join(f'"{version}" {{ }};\n' for version in sorted(expected)))
        options = [f"-Wl,-soname,{name}", "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed", str(lead)]
        options += [f"-Wl,--version-script={script}"] if expected else []
        _compile(compiler, [], [*options, f"-L{made}", f"-l:{CORE}"], made / name)
    (made / "libcuda.so").symlink_to("libcuda.so.1")  # what compilers link to
    for path in (stubs, script, lead):
        path.unlink()


def _compile(compiler: str, defined: list[str], options: list[str], made: Path) -> None:
    done = subprocess.run(
        [compiler, *_STANDARD, *defined, *options, "-o", str(made)], capture_output=True, text=True
    )
    if done.returncode:
        raise UnavailableError(
            f"{compiler} could not build {made.name} of the stand-in for CUDA's libraries: "
            f"{done.stderr.strip()[-800:]}"
        )


def cuda_versions(libraries: Iterable[elf.Library]) -> dict[str, frozenset[str]]:
    """The names of CUDA's libraries that these are linked to or open, each with the versions of symbols that
    they expect there."""
    found: dict[str, frozenset[str]] = dict.fromkeys(_LOADED_BY_NAME, frozenset())
    for library in libraries:
        for name in library.needed:
            if _CUDA_LIBRARY.match(name):
                found[name] = found.get(name, frozenset()) | library.versions.get(name, frozenset())
    return found


def cuda_symbols(libraries: Iterable[elf.Library]) -> dict[str, str]:
    """What these libraries want of CUDA's, each with its version; empty where any will do."""
    known = list(libraries)
    given = frozenset[str]().union(*(library.given for library in known))
    ours = frozenset[str]().union(*(cuda_versions(known).values()))
    return {
        name: version
        for library in known
        for name, version in library.wanted.items()
        if name not in given and (version in ours if version else _CUDA_SYMBOL.match(name))
    }


def stub_source(symbols: Iterable[str]) -> str:
    """C that defines all of these weakly, so that what is written by hand comes before them.

    A stub does nothing and succeeds; one that makes something hands out an address; one of a library whose
    memory is unknown fails as its library does, and its name is noted.
    """
    lines = ["#include <stdlib.h>", "int standin_unknown(const char *, int);"]
    for name in sorted(symbols):
        refused = next((status for prefix, status in _REFUSED.items() if name.startswith(prefix)), 0)
        if refused and not _HARMLESS.search(name):
            rest = f'() {{ return standin_unknown("{name}", {refused}); }}'
        elif re.search(r"Create(?!.*(Identity|Comm))", name):
            rest = "(void **out) { *out = calloc(1, 256); return 0; }"
        else:
            rest = "() { return 0; }"
        lines.append(f"__attribute__((weak)) int {name}{rest}")
    return "\n".join(lines) + "\n"


def version_script(versions: Mapping[str, frozenset[str]], symbols: Mapping[str, str]) -> str:
    """The linker's script: each symbol in the version that it is asked for, all others in none."""
    nodes: dict[str, list[str]] = {version: [] for of in versions.values() for version in of}
    for name, version in symbols.items():
        if version:
            nodes[version].append(name)
    lines = [
        f'"{version}" {{ global: {" ".join(f"{name};" for name in sorted(names))} }};'
        for version, names in sorted(nodes.items())
        if names
    ]
    return "\n".join(lines) + "\n"


def _cudnn(versions: Iterable[str]) -> int:
    """A version of cuDNN above all that torch may have been compiled with, of the major one asked for."""
    major = next((int(name.rpartition(".")[2]) for name in versions if name.startswith("libcudnn.so.")), 9)
    return major * 10000 + 9900
