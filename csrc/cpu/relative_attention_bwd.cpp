// Relative attention, backward, one stream or two.  Scores are computed again from their parts and the saved lse; with
//     P = exp(S - lse), dP = dO V^T, G = scale * P * (dP - delta), delta_i = dO_i . O_i, and G_r, which is G with every
//     row moved to the columns of the table rows that it meets:
//     dV = P^T dO, dK = G^T (q + u), dr = G_r^T (q + v), dq = G K + G_r r + segments.
//
// The work is cut into tasks (relative_bwd_plan.h, relative_bwd_task.h), whose sums become results at the end.
//
// Determinism: runs of key blocks and groups of sequences are cut by size alone; each has its own partial sums, added
// in order at the end.
#include "../workspace.h"
#include "relative_bwd_task.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// The sequences of group `group` of table `table`, in order.
PYXLBERT_INLINE std::int64_t first_member(const Plan& plan, std::int64_t table, std::int64_t group) {
    return table * plan.members + plan.members * group / plan.groups;
}

template <class T, class U>
void backward(const RelativeAttentionBwd& a) {
    const AttentionCall& in = a.in.in;
    const Plan plan = make_plan<U>(a);
    const std::int64_t sets = plan.groups * plan.parts, tasks = plan.slices * sets;
    constexpr std::int64_t worth_a_thread = 1 << 17;  // multiplications
    const std::int64_t work = plan.planes * plan.rows * (in.keys + 1) * in.head_size;
    // Its memory has a bound for any number of threads.
    constexpr std::int64_t max_scratch = 96 << 20;
    const std::int64_t room = larger(1, max_scratch / (plan.task * static_cast<std::int64_t>(sizeof(float))));
    const std::int64_t wanted = smaller(smaller(in.threads, tasks), work / worth_a_thread);
    const int team = static_cast<int>(larger(1, smaller(wanted, room)));
    const std::int64_t one_table = plan.table_rows * plan.columns, columns = plan.columns;
    const std::int64_t all_tables = a.dtable != nullptr ? tasks * one_table : 0;
    const std::int64_t all_dquery = plan.parts > 1 ? plan.planes * plan.parts * plan.dquery : 0;
    const std::int64_t all_small = plan.planes * plan.parts * SMALL * columns;
    float* scratch = static_cast<float*>(workspace(Slot::tile, team * plan.task * sizeof(float)));
    float* smalls = static_cast<float*>(workspace(Slot::shared, (all_small + all_dquery + all_tables) * sizeof(float)));
    float *dqueries = smalls + all_small, *dtables = dqueries + all_dquery;

#pragma omp parallel num_threads(team)
    {
        if constexpr (TILES<U>) begin_tiles();
        RelativeTask<T, U> worker(a, plan, scratch + thread_index() * plan.task);
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t part = task % plan.parts, group = task / plan.parts % plan.groups, slice = task / sets;
            const std::int64_t table = slice / in.heads, h = slice % in.heads;
            worker.table_sums.begin(a.dtable == nullptr ? nullptr : dtables + task * one_table,
                                    a.in.offset + first_block(plan, part) * BACKWARD_BLOCK - plan.last_place);
            for (std::int64_t b = first_member(plan, table, group); b < first_member(plan, table, group + 1); ++b) {
                const std::int64_t plane = b * in.heads + h, run = plane * plan.parts + part;
                worker.small.sums = smalls + run * SMALL * columns;
                worker.dquery = plan.parts == 1 ? worker.own_dquery : dqueries + run * plan.dquery;
                worker.run(plane, part);
                if (plan.parts == 1) worker.store_dquery(plane, worker.dquery, 1, 0);
            }
            worker.table_sums.end();
            finish_rows();
        }
        if constexpr (TILES<U>) end_tiles();
        if (plan.parts > 1) {
#pragma omp for schedule(dynamic, 1)
            for (std::int64_t plane = 0; plane < plan.planes; ++plane) {
                worker.store_dquery(plane, dqueries + plane * plan.parts * plan.dquery, plan.parts, plan.dquery);
                finish_rows();
            }
        }
        float* sum = worker.dq_tile;
        if (a.dtable != nullptr) {
            constexpr std::int64_t chunk = 64;
            const std::int64_t chunks = ceil_divide(a.in.table_rows, chunk);
#pragma omp for schedule(static)
            for (std::int64_t x = 0; x < plan.slices * chunks; ++x) {
                const std::int64_t first = x % chunks * chunk;
                store_dtable(a, plan, dtables, x / chunks, first, smaller(a.in.table_rows, first + chunk), sum);
                finish_rows();
            }
        }
#pragma omp for schedule(static)
        for (std::int64_t h = 0; h < in.heads; ++h) {
            const std::int64_t d = in.head_size;
            const auto store_bias = [&](Small which, float* target) {
                if (target != nullptr) store_small(a, plan, smalls, h, which, target + h * d, sum);
            };
            store_bias(content, a.dcontent_bias);
            store_bias(position, a.dposition_bias);
            store_bias(segment, a.dsegment_bias);
            store_bias(same_segment, a.dsegment_embedding);
            store_bias(other_segment, a.dsegment_embedding == nullptr ? nullptr : a.dsegment_embedding + in.heads * d);
            finish_rows();
        }
    }
}

}  // namespace

void relative_attention_bwd(const RelativeAttentionBwd& a) {
#if defined(__AMX_BF16__)
    if (a.in.in.dtype == DType::bfloat16)
        backward<bf16, UnitOf<bf16>::Type>(a);
    else
        avx512::relative_attention_bwd(a);
#else
    with_element(a.in.in.dtype, [&](auto element, auto) {
        using T = decltype(element);
        backward<T, typename UnitOf<T>::Type>(a);
    });
#endif
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
