// The stacks of all threads of a Python process, while none of them runs.

#include <pybind11/pybind11.h>

#include <frameobject.h>

namespace py = pybind11;

namespace {

// Frames from the innermost one out, as (file name, line, function). Takes a reference.
py::list stack_of(PyFrameObject* frame) {
  py::list stack;
  while (frame != nullptr) {
    auto code = py::reinterpret_steal<py::object>((PyObject*)PyFrame_GetCode(frame));
    stack.append(py::make_tuple(code.attr("co_filename"), PyFrame_GetLineNumber(frame),
                                code.attr("co_name")));
    PyFrameObject* back = PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = back;
  }
  return stack;
}

// All of it holds Python's lock: no bytecode runs in between, and no garbage collection, which
// could run some. So no frame can be left while its callers are looked up.
py::dict thread_stacks() {
  const bool collected = PyGC_Disable() != 0;
  py::dict stacks;
  {
    // Unlike faulthandler it waits for the lock of the list of threads, which holds those that are
    // just being created, too.
    py::dict frames = py::module_::import("sys").attr("_current_frames")();
    for (auto [ident, frame] : frames) {
      Py_INCREF(frame.ptr());
      stacks[ident] = stack_of(reinterpret_cast<PyFrameObject*>(frame.ptr()));
    }
  }
  if (collected) PyGC_Enable();
  return stacks;
}

}  // namespace

PYBIND11_MODULE(_thread_stacks, module) {
  module.def("thread_stacks", &thread_stacks,
             "The stacks of all threads that run Python, by thread id; innermost call first.");
}
