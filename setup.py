# SPDX-License-Identifier: MIT
"""Builds ``ffm_ext._C`` and the library of the operators beside it: which files are compiled, and how. All metadata is
in pyproject.toml.

=========================  ===================================  =======================================
file                       compiled                             sees, beside csrc/
=========================  ===================================  =======================================
csrc/cpu/*_kernels.cpp     once per ISA of the table ``ISAS``   nothing: kernels know no torch
                           (``-DFFM_ISA=<isa>``)
csrc/cuda/*.cu             once, by nvcc, for ``CUDA_ARCHS``    CUDA: kernels know no torch
csrc/bindings.cpp          once, for the first ISA              Python, pybind11, the version macros
every other csrc/**/*.cpp  once, for the first ISA              torch's stable ABI, at its floor version
=========================  ===================================  =======================================

Of these, kernels that mention ``FFM_DTYPE`` are compiled once for each type of ``TYPES`` (``-DFFM_DTYPE=<its C++
type>``): on several cores that is faster.

No ``-march=native`` and no ``-ffast-math``: the CPU is asked at run time which ISA it has. CUDA is built where a
toolkit is found, GPU or not: the binary asks a loaded libtorch_cuda.so for what it needs, and so loads in a torch for
the CPU too. A kernel that spills registers fails the build. A device with a compiler of its own gets its own folder,
its own rule in ``write_ninja`` and its own lines in ``compile_steps``.

``libffm_ext_ops.so`` has everything but the bindings and needs no Python: programs in C++ load it for the operators.
``_C`` is the bindings, linked to it; what they call there says ``FFM_API`` (csrc/export.h).

The build is one ninja file in ``build/<platform>-<python>/``, shared by ``pip install .``, ``pip install -e .`` and
``python setup.py build_ext --inplace``; it also leaves ``build/compile_commands.json`` for clangd.

Environment: ``CXX``, ``CXXFLAGS``, ``LDFLAGS``, ``MAX_JOBS``, ``FFM_EXT_SANITIZE=address,undefined``,
``FFM_EXT_CUDA=auto|1|0`` (1: an error where there is no toolkit; 0: none is looked for) and ``CUDA_HOME``.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools import __version__ as setuptools_version
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# The oldest torch that the binary runs on; setup.py defines TORCH_TARGET_VERSION from it.
TORCH_FLOOR = (2, 10)

OPS_LIBRARY = "libffm_ext_ops.so"

# C++20 because torch's own headers are compiled as C++20 since 2.13.
CXXFLAGS = [
    *("-std=c++20", "-O3", "-g0", "-DNDEBUG", "-fPIC", "-Wall", "-Wextra"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
]

# Architecture -> ISA -> flags. The first ISA is one that every CPU of the architecture has. The ISA's name is the
# namespace of its kernels and the value of FFM_EXT_ISA.
ISAS = {
    "x86_64": {
        "baseline": ["-march=x86-64"],
        "avx2": ["-march=x86-64", "-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            *("-march=x86-64", "-mavx2", "-mfma", "-mf16c"),
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
        ],
    },
    "aarch64": {"neon": ["-march=armv8-a"]},
}
OTHER_ISAS: dict[str, list[str]] = {"baseline": []}

# What tables are stored in (csrc/params.h) -> its C++ type. Kernels are compiled for each by itself, so that a build
# takes as long as one of them, given the cores.
TYPES = {"float32": "float", "float64": "double", "bfloat16": "BFloat16", "float16": "Float16"}

# Kernels pass vectors by value between inlined functions only: no ABI to warn about. GCC 12's own AVX-512 headers have
# intrinsics whose unused operand is uninitialized on purpose. Nobody asks for errno, without which roots are vectors.
# Loops that GCC writes twice, for a condition that does not change, are a fifth of the code and no faster. Clang knows
# neither the last of these nor the warning.
KERNEL_FLAGS = [
    *("-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
    *("-fno-math-errno", "-fno-unswitch-loops", "-Wno-ignored-optimization-argument"),
]

# Machine code for these, and PTX of the last for GPUs to come.
CUDA_ARCHS = ["80", "90"]
NVCCFLAGS = [
    *("-std=c++20", "-O3", "-lineinfo", "-DNDEBUG", "--expt-relaxed-constexpr"),
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS),
    f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}",
    *("-Xptxas", "-v", "-Werror", "all-warnings"),
    *("-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden"),
]
# A spill is an error, but in CUB's kernels, which are not ours to mend.
NO_SPILLS = ["-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror"]
# The oldest nvcc that knows C++20.
NVCC_FLOOR = 12
# In front of a compiler in CXX; nvcc wants the compiler itself.
LAUNCHERS = {"ccache", "distcc", "icecc", "sccache"}


class Compiler(NamedTuple):
    command: list[str]
    version: str
    arch: str
    isas: dict[str, list[str]]
    runtime: list[str]  # the shared library of C++, where it is found


class Cuda(NamedTuple):
    home: Path
    version: str


class Torch(NamedTuple):
    version: str
    include: list[str]
    lib: list[str]


class Step(NamedTuple):
    """One compilation: ``source`` to ``<build>/<stem>[.<variant>].o``."""

    source: Path
    variant: str
    flags: list[str]

    def target(self, build: Path) -> Path:
        return build / self.source.with_suffix(f".{self.variant}.o" if self.variant else ".o")


SANITIZERS = ("address", "undefined", "thread", "leak")


def fail(message: str) -> SystemExit:
    return SystemExit(f"\nffm_ext cannot be built: {message}\n")


def build_folder(sanitize: str = "") -> Path:
    parts = [sysconfig.get_platform(), sys.implementation.cache_tag, *sanitize.split(",")]
    return Path("build", "-".join(filter(None, parts)))


def find_compiler() -> Compiler:
    command = shlex.split(os.environ.get("CXX", ""))
    if not command:
        command = [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not command or not shutil.which(command[0]):
        found = f"CXX={shlex.join(command)} is not there" if command else "there is no C++ compiler"
        raise fail(
            f"{found}. Install GCC 11 or newer or Clang 14 or newer (Debian, Ubuntu: `apt-get install "
            "g++`; Fedora: `dnf install gcc-c++`), or name one: `CXX=/path/to/g++ pip install .`."
        )

    def ask(option: str) -> str:
        return subprocess.run([*command, option], capture_output=True, text=True).stdout.strip()

    version, machine = ask("--version").partition("\n")[0], ask("-dumpmachine")
    if "linux" not in machine:
        raise fail(
            "it is written for Linux and a compiler with GCC's options, and "
            f"`{shlex.join(command)} -dumpmachine` says {machine or 'nothing'!r}. On Windows, build "
            "it inside WSL 2; elsewhere, in a Linux container."
        )
    arch = machine.partition("-")[0]
    # By its path: a compiler that has a static one alone would give the extension a C++ library of its own beside
    # torch's, and the two share half of their symbols.
    runtime = ask("-print-file-name=libstdc++.so.6")
    return Compiler(
        command, version, arch, ISAS.get(arch, OTHER_ISAS), [runtime] if "/" in runtime else []
    )


def cuda_variables() -> list[str]:
    """Those that are set and say where a toolkit is."""
    return [name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]


def cuda_homes() -> Iterator[Path]:
    """Where a toolkit may be: where it is said to be, or else where they are. An nvcc on the PATH may be a script."""
    if named := cuda_variables():
        yield from (Path(os.environ[name]) for name in named)
        return
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parents[1]
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)


def find_sanitizers() -> str:
    """Those that ``FFM_EXT_SANITIZE`` names, for ``-fsanitize=``."""
    wanted = os.environ.get("FFM_EXT_SANITIZE", "")
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    if not set(words) <= set(SANITIZERS):
        raise fail(
            f"FFM_EXT_SANITIZE = {wanted!r} is not a list of {', '.join(SANITIZERS)}, with commas."
        )
    return ",".join(words)


def flags_of(name: str) -> list[str]:
    """Those of an environment variable."""
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError as error:
        raise fail(f"{name} = {os.environ[name]!r} is no list of flags ({error}).") from None


def jobs_option() -> list[str]:
    """How many compilations ninja runs at a time, as ``MAX_JOBS`` has it."""
    jobs = os.environ.get("MAX_JOBS")
    if not jobs:
        return []
    if not jobs.isdecimal() or int(jobs) < 1:
        raise fail(f"MAX_JOBS = {jobs!r} is no number of compilations, from 1 on.")
    return ["-j", jobs]


def find_cuda(sanitize: str) -> Cuda | str:
    """The toolkit, or why CUDA is not built."""
    wanted = os.environ.get("FFM_EXT_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise fail(f"FFM_EXT_CUDA = {wanted!r} is not one of auto, 0, 1.")
    if wanted == "0":
        return "FFM_EXT_CUDA=0"
    if sanitize and wanted == "auto":
        return "sanitizers are for the CPU"
    homes = list(dict.fromkeys(cuda_homes()))
    for home in homes:
        nvcc = home / "bin" / "nvcc"
        if not ((home / "include" / "cuda_runtime.h").exists() and nvcc.exists()):
            continue
        try:
            text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        except OSError:  # a file that is no program
            continue
        version = text.partition("release ")[2].partition(",")[0]
        major = version.partition(".")[0]
        if major.isdecimal() and int(major) >= NVCC_FLOOR:
            return Cuda(home, version)
    reason = "no toolkit with include/cuda_runtime.h and an nvcc {} or newer in {}".format(
        NVCC_FLOOR, ", ".join(map(str, homes))
    )
    named = cuda_variables()
    asked = "FFM_EXT_CUDA=1" if wanted == "1" else f"{' and '.join(named)} is set" if named else ""
    if asked:
        raise fail(
            f"{asked}, and there is {reason}. Name its folder, `CUDA_HOME=/path/to/cuda`, or leave CUDA out, "
            "`FFM_EXT_CUDA=0`."
        )
    return reason


def find_torch() -> Torch:
    need = ".".join(map(str, TORCH_FLOOR))
    remedy = (
        f"Install it with `{sys.executable} -m pip install 'torch>={need}'`, or let pip fetch it for "
        "the build by leaving `--no-build-isolation` out."
    )
    try:
        import torch  # takes 2 s, so nothing but the build itself does it
        from torch.utils import cpp_extension
    except ImportError as error:
        found = f"{sys.executable} cannot import it ({error})"
        raise fail(f"it needs PyTorch {need} or newer, and {found}. {remedy}") from None
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < TORCH_FLOOR:
        raise fail(
            f"it needs PyTorch {need} or newer, and {sys.executable} has {version}. {remedy}"
        )
    return Torch(version, cpp_extension.include_paths(), cpp_extension.library_paths())


def check_build_tools() -> None:
    if missing := [name for name in ("ninja", "pybind11") if find_spec(name) is None]:
        names = " ".join(missing)
        raise fail(
            f"without build isolation, {sys.executable} has to have what the build imports, and it "
            f"lacks: {names}. Install with `{sys.executable} -m pip install {names}`."
        )


def steps_of(source: Path, variant: str, flags: list[str]) -> Iterator[Step]:
    """Once; or, where the source is for a type, ``FFM_DTYPE``, once for each."""
    if "FFM_DTYPE" not in source.read_text():
        yield Step(source, variant, flags)
        return
    for dtype, cpp_type in TYPES.items():
        yield Step(source, f"{variant}.{dtype}", [*flags, f"-DFFM_DTYPE={cpp_type}"])


def kernel_steps(compiler: Compiler) -> Iterator[Step]:
    slow_first = sorted(Path("csrc/cpu").glob("*_kernels.cpp"), reverse=True)
    for source in slow_first:
        for isa, isa_flags in compiler.isas.items():
            yield from steps_of(source, isa, [*isa_flags, *KERNEL_FLAGS, f"-DFFM_ISA={isa}"])


def compile_steps(
    compiler: Compiler, torch: Torch, cuda: Cuda | str, package_version: str
) -> Iterator[Step]:
    import pybind11

    has_cuda = isinstance(cuda, Cuda)
    archs = (
        [*(f"sm_{arch}" for arch in CUDA_ARCHS), f"compute_{CUDA_ARCHS[-1]}"] if has_cuda else []
    )

    every_cpu = next(iter(compiler.isas.values()))
    floor = "0x{:02x}{:02x}000000000000".format(*TORCH_FLOOR)
    for_torch = [
        *(f"-isystem{path}" for path in torch.include),
        # Its headers name themselves in errors: by a path that is the same wherever this is built.
        *(f"-ffile-prefix-map={path}=torch/include" for path in torch.include),
        f"-DTORCH_TARGET_VERSION={floor}",
    ]
    for_python = [
        *(f"-isystem{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())),
        f'-DFFM_EXT_VERSION="{package_version}"',
        f'-DFFM_EXT_TORCH_VERSION="{torch.version}"',
        f'-DFFM_EXT_CUDA_ARCHS="{" ".join(archs)}"',
    ]
    yield from kernel_steps(compiler)
    if has_cuda:  # the slow ones first
        sources = sorted(Path("csrc/cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
        for source in sources:
            yield from steps_of(source, "cuda", [] if source.stem == "device_sort" else NO_SPILLS)
    for source in sorted(Path("csrc").rglob("*.cpp")):
        if source.match("csrc/cpu/*_kernels.cpp"):
            continue
        if source.match("csrc/cuda/*.cpp") and not has_cuda:
            continue
        for_source = for_python if source.match("csrc/bindings.cpp") else for_torch
        yield Step(source, "", [*every_cpu, *for_source])


def ninja_words(words: list[str]) -> str:
    """A shell's words, as ninja hands them on."""
    return shlex.join(words).replace("$", "$$")


