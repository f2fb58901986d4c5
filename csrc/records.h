// Records of Python as arguments of the module's functions: a struct with `fields` is read of an object's attributes.
#pragma once
#include <pybind11/pybind11.h>

#include <type_traits>
#include <vector>

#include "score_options.h"

namespace pybind11::detail {

// A number or a flag of Python's.  Throws what Python raises.
template <class T>
T plain_value(PyObject* object) {
    T value;
    if constexpr (std::is_same_v<T, bool>)
        value = PyObject_IsTrue(object) == 1;
    else if constexpr (std::is_floating_point_v<T>)
        value = static_cast<T>(PyFloat_AsDouble(object));
    else
        value = static_cast<T>(PyLong_AsLong(object));
    if (PyErr_Occurred() != nullptr) throw error_already_set();
    return value;
}

template <class Record>
class record_caster {
  public:
    static constexpr auto name = const_name("tuple");
    template <class>
    using cast_op_type = const Record&;

    operator const Record&() const { return record_; }
    bool load(handle source, bool) {
        // A name that is made once is found by its address.
        static const std::vector<PyObject*> names = interned();
        auto next = names.begin();
        record_.fields([&](const char*, auto& value) {
            const object found = reinterpret_steal<object>(PyObject_GetAttr(source.ptr(), *next++));
            if (!found) throw error_already_set();
            value = plain_value<std::remove_reference_t<decltype(value)>>(found.ptr());
        });
        return true;
    }

  private:
    static std::vector<PyObject*> interned() {
        std::vector<PyObject*> names;
        Record{}.fields([&](const char* name, auto&) { names.push_back(PyUnicode_InternFromString(name)); });
        return names;
    }

    Record record_{};
};

template <>
class type_caster<pyxlbert::ScoreOptions> : public record_caster<pyxlbert::ScoreOptions> {};
template <>
class type_caster<pyxlbert::RelativeOptions> : public record_caster<pyxlbert::RelativeOptions> {};
template <>
class type_caster<pyxlbert::StreamOptions> : public record_caster<pyxlbert::StreamOptions> {};

}  // namespace pybind11::detail
