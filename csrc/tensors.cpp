#include "tensors.h"

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace pyxlbert {
namespace {

// One tensor argument: its place in the call's record, and its shape as letters.
struct Argument {
    Py_ssize_t place;
    bool typed;  // all these arguments have one dtype
    bool contiguous;
    bool plain;                              // not lazily negated, and with a storage
    std::int64_t bytes;                      // of an element, or 0: any
    enum { nothing, same, anything } leads;  // the dimensions before the letters
    bool shaped;
    std::string letters;
};

struct Contract {
    std::vector<Argument> arguments;
};

constexpr const char* CAPSULE = "pyxlbert.contract";
constexpr int MOST_DIMENSIONS = 16;

// What the letters stand for in one call.
struct Sizes {
    std::int64_t of_letter[26];
    std::int64_t leading[MOST_DIMENSIONS];
    Py_ssize_t leads = -1;

    PyObject* dtype = nullptr;  // borrowed: compared only

    Sizes() {
        std::memset(of_letter, -1, sizeof of_letter);
        of_letter['Z' - 'A'] = 2;
    }

    // An upper-case letter is a size; a lower-case one that size or 1.
    bool takes(char letter, std::int64_t size) {
        const bool broadcasts = letter >= 'a';
        std::int64_t& known = of_letter[letter - (broadcasts ? 'a' : 'A')];
        if (broadcasts) return size == 1 || size == known;
        if (known == -1) known = size;
        return size == known;
    }
};

PyObject *untyped_storage, *nbytes, *storage_offset, *is_contiguous, *shape_, *stride_, *itemsize, *dtype_, *is_neg,
    *is_zerotensor;

// A Python integer that a method (or, if not CALLED, an attribute) of x gives; -1 with an error set if there is none.
template <bool CALLED>
std::int64_t integer(PyObject* x, PyObject* name) {
    PyObject* found = CALLED ? PyObject_CallMethodNoArgs(x, name) : PyObject_GetAttr(x, name);
    if (found == nullptr) return -1;
    const std::int64_t value = PyLong_AsLongLong(found);
    Py_DECREF(found);
    return value;
}

// Bytes from the first element of the storage to the last one of x, whose strides are anything.
std::int64_t reach(PyObject* x, std::int64_t offset) {
    const std::int64_t size = integer<false>(x, itemsize);
    PyObject* shape = PyObject_GetAttr(x, shape_);
    PyObject* strides = shape == nullptr ? nullptr : PyObject_CallMethodNoArgs(x, stride_);
    std::int64_t last = -1;
    if (strides != nullptr) {
        last = offset;
        for (Py_ssize_t d = 0; d < PyTuple_GET_SIZE(shape); ++d)
            last +=
                (PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d)) - 1) * PyLong_AsLongLong(PyTuple_GET_ITEM(strides, d));
        last = (last + 1) * size;
    }
    Py_XDECREF(strides);
    Py_XDECREF(shape);
    return last;
}

// 1 if the storage of x holds all its elements, 0 if not, -1 with an error set; and whether those are adjacent.
int held(PyObject* x, bool& adjacent) {
    std::int64_t wanted = integer<false>(x, nbytes);
    if (wanted <= 0) return wanted == 0 ? 1 : -1;
    PyObject* storage = PyObject_CallMethodNoArgs(x, untyped_storage);
    if (storage == nullptr) return -1;
    const std::int64_t there = integer<true>(storage, nbytes);
    Py_DECREF(storage);
    if (there == -1) return -1;
    const std::int64_t offset = integer<true>(x, storage_offset);
    if (offset == -1) return -1;
    PyObject* contiguous = PyObject_CallMethodNoArgs(x, is_contiguous);
    if (contiguous == nullptr) return -1;
    adjacent = contiguous == Py_True;
    Py_DECREF(contiguous);
    if (adjacent && offset == 0) return wanted <= there;
    wanted = reach(x, offset);
    if (wanted == -1) return -1;
    return wanted <= there;
}

// 1 if elements of x are what the argument's are, 0 if not, -1 with an error set.
int typed(PyObject* x, const Argument& argument, Sizes& sizes) {
    if (argument.bytes > 0) {
        const std::int64_t bytes = integer<false>(x, itemsize);
        if (bytes < argument.bytes) return bytes == -1 ? -1 : 0;
    }
    if (!argument.typed) return 1;
    PyObject* dtype = PyObject_GetAttr(x, dtype_);
    if (dtype == nullptr) return -1;
    Py_DECREF(dtype);  // there is one object for each dtype, and torch keeps it
    if (sizes.dtype == nullptr) sizes.dtype = dtype;
    return dtype == sizes.dtype;
}

