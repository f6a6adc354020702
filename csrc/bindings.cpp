// SPDX-License-Identifier: MIT
// The Python module ffm_ext._C: what handles no tensors. Loading it also registers the operators.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <variant>

#include "check_contents.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/kept_memory.h"
#include "io/libffm_reader.h"

namespace py = pybind11;

namespace {

// The memory changes hands: nothing is copied.
template <typename T>
py::array_t<T> to_numpy(ffm::io::Array<T>&& array) {
  T* const data = array.data.release();
  return py::array_t<T>(array.size, data, py::capsule(data, std::free));
}

py::dict read_text(const py::object& path, bool libsvm, int64_t begin, std::optional<int64_t> end, int64_t first_line,
                   std::optional<int64_t> num_features, std::optional<int64_t> num_fields, bool lenient,
                   int64_t max_faults, int num_threads) {
  ffm::io::ReadOptions options{.format = libsvm ? ffm::io::TextFormat::kLibsvm : ffm::io::TextFormat::kLibffm,
                               .begin = begin,
                               .first_line = first_line,
                               .lenient = lenient,
                               .max_faults = max_faults,
                               .num_threads = num_threads};
  if (end) options.end = *end;
  if (num_features) options.num_features = *num_features;
  if (num_fields) options.num_fields = std::min(*num_fields, options.num_fields);
  const std::string name = path.cast<std::filesystem::path>().native();
  ffm::io::Samples samples;
  try {
    py::gil_scoped_release others_run;
    samples = ffm::io::read_file(name, options);
  } catch (const std::system_error& error) {
    errno = error.code().value();  // Python picks FileNotFoundError and its like
    PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path.ptr());
    throw py::error_already_set();
  }
  py::dict found;
  found["labels"] = to_numpy(std::move(samples.labels));
  found["offsets"] = to_numpy(std::move(samples.offsets));
  found["fields"] = libsvm ? py::object(py::none()) : to_numpy(std::move(samples.fields));
  found["indices"] =
      std::visit([](auto& indices) -> py::object { return to_numpy(std::move(indices)); }, samples.indices);
  found["values"] = samples.values.get() ? py::object(to_numpy(std::move(samples.values))) : py::none();
  found["max_index"] = samples.max_index;
  found["max_field"] = samples.max_field;
  py::list faults;
  for (const ffm::io::Fault& fault : samples.faults)
    faults.append(py::make_tuple(fault.line, fault.column, fault.what));
  found["faults"] = faults;
  found["num_faults"] = samples.num_faults;
  found["num_lines"] = samples.num_lines;
  found["end"] = samples.end;
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "What of ffm_ext handles no tensors: build information, reading text, memory. Loading it registers "
      "torch.ops.ffm_ext.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = FFM_EXT_VERSION;
    info["torch_built_against"] = FFM_EXT_TORCH_VERSION;
#ifdef __clang__
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "GCC " __VERSION__;
#endif
    info["isa"] = ffm::cpu_isa();
    info["cuda_archs"] = py::str(FFM_EXT_CUDA_ARCHS).attr("split")();
    return info;
  });
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, size_t bytes) { return ffm::advise_huge_pages(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"));
  m.def("check_contents", [](bool is_on) { return ffm::checks_device_contents().exchange(is_on); }, py::arg("is_on"));
  m.def("checks_contents", [] { return ffm::checks_device_contents().load(); });
  m.def("kept_bytes", &ffm::kept_bytes);
  m.def("release_kept_memory", &ffm::release_kept_memory);
  m.def("read_text", &read_text, py::arg("path"), py::kw_only(), py::arg("libsvm") = false, py::arg("begin") = 0,
        py::arg("end") = py::none(), py::arg("first_line") = 1, py::arg("num_features") = py::none(),
        py::arg("num_fields") = py::none(), py::arg("lenient") = false, py::arg("max_faults") = 10,
        py::arg("num_threads") = 1);
}
