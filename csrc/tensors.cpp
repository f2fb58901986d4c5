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
    bool typed = false;      // all these arguments have one dtype
    bool parameter = false;  // theirs, or float32
    bool integers = false;   // of 4 or 8 bytes
    bool optional = false;   // may be None
    bool contiguous = false;
    bool plain = false;                                // not lazily negated, and with a storage
    std::int64_t bytes = 0;                            // of an element, or 0: any
    enum { nothing, same, anything } leads = nothing;  // the dimensions before the letters
    bool shaped = false;
    std::string letters;
};

struct Contract {
    std::vector<Argument> arguments;
};

constexpr const char* CAPSULE = "pyxlbert.contract";

// What the letters stand for in one call.
struct Sizes {
    std::int64_t of_letter[26];
    std::int64_t leading[MAX_DIMENSIONS];
    Py_ssize_t leads = -1;

    int dtype = -1;  // of the arguments that have one: kind, DType and bytes

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

PyObject *untyped_storage, *nbytes, *storage_offset, *data_ptr, *shape_, *stride_, *itemsize, *dtype_, *is_cpu, *is_neg,
    *is_zerotensor, *requires_grad;

// What torch lends of its tensors, without a call of Python: the exchange of DLPack, version 1.2 and later.
//
// Source: https://dmlc.github.io/dlpack/latest/c_api.html, DLTensor and DLPackExchangeAPI.
struct LentTensor {
    void* data;
    std::int32_t device_type, device_id;
    std::int32_t dimensions;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

struct Exchange {
    std::uint32_t major, minor;
    Exchange* before;
    void *allocate, *owning_of, *python_of;
    int (*tensor_of)(void* python, LentTensor* lent);
};

constexpr std::uint32_t EXCHANGE_VERSION = 1;  // the major one
constexpr std::int32_t CPU = 1;                // kDLCPU
enum Code : std::uint8_t { INTEGER = 0, FLOAT = 2, BFLOAT = 4 };

// torch's part of the above, and what `watch` has been told.  Python objects here are kept for ever.
struct Torch {
    const Exchange* exchange = nullptr;
    bool by_attributes = false;
    PyObject* floating[3] = {};  // dtypes, in the order of DType
    PyObject* integer[2] = {};
    std::vector<PyObject*> types, watchers;
    PyObject* is_grad_enabled = nullptr;
};
Torch torch_;

int ask_torch() {
    PyObject* torch = PyImport_ImportModule("torch");
    if (torch == nullptr) return -1;
    constexpr const char* floating[] = {"float32", "bfloat16", "float16"};
    constexpr const char* integers[] = {"int32", "int64"};
    for (int n = 0; n < 3; ++n)
        if ((torch_.floating[n] = PyObject_GetAttrString(torch, floating[n])) == nullptr) return -1;
    for (int n = 0; n < 2; ++n)
        if ((torch_.integer[n] = PyObject_GetAttrString(torch, integers[n])) == nullptr) return -1;
    PyObject* tensor = PyObject_GetAttrString(torch, "Tensor");
    Py_DECREF(torch);
    if (tensor == nullptr) return -1;
    PyObject* lends = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    Py_DECREF(tensor);
    if (lends != nullptr) {
        const auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(lends, "dlpack_exchange_api"));
        if (found != nullptr && found->major == EXCHANGE_VERSION) torch_.exchange = found;
        Py_DECREF(lends);  // the class keeps it
    }
    PyErr_Clear();
    return 0;
}

// A Python integer that a method (or, if not CALLED, an attribute) of x gives; -1 with an error set if there is none.
template <bool CALLED>
std::int64_t integer(PyObject* x, PyObject* name) {
    PyObject* found = CALLED ? PyObject_CallMethodNoArgs(x, name) : PyObject_GetAttr(x, name);
    if (found == nullptr) return -1;
    const std::int64_t value = PyLong_AsLongLong(found);
    Py_DECREF(found);
    return value;
}

// Whether a method (or, if not CALLED, an attribute) of x gives True; -1 with an error set if it raises.
template <bool CALLED>
int truth(PyObject* x, PyObject* name) {
    PyObject* found = CALLED ? PyObject_CallMethodNoArgs(x, name) : PyObject_GetAttr(x, name);
    if (found == nullptr) return -1;
    Py_DECREF(found);  // True and False are for ever
    return found == Py_True;
}

bool lent(PyObject* x, View& view) {
    LentTensor found;
    if (torch_.exchange->tensor_of(x, &found) != 0) {
        // Sparse, without a storage, of symbols, of a dtype or a device that DLPack has no word for.
        PyErr_Clear();
        return false;
    }
    if (found.lanes != 1 || found.dimensions > MAX_DIMENSIONS) return false;
    view.data = found.data == nullptr ? nullptr : static_cast<char*>(found.data) + found.byte_offset;
    view.dimensions = found.dimensions;
    view.shape = found.shape;
    view.strides = found.strides;
    view.bytes = found.bits / 8;
    view.on_cpu = found.device_type == CPU;
    view.kind = View::other;
    if (found.code == INTEGER) view.kind = View::integer;
    if ((found.code == FLOAT && (found.bits == 32 || found.bits == 16)) || found.code == BFLOAT) {
        view.kind = View::floating;
        view.dtype = found.code == BFLOAT ? DType::bfloat16 : found.bits == 32 ? DType::float32 : DType::float16;
    }
    return true;
}

// A tuple of integers; -1 with an error set if it is none, or too long.
int read_tuple(PyObject* tuple, std::int64_t* target) {
    if (tuple == nullptr) return -1;
    const Py_ssize_t size = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : -1;
    if (size < 0 || size > MAX_DIMENSIONS) {
        PyErr_Format(PyExc_ValueError, "got a tensor of %zd dimensions, wanted at most %d", size, MAX_DIMENSIONS);
    } else {
        for (Py_ssize_t d = 0; d < size; ++d) target[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, d));
    }
    Py_DECREF(tuple);
    return PyErr_Occurred() != nullptr ? -1 : static_cast<int>(size);
}