// 1 if the shape of x is that of the argument, 0 if not, -1 with an error set.
int fits(PyObject* x, const Argument& argument, Sizes& sizes) {
    PyObject* shape = PyObject_GetAttr(x, shape_);
    if (shape == nullptr) return -1;
    const Py_ssize_t letters = static_cast<Py_ssize_t>(argument.letters.size());
    const Py_ssize_t leads = PyTuple_GET_SIZE(shape) - letters;
    bool right = argument.leads == Argument::nothing ? leads == 0 : leads >= 0 && leads <= MOST_DIMENSIONS;
    const auto size = [&](Py_ssize_t d) { return PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d)); };
    if (right && argument.leads == Argument::same) {
        const bool first = sizes.leads == -1;
        if (first) sizes.leads = leads;
        right = leads == sizes.leads;
        for (Py_ssize_t d = 0; right && d < leads; ++d) {
            if (first) sizes.leading[d] = size(d);
            right = sizes.leading[d] == size(d);
        }
    }
    for (Py_ssize_t n = 0; right && n < letters; ++n) right = sizes.takes(argument.letters[n], size(leads + n));
    Py_DECREF(shape);
    return right;
}

void forget(PyObject* capsule) { delete static_cast<Contract*>(PyCapsule_GetPointer(capsule, CAPSULE)); }

Argument read(Py_ssize_t place, const char* shape) {
    Argument argument{place, false, false, false, 0, Argument::nothing, false, {}};
    for (; shape != nullptr && *shape != 0; ++shape) {
        argument.shaped |= *shape != '-';
        if (*shape == '-')
            argument.plain = true;
        else if (*shape == '=')
            argument.typed = true;
        else if (*shape == '|')
            argument.contiguous = true;
        else if (*shape >= '0' && *shape <= '9')
            argument.bytes = *shape - '0';
        else if (*shape == '*')
            argument.leads = Argument::same;
        else if (*shape == '?')
            argument.leads = Argument::anything;
        else
            argument.letters.push_back(*shape);
    }
    return argument;
}

// contract([(place, shape or None), ...]): see tensors.h.
PyObject* contract(PyObject*, PyObject* list) {
    auto* made = new Contract;
    const Py_ssize_t count = PyList_Check(list) ? PyList_GET_SIZE(list) : 0;
    for (Py_ssize_t n = 0; n < count; ++n) {
        Py_ssize_t place;
        const char* shape;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, n), "nz", &place, &shape)) {
            delete made;
            return nullptr;
        }
        made->arguments.push_back(read(place, shape));
    }
    return PyCapsule_New(made, CAPSULE, forget);
}

// misfit(contract, call): see tensors.h.
PyObject* misfit(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 2 || !PyTuple_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "misfit: wanted a contract and a record");
        return nullptr;
    }
    const auto* known = static_cast<const Contract*>(PyCapsule_GetPointer(arguments[0], CAPSULE));
    if (known == nullptr) return nullptr;
    Sizes sizes;
    for (const Argument& argument : known->arguments) {
        PyObject* x = PyTuple_GetItem(arguments[1], argument.place);
        if (x == nullptr) return nullptr;
        if (x == Py_None) continue;
        for (PyObject* lazy : {is_neg, is_zerotensor}) {
            if (!argument.plain) break;
            PyObject* is = PyObject_CallMethodNoArgs(x, lazy);
            if (is == nullptr) return nullptr;
            Py_DECREF(is);  // True and False are for ever
            if (is == Py_True) return PyLong_FromSsize_t(2 * argument.place);
        }
        bool adjacent = true;
        const int stored = held(x, adjacent);
        int right = stored == 1 && argument.shaped ? fits(x, argument, sizes) : 1;
        if (right == 1 && argument.shaped) right = typed(x, argument, sizes);
        if (stored == -1 || right == -1) return nullptr;
        if (stored == 0) return PyLong_FromSsize_t(2 * argument.place);
        if (right == 0 || (argument.contiguous && !adjacent)) return PyLong_FromSsize_t(2 * argument.place + 1);
    }
    return PyLong_FromLong(-1);
}

PyMethodDef methods[] = {
    {"contract", contract, METH_O, nullptr},
    {"misfit", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(misfit)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_tensor_checks(PyObject* module) {
    untyped_storage = PyUnicode_InternFromString("untyped_storage");
    nbytes = PyUnicode_InternFromString("nbytes");
    storage_offset = PyUnicode_InternFromString("storage_offset");
    is_contiguous = PyUnicode_InternFromString("is_contiguous");
    shape_ = PyUnicode_InternFromString("shape");
    stride_ = PyUnicode_InternFromString("stride");
    is_neg = PyUnicode_InternFromString("is_neg");
    is_zerotensor = PyUnicode_InternFromString("_is_zerotensor");
    dtype_ = PyUnicode_InternFromString("dtype");
    itemsize = PyUnicode_InternFromString("itemsize");
    return PyModule_AddFunctions(module, methods);
}

}  // namespace pyxlbert
