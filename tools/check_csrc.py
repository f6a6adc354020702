# SPDX-License-Identifier: MIT
"""Checks what neither the formatters nor the compiler see. Prints every violation; exits 1 if there is one.

Sources   Every file names its licence. ``csrc/`` keeps to torch's stable ABI, to pybind11 in one file, and to kernels
          that know no torch.
Binary    The extension asks torch for nothing but C symbols: one build serves every torch from the floor on. The
          operators ask Python for nothing. The bindings define no variable of ours: it would be a second one.
Kernels   The object of an ISA defines nothing outside that ISA's namespace. Were it to carry an inline function of a
          shared header, the linker could keep that copy for everyone, and an older CPU would meet its instructions.
"""

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

BUILD = Path("build", f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
LICENCED = {".cpp", ".cu", ".cuh", ".h", ".py", ".sh", ".toml", ".yaml"}
UNSTABLE = re.compile(r'#include [<"](ATen/|c10/|torch/extension\.h|torch/torch\.h|torch/all\.h)')
CXX_OF_TORCH = re.compile(r"\b(at|c10|torch)::")


def run(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def check_sources() -> Iterator[str]:
    for path in map(Path, run("git", "ls-files", "--cached", "--others", "--exclude-standard")):
        if path.suffix not in LICENCED or not path.exists():
            continue
        text = path.read_text()
        if text and "SPDX-License-Identifier: MIT" not in text.partition("\n\n")[0]:
            yield f"{path}:1: no SPDX-License-Identifier in its first lines"

    for path in sorted(path for path in Path("csrc").rglob("*") if path.is_file()):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if UNSTABLE.match(line):
                yield f"{path}:{number}: not part of torch's stable ABI: {line}"
            if "pybind11" in line and "#include" in line and path != Path("csrc/bindings.cpp"):
                yield f"{path}:{number}: pybind11 belongs in csrc/bindings.cpp alone: {line}"
            if "_kernels." in path.name and re.match(r'#include [<"]torch/', line):
                yield f"{path}:{number}: kernels know no torch: {line}"


def check_binary() -> Iterator[str]:
    libraries = [
        Path("ffm_ext", name)
        for name in (f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "libffm_ext_ops.so")
    ]
    for library in libraries:
        if not library.exists():
            yield f"{library}: not built, run `make build` first"
            continue
        for line in run("nm", "-D", "-C", "--undefined-only", str(library)):
            if CXX_OF_TORCH.search(line):
                yield f"{library}: uses a C++ symbol of torch: {line.strip()}"
            if library.name == "libffm_ext_ops.so" and re.search(r"\b_?Py[A-Z_]", line):
                yield f"{library}: uses a symbol of Python: {line.strip()}"
    bindings = BUILD / "csrc" / "bindings.o"
    if not bindings.exists():
        yield f"{bindings}: not there, run `make build` first"
    else:
        for line in run("nm", "-C", "--defined-only", str(bindings)):
            if re.search(r" [BbDdu] .*\bffm::", line):
                yield f"{bindings}: a variable that libffm_ext_ops.so has too: {line.partition(' ')[2]}"


def check_kernels() -> Iterator[str]:
    for source in sorted(Path("csrc/cpu").glob("*_kernels.cpp")):
        objects = sorted((BUILD / source.parent).glob(f"{source.stem}.*.o"))
        if not objects:
            yield f"{source}: not compiled, run `make build` first"
        for compiled in objects:
            isa = compiled.suffixes[0][1:]
            for line in run("nm", "-C", "--defined-only", "--extern-only", str(compiled)):
                if f"ffm::{isa}::" not in line:
                    yield f"{compiled}: defines a symbol outside ffm::{isa}: {line.partition(' ')[2]}"


def main() -> int:
    violations = [*check_sources(), *check_binary(), *check_kernels()]
    print("\n".join(violations) or "csrc, binary and kernels keep the rules")
    return bool(violations)


if __name__ == "__main__":
    sys.exit(main())
