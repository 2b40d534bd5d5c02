// Python bindings of the streams; see module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace megaphase {

void bind_streams(pybind11::module_& module);

}  // namespace megaphase