def write_ninja(
    build: Path,
    library: Path,
    compiler: Compiler,
    torch: Torch,
    cuda: Cuda | str,
    steps: Iterator[Step],
    sanitize: str,
) -> None:
    from ninja import ninja_syntax

    cxxflags, ldflags = [*CXXFLAGS, "-Icsrc"], ["-shared"]
    if sanitize:
        cxxflags += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}"]
        ldflags += [f"-fsanitize={sanitize}"]
    ldflags += [*compiler.runtime, *(f"-L{path}" for path in torch.lib), "-ltorch_cpu"]
    if isinstance(cuda, Cuda):
        libraries = cuda.home / ("lib64" if (cuda.home / "lib64").exists() else "lib")
        ldflags += [f"-L{libraries}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    cxxflags += flags_of("CXXFLAGS")
    ldflags += flags_of("LDFLAGS")

    with open(build / "build.ninja", "w") as file:
        n = ninja_syntax.Writer(file, width=1000)  # type: ignore[arg-type]  # its stub says str
        n.variable("builddir", str(build))
        n.rule(
            "cxx",
            f"{ninja_words(compiler.command)} -MD -MF $out.d $flags {ninja_words(cxxflags)} -c $in -o $out",
            description="compile $in $variant",
            depfile="$out.d",
            deps="gcc",
        )
        if isinstance(cuda, Cuda):
            # What ptxas says of each kernel is kept for `make cuda-report`, and shown where it is an error.
            host = next(word for word in compiler.command if Path(word).name not in LAUNCHERS)
            nvcc = [str(cuda.home / "bin" / "nvcc"), "-ccbin", host]
            if "clang" in compiler.version:  # which finds such in NVIDIA's own headers
                nvcc += ["-Xcompiler", "-Wno-unused-function"]
            n.rule(
                "nvcc",
                f"{ninja_words(nvcc)} -MD -MF $out.d {ninja_words(NVCCFLAGS)} $flags -Icsrc -c $in -o $out "
                "> $out.ptxas 2>&1 || (grep -v '^ptxas info' $out.ptxas; exit 1)",
                description="compile $in",
                depfile="$out.d",
                deps="gcc",
            )
        n.rule(
            "link",
            f"{ninja_words(compiler.command)} $in -o $out {ninja_words(ldflags)} $how",
            description="link $out",
        )
        objects: list[str] = []
        bindings: list[str] = []
        for step in steps:
            target = str(step.target(build))
            (bindings if step.source.match("csrc/bindings.cpp") else objects).append(target)
            variables = {"flags": ninja_words(step.flags), "variant": step.variant}
            rule = "nvcc" if step.source.suffix == ".cu" else "cxx"
            n.build([target], rule, [str(step.source)], variables=variables)
        operators = str(library.with_name(OPS_LIBRARY))
        n.build(
            [operators],
            "link",
            objects,
            variables={"how": f"-Wl,-soname,{OPS_LIBRARY} -Wl,--no-undefined"},
        )
        how = {"how": "-Wl,-rpath,'$$ORIGIN'"}
        n.build([str(library)], "link", [*bindings, operators], variables=how)


def replace(source: Path, target: Path) -> None:
    """Copies, but not into the file that is there: a running Python may have it mapped."""
    beside = target.with_name(f"{target.name}.new")
    shutil.copy(source, beside)
    os.replace(beside, target)


class CleanBuild(build_py):
    """Copies the Python files into an empty folder: what an earlier build left there would go into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "ffm_ext"), ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    """Compiles the extension with ninja, in a folder that outlives the command."""

    def build_extension(self, ext: Extension) -> None:
        compiler, torch = find_compiler(), find_torch()
        check_build_tools()
        jobs = jobs_option()
        sanitize = find_sanitizers()
        cuda = find_cuda(sanitize)
        build = build_folder(sanitize)
        library = build / Path(self.get_ext_filename(ext.name)).name

        print(f"ffm_ext: compiler    {shlex.join(compiler.command)} ({compiler.version})")
        print(f"ffm_ext: kernels     {', '.join(compiler.isas)}, for {compiler.arch}")
        print(
            "ffm_ext: torch       {}, binary for {}.{} and newer".format(
                torch.version, *TORCH_FLOOR
            )
        )
        if isinstance(cuda, Cuda):
            print(
                f"ffm_ext: CUDA        {cuda.version} in {cuda.home}, for {', '.join(CUDA_ARCHS)}"
            )
        else:
            print(f"ffm_ext: CUDA        none: {cuda}")
        print(f"ffm_ext: sanitizers  {sanitize or 'none'}")
        print(f"ffm_ext: build in    {build}", flush=True)

        build.mkdir(parents=True, exist_ok=True)
        with open(build / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would spoil ninja's log
            steps = compile_steps(compiler, torch, cuda, self.distribution.get_version())
            write_ninja(build, library, compiler, torch, cuda, steps, sanitize)
            ninja = [sys.executable, "-m", "ninja", "-f", str(build / "build.ninja")]
            if subprocess.run([*ninja, *jobs]).returncode:
                advice = [
                    f"it is {compiler.version}, and has to know C++20 (GCC 11 or newer, Clang 14 or newer)",
                    "where it was killed, there was too little memory for so many at a time: `MAX_JOBS=1`",
                ]
                if isinstance(cuda, Cuda):
                    advice.append(
                        f"nvcc is that of CUDA {cuda.version}, and takes compilers of its time: `CXX=` names another, "
                        "`FFM_EXT_CUDA=0` leaves CUDA out"
                    )
                raise fail(
                    "the compiler stopped; its first error is above, behind `FAILED:`. If that does not tell: "
                    + "; ".join(advice)
                    + "."
                )
            compdb = subprocess.run([*ninja, "-t", "compdb"], capture_output=True, check=True)
            Path("build", "compile_commands.json").write_bytes(compdb.stdout)

            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # With a new time: setuptools, which copies on from here, leaves out what is not newer.
            replace(library, target)
            replace(library.with_name(OPS_LIBRARY), target.with_name(OPS_LIBRARY))

    def copy_extensions_to_source(self) -> None:
        """For --inplace and editable installs, which know of the extension alone."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
            target = built.relative_to(self.build_lib).with_name(OPS_LIBRARY)
            replace(built.with_name(OPS_LIBRARY), target)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent)  # where the sources are
    if int(setuptools_version.partition(".")[0]) < 77:  # the first to read pyproject.toml's license
        raise fail(
            f"it needs setuptools 77 or newer, and {sys.executable} has {setuptools_version}. Install "
            f"with `{sys.executable} -m pip install --upgrade setuptools`."
        )
    extension = Extension(
        "ffm_ext._C",
        sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        depends=sorted(
            str(path) for suffix in ("h", "cu", "cuh") for path in Path("csrc").rglob(f"*.{suffix}")
        ),
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": NinjaBuild, "build_py": CleanBuild})
