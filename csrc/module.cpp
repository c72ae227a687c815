// cmlm_fast._build: what the native libraries were compiled with. No op goes through this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

namespace {

// CMake passes its lists as one string, "a b c".
std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  std::istringstream stream(list);
  for (std::string item; stream >> item;) items.push_back(item);
  return items;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = CMLM_VERSION;
  info["schemas"] = 1;  // as in cmlm_fast/_library.py
  info["compiler"] = CMLM_COMPILER;
  info["torch"] = CMLM_TORCH_VERSION;
  info["torch_target"] = CMLM_TORCH_TARGET;
  info["cpu_isas"] = split(CMLM_ISAS);
  info["cuda"] = std::string(CMLM_CUDA_VERSION).empty() ? pybind11::object(pybind11::none()) : pybind11::str(CMLM_CUDA_VERSION);
  info["cuda_archs"] = split(CMLM_CUDA_ARCHS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "What the native libraries of cmlm_fast were compiled with.";
  m.def("build_info", &build_info,
        "Version of the package, number of the ops' schemas, compiler, torch built against, libtorch ABI target, CPU instruction sets, CUDA version\n"
        "(None: built without CUDA) and CUDA architectures, as a dict.");
}