int read_attributes(PyObject* x, View& view) {
    view.dimensions = read_tuple(PyObject_GetAttr(x, shape_), view.own);
    if (view.dimensions < 0) return -1;
    std::int64_t* strides = view.own + MAX_DIMENSIONS;
    if (read_tuple(PyObject_CallMethodNoArgs(x, stride_), strides) < 0) return -1;
    view.shape = view.own;
    view.strides = strides;
    PyObject* address = PyObject_CallMethodNoArgs(x, data_ptr);
    if (address == nullptr) return -1;
    view.data = PyLong_AsVoidPtr(address);
    Py_DECREF(address);
    if (view.data == nullptr && PyErr_Occurred() != nullptr) return -1;
    const std::int64_t bytes = integer<false>(x, itemsize);
    if (bytes < 0) return -1;
    view.bytes = static_cast<int>(bytes);
    const int cpu = truth<false>(x, is_cpu);
    if (cpu < 0) return -1;
    view.on_cpu = cpu == 1;
    PyObject* dtype = PyObject_GetAttr(x, dtype_);
    if (dtype == nullptr) return -1;
    Py_DECREF(dtype);  // there is one object for each dtype, and torch keeps it
    view.kind = View::other;
    for (int n = 0; n < 3; ++n)
        if (dtype == torch_.floating[n]) {
            view.kind = View::floating;
            view.dtype = DType(n);
        }
    for (PyObject* one : torch_.integer)
        if (dtype == one) view.kind = View::integer;
    return 0;
}

// 1 if the storage of x holds all its elements, 0 if not, -1 with an error set.
int held(PyObject* x, const View& view) {
    if (view.elements() == 0) return 1;
    PyObject* storage = PyObject_CallMethodNoArgs(x, untyped_storage);
    if (storage == nullptr) return -1;
    const std::int64_t there = integer<true>(storage, nbytes);
    Py_DECREF(storage);
    if (there == -1) return -1;
    std::int64_t last = integer<true>(x, storage_offset);
    if (last == -1) return -1;
    for (int d = 0; d < view.dimensions; ++d) last += (view.shape[d] - 1) * view.strides[d];
    return (last + 1) * view.bytes <= there;
}

bool same_type(const View& view, Sizes& sizes) {
    const int dtype = (static_cast<int>(view.kind) * 4 + static_cast<int>(view.dtype)) * 32 + view.bytes;
    if (sizes.dtype == -1) sizes.dtype = dtype;
    return dtype == sizes.dtype;
}

