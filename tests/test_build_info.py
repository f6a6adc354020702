# SPDX-License-Identifier: MIT
"""``build_info``, and the variable that forces a CPU path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from problems import python

import ffm_ext


def test_says_what_was_built_and_what_runs() -> None:
    info = ffm_ext.build_info()
    assert info["version"] == ffm_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["isa"] in ("baseline", "avx2", "avx512", "neon")
    assert info["cuda_archs"] in ([], ["sm_80", "sm_90", "compute_90"])
    assert {"torch_built_against", "compiler", "cpu_count", "python", "platform"} <= info.keys()
    json.dumps(info)


def test_forced_isa_is_the_one_in_use(isa: str) -> None:
    code = "import ffm_ext; print(ffm_ext.build_info()['isa'])"
    assert python("-c", code, FFM_EXT_ISA=isa).stdout.strip() == isa


def test_unknown_isa_is_refused() -> None:
    found = python("-c", "import ffm_ext; ffm_ext.build_info()", FFM_EXT_ISA="sse9")
    assert found.returncode != 0
    assert "FFM_EXT_ISA = sse9 is not one of baseline, avx2, avx512" in found.stderr


def test_sources_that_are_not_built_say_so(tmp_path: Path) -> None:
    sources = Path(ffm_ext.__file__).parent
    copy = shutil.copytree(sources, tmp_path / "ffm_ext", ignore=shutil.ignore_patterns("*.so"))
    # Whatever else the finders know, such as where an editable install keeps its extension.
    path = [str(copy.parent), str(Path(torch.__file__).parents[1])]
    found = python("-c", f"import sys; sys.path[:0] = {path}; import ffm_ext")
    assert found.returncode != 0
    assert f"ImportError: {copy} is a copy of ffm_ext's sources that is not built" in found.stderr
    assert "`make build` builds it" in found.stderr
