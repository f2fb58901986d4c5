// Tensors of Python as the module sees them, and two looks at the tensors of a call.
//
// The last look, before kernels read memory: a tensor's storage may be freed or shrunk behind its back (FSDP frees
// parameters so), and another tensor's memory put in its place between forward and backward; what checks of shapes have
// seen is then no longer there.  The first look, at a whole call: most calls are of plain CPU tensors with nothing
// unusual about them or the thread, and what a call of Python for each question costs would be more than the kernel.
//
// By CPython's own interface and not pybind11's, whose calls alone would take as long as the whole look.
#pragma once
#include <Python.h>

#include <cstdint>

#include "types.h"

namespace pyxlbert {

constexpr int MAX_DIMENSIONS = 64;

// A tensor's memory; valid as long as the tensor lives and nobody resizes it.
struct View {
    void* data = nullptr;  // of the first element; null for None and where there is none
    int dimensions = 0;
    const std::int64_t* shape = nullptr;
    const std::int64_t* strides = nullptr;  // in elements
    int bytes = 0;                          // of an element
    enum { floating, integer, other } kind = other;
    DType dtype = DType::float32;  // where `kind` is floating
    bool on_cpu = false;

    // What shape and strides point at if torch does not lend its own.
    std::int64_t own[2 * MAX_DIMENSIONS];

    View() {}  // `own` is left as it is
    View(const View&) = delete;
    View& operator=(const View&) = delete;

    std::int64_t elements() const;
    bool adjacent() const;  // elements follow each other in memory
    // The last dimension, and the stride of rows of it: of a contiguous tensor, or of two dimensions.
    std::int64_t columns() const { return shape[dimensions - 1]; }
    std::int64_t row_stride() const;
};

// Of a tensor with at most MAX_DIMENSIONS dimensions, or of None.  Returns -1 with an error set on failure.
int view_of(PyObject* tensor, View& view);

// Adds to a module:
//
// contract(list of (place, shape)): what `misfit` and `usual` are to look at.  A shape is letters, one a dimension.
//     An upper-case letter is the same size wherever it stands (Z is 2), a lower-case one that size or 1.  Before them
//     "*" stands for any dimensions, everywhere the same, and "?" for any at all; "=" for one dtype of all that have
//     it, a digit for the bytes of an element at least, "|" for contiguous, "-" for a tensor that is neither lazily
//     negated nor lazily zero.  None, or "-" alone: any shape.  For `usual` alone "^" stands for the dtype of "=" or
//     float32, ":" for integers of 4 or 8 bytes, "/" for None instead.
//
// misfit(contract, record): of the first tensor that is wrong, twice its place if its storage ends before its last
//     element, and one more if its shape or dtype contradicts those before it; -1 if all are right.
//
// watch(tensor types, is_grad_enabled, watchers): what `usual` asks.  The types are those that cannot override a call;
//     a watcher is called without arguments, and its result is true where somebody is to see the calls of this thread.
//
// usual(contract, record): whether nobody watches, no gradient will be asked, and every tensor is of one of the types,
//     in the CPU's memory, floating unless ":" says otherwise, not empty, and as the contract wants it.
//
// read_by_attributes(bool): for tests; as with a torch that does not lend its tensors' sizes.
//
// Returns -1 with an error set on failure.
int add_tensor_checks(PyObject* module);

}  // namespace pyxlbert
