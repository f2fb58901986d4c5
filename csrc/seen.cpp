#include "seen.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "cpu/fingerprint.h"
#include "run.h"

namespace py = pybind11;

namespace pyxlbert {
namespace {

// Weights of which there are copies, and what some of their memory held.  Their owner sees to it that it is still
// there.
class Seen {
  public:
    // runs: address, bytes, lines to take of them; 0: all.
    explicit Seen(const std::vector<std::array<std::int64_t, 3>>& runs) {
        for (const auto& [address, bytes, lines] : runs)
            add(pointer<const char>(static_cast<Address>(address)), bytes, lines);
        digest_ = look();
    }
    bool unchanged() const { return look() == digest_; }
    std::uint64_t digest() const { return digest_; }

  private:
    // Of each of so many equal parts one line, at another place in each: rows of a matrix begin at regular places.
    void add(const char* data, std::int64_t bytes, std::int64_t lines) {
        constexpr std::int64_t line = 64;
        const std::int64_t whole = bytes / line;
        if (lines == 0 || whole <= lines) {
            for (std::int64_t n = 0; n < whole; ++n) lines_.push_back(data + n * line);
            for (std::int64_t n = whole * line; n < bytes; ++n) bytes_.push_back(data + n);
            return;
        }
        for (std::int64_t n = 0; n < lines; ++n) {
            const std::int64_t first = whole * n / lines, count = whole * (n + 1) / lines - first;
            random_ = random_ * 6364136223846793005u + 1442695040888963407u;
            const auto place = static_cast<std::int64_t>((random_ >> 33) % static_cast<std::uint64_t>(count));
            lines_.push_back(data + (first + place) * line);
        }
    }

    std::uint64_t look() const {
        std::uint64_t found = 0;
        const Fingerprint arguments{lines_.data(), static_cast<std::int64_t>(lines_.size()), bytes_.data(),
                                    static_cast<std::int64_t>(bytes_.size()), &found};
        PYXLBERT_RUN_WHERE(fingerprint, arguments, avx512_bf16, false);
        return found;
    }

    std::vector<const char*> lines_, bytes_;
    std::uint64_t random_ = 1, digest_ = 0;
};

std::uint64_t mixed(std::uint64_t x, std::uint64_t more) {
    x = (x ^ more) * 0x9e3779b97f4a7c15u;
    return x ^ (x >> 32);
}

std::uint64_t layouts(const py::list& tensors) {
    std::uint64_t found = 1;
    View view;
    for (const py::handle& one : tensors) {
        if (view_of(one.ptr(), view) < 0) throw py::error_already_set();
        found = mixed(found, reinterpret_cast<std::uintptr_t>(view.data));
        found = mixed(found, static_cast<std::uint64_t>(view.dimensions) << 8 | static_cast<std::uint64_t>(view.bytes));
        for (int d = 0; d < view.dimensions; ++d) {
            found = mixed(found, static_cast<std::uint64_t>(view.shape[d]));
            found = mixed(found, static_cast<std::uint64_t>(view.strides[d]));
        }
    }
    return found;
}

bool held(const py::list& dictionaries, const py::list& keys, const py::list& values) {
    for (std::size_t n = 0; n < values.size(); ++n) {
        const auto at = static_cast<Py_ssize_t>(n);
        PyObject* found =
            PyDict_GetItemWithError(PyList_GET_ITEM(dictionaries.ptr(), at), PyList_GET_ITEM(keys.ptr(), at));
        if (found == nullptr) {
            if (PyErr_Occurred() != nullptr) throw py::error_already_set();
            found = Py_None;
        }
        if (found != PyList_GET_ITEM(values.ptr(), at)) return false;
    }
    return true;
}

}  // namespace

void bind_seen(py::module_& cpu) {
    py::class_<Seen>(cpu, "Seen")
        .def(py::init<const std::vector<std::array<std::int64_t, 3>>&>())
        .def("unchanged", &Seen::unchanged)
        .def_property_readonly("digest", &Seen::digest);
    cpu.def("layouts", &layouts);
    cpu.def("held", &held);
}

}  // namespace pyxlbert
