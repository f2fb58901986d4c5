// The last look at tensors before kernels read memory.  A tensor's storage may be freed or shrunk behind its back
// (FSDP frees parameters so), and another tensor's memory put in its place between forward and backward; what checks of
// shapes have seen is then no longer there.
//
// By CPython's own interface and not pybind11's, whose calls alone would take as long as the whole look.
#pragma once
#include <Python.h>

namespace pyxlbert {

// Adds to a module:
//
// contract(list of (place, shape)): what misfit is to look at.  A shape is letters, one a dimension.
//     An upper-case letter is the same size wherever it stands (Z is 2), a lower-case one that size or 1.  Before them
//     "*" stands for any dimensions, everywhere the same, and "?" for any at all; "=" for one dtype of all that have
//     it, a digit for the bytes of an element at least, "|" for contiguous, "-" for a tensor that is neither lazily
//     negated nor lazily zero.  None, or "-" alone: any shape.
//
// misfit(contract, record): of the first tensor that is wrong, twice its place if its storage ends before its last
//     element, and one more if its shape or dtype contradicts those before it; -1 if all are right.
//
// Returns -1 with an error set on failure.
int add_tensor_checks(PyObject* module);

}  // namespace pyxlbert