bool fits(const View& view, const Argument& argument, Sizes& sizes) {
    const Py_ssize_t letters = static_cast<Py_ssize_t>(argument.letters.size());
    const Py_ssize_t leads = view.dimensions - letters;
    bool right = argument.leads == Argument::nothing ? leads == 0 : leads >= 0;
    if (right && argument.leads == Argument::same) {
        const bool first = sizes.leads == -1;
        if (first) sizes.leads = leads;
        right = leads == sizes.leads;
        for (Py_ssize_t d = 0; right && d < leads; ++d) {
            if (first) sizes.leading[d] = view.shape[d];
            right = sizes.leading[d] == view.shape[d];
        }
    }
    for (Py_ssize_t n = 0; right && n < letters; ++n)
        right = sizes.takes(argument.letters[static_cast<std::size_t>(n)], view.shape[leads + n]);
    return right;
}

// 1 if x is lazily negated or zero, 0 if not, -1 with an error set.
int lazy(PyObject* x) {
    const int negated = truth<true>(x, is_neg);
    return negated != 0 ? negated : truth<true>(x, is_zerotensor);
}

void forget(PyObject* capsule) { delete static_cast<Contract*>(PyCapsule_GetPointer(capsule, CAPSULE)); }

Argument read(Py_ssize_t place, const char* shape) {
    Argument argument;
    argument.place = place;
    for (; shape != nullptr && *shape != 0; ++shape) {
        argument.shaped |= *shape != '-';
        switch (*shape) {
            case '-':
                argument.plain = true;
                break;
            case '=':
                argument.typed = true;
                break;
            case '^':
                argument.parameter = true;
                break;
            case ':':
                argument.integers = true;
                break;
            case '/':
                argument.optional = true;
                break;
            case '|':
                argument.contiguous = true;
                break;
            case '*':
                argument.leads = Argument::same;
                break;
            case '?':
                argument.leads = Argument::anything;
                break;
            default:
                if (*shape >= '0' && *shape <= '9')
                    argument.bytes = *shape - '0';
                else
                    argument.letters.push_back(*shape);
        }
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

// The contract of a call of `misfit` or `usual`; null with an error set.
const Contract* given(PyObject* const* arguments, Py_ssize_t count) {
    if (count == 2 && PyTuple_Check(arguments[1]))
        return static_cast<const Contract*>(PyCapsule_GetPointer(arguments[0], CAPSULE));
    PyErr_SetString(PyExc_TypeError, "misfit, usual: wanted a contract and a record");
    return nullptr;
}

// misfit(contract, call): see tensors.h.
PyObject* misfit(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    const Contract* known = given(arguments, count);
    if (known == nullptr) return nullptr;
    Sizes sizes;
    for (const Argument& argument : known->arguments) {
        PyObject* x = PyTuple_GetItem(arguments[1], argument.place);
        if (x == nullptr) return nullptr;
        if (x == Py_None) continue;
        if (argument.plain) {
            const int found = lazy(x);
            if (found == -1) return nullptr;
            if (found == 1) return PyLong_FromSsize_t(2 * argument.place);
        }
        View view;
        if (view_of(x, view) < 0) return nullptr;
        const int stored = held(x, view);
        if (stored == -1) return nullptr;
        if (stored == 0) return PyLong_FromSsize_t(2 * argument.place);
        if (!argument.shaped) continue;
        const bool right = fits(view, argument, sizes) && view.bytes >= argument.bytes &&
                           (!argument.typed || same_type(view, sizes)) && (!argument.contiguous || view.adjacent());
        if (!right) return PyLong_FromSsize_t(2 * argument.place + 1);
    }
    return PyLong_FromLong(-1);
}

// watch(types, is_grad_enabled, watchers): see tensors.h.
PyObject* watch(PyObject*, PyObject* arguments) {
    PyObject *types, *is_grad_enabled, *watchers;
    if (!PyArg_ParseTuple(arguments, "O!OO!", &PyTuple_Type, &types, &is_grad_enabled, &PyTuple_Type, &watchers))
        return nullptr;
    const auto kept = [](PyObject* tuple) {
        std::vector<PyObject*> all;
        for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(tuple); ++n) all.push_back(Py_NewRef(PyTuple_GET_ITEM(tuple, n)));
        return all;
    };
    torch_.types = kept(types);
    torch_.watchers = kept(watchers);
    torch_.is_grad_enabled = Py_NewRef(is_grad_enabled);
    Py_RETURN_NONE;
}

// 1 if the call is true, 0 if not, -1 with an error set.
int asked(PyObject* function) {
    PyObject* found = PyObject_CallNoArgs(function);
    if (found == nullptr) return -1;
    const int result = PyObject_IsTrue(found);
    Py_DECREF(found);
    return result;
}

// 1 if x is what the argument wants, 0 if not, -1 with an error set.
int usual_tensor(PyObject* x, const Argument& argument, bool gradients, Sizes& sizes) {
    if (x == Py_None) return argument.optional;
    bool known = false;
    for (PyObject* type : torch_.types) known |= reinterpret_cast<PyObject*>(Py_TYPE(x)) == type;
    View view;
    if (!known || view_of(x, view) < 0) return known ? -1 : 0;
    if (!view.on_cpu || view.data == nullptr || view.elements() == 0 || !fits(view, argument, sizes)) return 0;
    if (argument.integers ? view.kind != View::integer || view.bytes < 4 : view.kind != View::floating) return 0;
    if (argument.typed && !same_type(view, sizes)) return 0;
    if (argument.parameter && view.dtype != DType::float32 && !same_type(view, sizes)) return 0;
    if (gradients) {
        const int found = truth<false>(x, requires_grad);
        if (found != 0) return found == 1 ? 0 : -1;
    }
    // What is lazily zero has no memory.
    const int negated = truth<true>(x, is_neg);
    if (negated != 0) return negated == 1 ? 0 : -1;
    return held(x, view);
}

// usual(contract, call): see tensors.h.
PyObject* usual(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    const Contract* known = given(arguments, count);
    if (known == nullptr) return nullptr;
    int right = torch_.is_grad_enabled != nullptr;
    for (std::size_t n = 0; right == 1 && n < torch_.watchers.size(); ++n) {
        const int watched = asked(torch_.watchers[n]);
        right = watched == -1 ? -1 : watched == 0;
    }
    const int gradients = right == 1 ? asked(torch_.is_grad_enabled) : 0;
    if (gradients == -1) right = -1;
    Sizes sizes;
    for (std::size_t n = 0; right == 1 && n < known->arguments.size(); ++n) {
        const Argument& argument = known->arguments[n];
        PyObject* x = PyTuple_GetItem(arguments[1], argument.place);
        right = x == nullptr ? -1 : usual_tensor(x, argument, gradients == 1, sizes);
    }
    // What raises is not usual; whoever looks closer finds words for it.
    if (right == -1) PyErr_Clear();
    return PyBool_FromLong(right == 1);
}

PyObject* read_by_attributes(PyObject*, PyObject* on) {
    const int value = PyObject_IsTrue(on);
    if (value == -1) return nullptr;
    torch_.by_attributes = value == 1;
    Py_RETURN_NONE;
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"contract", contract, METH_O, nullptr},
    {"misfit", fast(misfit), METH_FASTCALL, nullptr},
    {"watch", watch, METH_VARARGS, nullptr},
    {"usual", fast(usual), METH_FASTCALL, nullptr},
    {"read_by_attributes", read_by_attributes, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

std::int64_t View::elements() const {
    std::int64_t count = 1;
    for (int d = 0; d < dimensions; ++d) count *= shape[d];
    return count;
}

bool View::adjacent() const {
    std::int64_t wanted = 1;
    for (int d = dimensions - 1; d >= 0; --d) {
        if (shape[d] == 0) return true;
        if (shape[d] != 1 && strides[d] != wanted) return false;
        wanted *= shape[d];
    }
    return true;
}

std::int64_t View::row_stride() const { return dimensions == 2 && shape[0] > 1 ? strides[0] : columns(); }

int view_of(PyObject* tensor, View& view) {
    if (tensor == Py_None) return 0;
    if (torch_.floating[0] == nullptr && ask_torch() < 0) return -1;
    if (torch_.exchange != nullptr && !torch_.by_attributes && lent(tensor, view)) return 0;
    return read_attributes(tensor, view);
}

int add_tensor_checks(PyObject* module) {
    untyped_storage = PyUnicode_InternFromString("untyped_storage");
    nbytes = PyUnicode_InternFromString("nbytes");
    storage_offset = PyUnicode_InternFromString("storage_offset");
    data_ptr = PyUnicode_InternFromString("data_ptr");
    shape_ = PyUnicode_InternFromString("shape");
    stride_ = PyUnicode_InternFromString("stride");
    is_cpu = PyUnicode_InternFromString("is_cpu");
    is_neg = PyUnicode_InternFromString("is_neg");
    is_zerotensor = PyUnicode_InternFromString("_is_zerotensor");
    requires_grad = PyUnicode_InternFromString("requires_grad");
    dtype_ = PyUnicode_InternFromString("dtype");
    itemsize = PyUnicode_InternFromString("itemsize");
    return PyModule_AddFunctions(module, methods);
}

}  // namespace pyxlbert
