// What kernels of attention are told beside tensors and sizes: of a call, and of each stream of queries.  The CPU's
// parameters and CUDA's hold these records as they are, so an option more is a field here, its name, and the kernels'
// lines that ask for it.  The names are those of the records of pyxlbert.launch and of the ops' schemas; `fields` calls
// its argument with each (csrc/records.h reads them of Python).
#pragma once
#include "types.h"

namespace pyxlbert {

// pyxlbert.launch.attention.ScoreOptions; a call of attention has the same fields.
struct ScoreOptions {
    float scale;
    bool causal;

    template <class Field>
    void fields(Field field) {
        field("scale", scale);
        field("causal", causal);
    }

    // A softmax takes the products as they are, and the factor in its exponent.
    PYXLBERT_INLINE bool only_scales() const { return scale > 0.0f; }
};

// What relative attention has beside them.
struct RelativeOptions {
    bool uniform_rows;  // a row without any key averages over all of them: a masked score is UNIFORM_SCORE, not -inf

    template <class Field>
    void fields(Field field) {
        field("uniform_rows", uniform_rows);
    }
};

// pyxlbert.launch.relative.StreamOptions.
struct StreamOptions {
    bool see_self;          // row i sees key i + Tk - Tq whatever the masks say
    bool mask_by_position;  // the mask's row is a query's position and not its number
    Tag tag;                // of the dropout bits

    template <class Field>
    void fields(Field field) {
        field("see_self", see_self);
        field("mask_by_position", mask_by_position);
        field("tag", tag);
    }
};

}  // namespace pyxlbert
