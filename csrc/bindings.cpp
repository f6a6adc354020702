// SPDX-License-Identifier: MIT
// The Python module ffm_ext._C: what handles no tensors. Loading it also registers the operators.

#include <pybind11/pybind11.h>

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/kept_memory.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of ffm_ext; loading this module registers torch.ops.ffm_ext.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = FFM_EXT_VERSION;
    info["torch_built_against"] = FFM_EXT_TORCH_VERSION;
    info["compiler"] = __VERSION__;
    info["isa"] = ffm::cpu_isa();
    info["cuda_archs"] = py::list();
    return info;
  });
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, size_t bytes) { return ffm::advise_huge_pages(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"));
  m.def("kept_bytes", &ffm::kept_bytes);
  m.def("release_kept_memory", &ffm::release_kept_memory);
}
