// Python's door to the kernels: they take addresses, numbers and, for each struct, a tuple of its fields. Statuses come
// out as exceptions. The interpreter lock is released while a kernel runs.

#include <pybind11/pybind11.h>

#include <list>
#include <tuple>
#include <type_traits>
#include <utility>

#include "twinflow_rt.h"

namespace py = pybind11;

namespace {

// A number or an address, as what it initialises.
struct Value {
  PyObject* object;

  template <class T>
  operator T() const {  // NOLINT(misc-explicit-constructor): the number that is asked for
    if constexpr (std::is_pointer_v<T>)
      return reinterpret_cast<T>(PyLong_AsVoidPtr(object));
    else if constexpr (std::is_floating_point_v<T>)
      return static_cast<T>(PyFloat_AsDouble(object));
    else
      return static_cast<T>(PyLong_AsLongLong(object));
  }
};

// A tuple, as a struct of N numbers and addresses. It may be longer: what follows keeps the memory alive.
template <class T, size_t... I>
T fields(PyObject* tuple, std::index_sequence<I...> /*counts them*/) {
  if (PyTuple_Check(tuple) && PyTuple_GET_SIZE(tuple) >= static_cast<Py_ssize_t>(sizeof...(I)))
    return T{Value{PyTuple_GET_ITEM(tuple, I)}...};
  PyErr_Format(PyExc_TypeError, "expected a tuple of %zu fields, not %R", sizeof...(I), tuple);
  return T{};
}

template <class T>
T read(PyObject* object) {
  if constexpr (!std::is_class_v<T>)
    return Value{object};
  else if constexpr (std::is_same_v<T, twinflow_weights>)
    return fields<T>(object, std::make_index_sequence<2>());
  else if constexpr (std::is_same_v<T, twinflow_angles> || std::is_same_v<T, twinflow_image>)
    return fields<T>(object, std::make_index_sequence<4>());
  else if constexpr (std::is_same_v<T, twinflow_int4>)
    return fields<T>(object, std::make_index_sequence<5>());
  else
    return fields<T>(object, std::make_index_sequence<3>());
}

// What a library's kernels have in common.
struct Library {
  const char* (*message)(int status);
  PyObject* error;
  const char* name;
};

// A kernel as Python's function.
struct Bound {
  void (*kernel)();
  const Library* library;
  PyMethodDef method;
};

template <class... A, size_t... I>
PyObject* call(const Bound& bound, PyObject* const* arguments, std::index_sequence<I...> /*counts them*/) {
  const auto kernel = reinterpret_cast<int (*)(A...)>(bound.kernel);
  const std::tuple<A...> values{read<A>(arguments[I])...};
  if (PyErr_Occurred()) return nullptr;
  int status;
  {
    const py::gil_scoped_release others_run;
    status = kernel(std::get<I>(values)...);
  }
  if (status == TWINFLOW_OK) Py_RETURN_NONE;
  return PyErr_Format(bound.library->error, "%s%s", bound.library->name, bound.library->message(status));
}

template <class... A>
PyObject* receive(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const Bound& bound = *static_cast<Bound*>(PyCapsule_GetPointer(self, nullptr));
  if (count == sizeof...(A)) return call<A...>(bound, arguments, std::index_sequence_for<A...>());
  return PyErr_Format(PyExc_TypeError, "%s takes %zu arguments, not %zd", bound.method.ml_name, sizeof...(A), count);
}

// Gives `owner` the kernel as a function, unless the library has none.
template <class... A>
void bind(const py::object& owner, const Library& library, const char* name, int (*kernel)(A...)) {
  if (!kernel) return;
  static std::list<Bound> all;  // as long as the process: functions may outlive their owner
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(receive<A...>));
  Bound& bound =
      all.emplace_back(Bound{reinterpret_cast<void (*)()>(kernel), &library, {name, function, METH_FASTCALL, nullptr}});
  const py::capsule self(&bound);
  owner.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_New(&bound.method, self.ptr()));
}

void bind_all(const py::object& owner, const Library& library, const twinflow_kernels& kernels) {
#define KERNEL(name, ...) bind(owner, library, #name, kernels.name);
#define KERNEL_CPU KERNEL
#include "twinflow_kernels.h"
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels; see csrc/include/twinflow_rt.h and twinflow_kernels.h.";
  m.attr("abi_version") = twinflow_abi_version();
  m.attr("isa") = twinflow_cpu_isa();
  static const Library cpu{twinflow_error_message, PyExc_ValueError, ""};
  bind_all(m, cpu, *twinflow_cpu_kernels());

  m.def(
      "bind",
      [](const py::object& owner, const py::int_& kernels, const py::int_& message) {
        static std::list<Library> all;
        all.push_back({Value{message.ptr()}, PyExc_RuntimeError, "libtwinflow_cuda: "});
        bind_all(owner, all.back(), *static_cast<const twinflow_kernels*>(Value{kernels.ptr()}));
      },
      "Gives an object the kernels of libtwinflow_cuda, by the addresses of their table and of what names errors.");

  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("release_threads", [] { return twinflow_cpu_release_threads() == 0; }, Release());
  m.def("threads_apart", twinflow_cpu_threads_apart, Release());
  m.def("threads_together", twinflow_cpu_threads_together, Release());
}
