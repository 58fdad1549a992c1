"""Builds the native library, vfmk/libvfmk.so, with ninja; everything else is in pyproject.toml.

VFMK_NATIVE=0          build no library: Triton and plain PyTorch remain
VFMK_CUDA=0|1          without or with the CUDA kernels (default: with, where nvcc is found)
TORCH_CUDA_ARCH_LIST   for example "9.0" or "8.0;9.0+PTX" (default: CUDA_ARCHITECTURES below)
MAX_JOBS               compile jobs at once
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"

CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
    " -Wno-maybe-uninitialized"  # g++ 12 reports its own AVX-512 headers
    " -DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch Stable ABI of torch 2.10
)
# Each file in csrc/cpu is compiled once per instruction set; the library chooses at run time.
CPU_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    CPU_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"


def flag(name: str, default: str = "") -> str:
    value = os.environ.get(name, default)
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} is {value!r}; expected 0 or 1")
    return value


def cuda_toolkit() -> Path | None:
    """In $CUDA_HOME, the conventional folder, or where PATH's nvcc leads; or None."""
    wanted = flag("VFMK_CUDA")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    candidates.append(Path(shutil.which("nvcc") or "nvcc").resolve())
    nvcc = next((nvcc for nvcc in candidates if nvcc.is_file()), None)
    if wanted == "1" and nvcc is None:
        raise SystemExit("VFMK_CUDA=1, but no nvcc in $CUDA_HOME, /usr/local/cuda or PATH")
    return None if wanted == "0" or nvcc is None else nvcc.parent.parent


def gencode(nvcc: Path) -> tuple[str, str]:
    """The architectures asked for that nvcc knows, and its flags for them."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    codes = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    names, flags = [], []
    for entry in re.split(r"[; ]+", asked.strip("; ")):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST has {entry!r}; expected such as 9.0 or 9.0+PTX")
        number = entry.removesuffix("+PTX").replace(".", "")
        if int(entry.split(".")[0]) < 8 or f"sm_{number}" not in codes:
            print(f"vfmk: not compiling for {entry}: below 8.0, or unknown to {nvcc}")
            continue
        names.append(entry)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not names:
        raise SystemExit(f"vfmk: {nvcc} can compile for none of {asked}; VFMK_CUDA=0 goes without")
    return " ".join(names), " ".join(flags)


def ninja_file(build: Path, output: Path) -> str:
    import torch

    torch_home = Path(torch.__file__).parent
    cxx = os.environ.get("CXX", "g++")
    if shutil.which(cxx) is None:
        raise SystemExit(f"vfmk: no C++ compiler {cxx!r}; VFMK_NATIVE=0 installs without a library")
    headers = f"-I {ROOT}/csrc -isystem {torch_home}/include"
    link = f"-Wl,--no-as-needed -L{torch_home}/lib -ltorch -Wl,--as-needed"
    defines = ""
    edges, objects = [], []

    def compile_edge(rule: str, source: Path, tag: str, flags: str) -> None:
        objects.append(f"{build}/{source.relative_to(ROOT)}.{tag}.o")
        edges.append(f"build {objects[-1]}: {rule} {source}\n  flags = {flags}")

    for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
        for isa, isa_flags in CPU_FLAGS.items():
            compile_edge("cxx", source, isa, f"-DVFMK_ISA={isa} {isa_flags}")
    if cuda := cuda_toolkit():
        names, flags = gencode(cuda / "bin" / "nvcc")
        defines = f"-DVFMK_WITH_CUDA '-DVFMK_CUDA_ARCHITECTURES=\"{names}\"'"
        link += f" -L{cuda}/lib64 -lcudart_static -lrt -ldl -lpthread -Wl,--exclude-libs,ALL"
        for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
            compile_edge("nvcc", source, "cuda", flags)
    for source in sorted(ROOT.glob("csrc/*.cpp")):
        compile_edge("cxx", source, "host", defines)

    nvcc_flags = f"-O3 -std=c++17 --threads 2 -ccbin {cxx} -Xcompiler -fPIC,-fvisibility=hidden"
    return f"""\
rule cxx
  command = {cxx} {CXX_FLAGS} {headers} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {cuda}/bin/nvcc {nvcc_flags} -MD -MF $out.d -I {ROOT}/csrc $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared -s -o $out $in {link}
{chr(10).join(edges)}
build {output}: link {" ".join(objects)}
"""


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python ABI in the name

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / "native"
        build.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(build, output))
        jobs = os.environ.get("MAX_JOBS")
        command = [sys.executable, "-m", "ninja", "-C", str(build), *(["-j", jobs] if jobs else [])]
        subprocess.run(command, check=True)


class PlainWheel(bdist_wheel):
    """The library holds no Python: one wheel serves every CPython 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


native = flag("VFMK_NATIVE", "1") != "0"
if not native:
    (ROOT / "vfmk" / "libvfmk.so").unlink(missing_ok=True)  # of an earlier editable install
setup(
    ext_modules=[Extension("vfmk.libvfmk", sources=[])] if native else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlainWheel},
)
