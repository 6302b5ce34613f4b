// How the main loop of CUTLASS 2 walks along a row of int8 whose K we tell it: by CUTLASS's own iterator, on
// the CPU. Of every tile of the table and many K, each element up to K must be read once, 16 bytes at a time.
#include <algorithm>
#include <cstdio>
#include <vector>

#include <vector_types.h>

// What CUTLASS's device code names without including.
using std::min;
static const dim3 blockIdx{0, 0, 0};
namespace cutlass::arch {
inline int LaneId() { return 0; }
} // namespace cutlass::arch

#include "cutlass/cutlass.h"
#include "cutlass/gemm/threadblock/default_mma_core_sm80.h"
#include "cutlass/transform/threadblock/predicated_tile_access_iterator.h"

#include "kernels/common/tile_schedule.h"
#include "kernels/int8_linear/int8_linear_instances.h"

namespace {

using cutlass::layout::ColumnMajor;
using cutlass::layout::RowMajor;

template <class Tile, class Warp> int walk(const char *name, int k) {
    using Core = typename cutlass::gemm::threadblock::DefaultMmaCore<
        Tile, Warp, cutlass::gemm::GemmShape<16, 8, 32>, int8_t, RowMajor, int8_t, ColumnMajor, int32_t,
        RowMajor, cutlass::arch::OpClassTensorOp, 3, cutlass::arch::OpMultiplyAddSaturate>;
    using Map = typename Core::IteratorThreadMapA;
    using Iterator = cutlass::transform::threadblock::PredicatedTileAccessIterator<
        cutlass::MatrixShape<Tile::kM, Tile::kK>, int8_t, RowMajor, 1, Map, cutlass::Array<int8_t, 16>>;

    const int told = static_cast<int>(tautorch::cuda::k_in_pieces(k));
    const int ldx = static_cast<int>(tautorch::round_up(k, 16)); // a row ends there
    std::vector<int> reads(static_cast<size_t>(ldx));
    int8_t *const row = reinterpret_cast<int8_t *>(1 << 20); // never read
    int wrong = 0;
    for (int thread = 0; thread < Map::kThreads; ++thread) {
        Iterator at(typename Iterator::Params(RowMajor(ldx)), row, {1, told}, thread, {0, 0});
        for (int step = 0; step < (told + Tile::kK - 1) / Tile::kK; ++step) {
            at.set_iteration_index(0);
            for (int i = 0; i < Map::Iterations::kCount; ++i, ++at) {
                if (!at.valid())
                    continue;
                const auto first = reinterpret_cast<int8_t *>(at.get()) - row;
                wrong += first % 16 != 0 || first + 16 > ldx;
                for (auto e = first; e < std::min<ptrdiff_t>(first + 16, ldx); ++e)
                    ++reads[static_cast<size_t>(e)];
            }
            at.add_tile_offset({0, 1});
        }
    }
    wrong += static_cast<int>(ldx - std::count(reads.begin(), reads.end(), 1));
    if (wrong != 0)
        std::fprintf(stderr, "%s, K %d: %d wrong\n", name, k, wrong);
    return wrong != 0;
}

} // namespace

int main() {
    int failures = 0;
#define TAUTORCH_WALK(name, tm, tn, tk, wm, wn, wk, stages)                                                  \
    for (int k = 1; k <= 600; ++k)                                                                           \
        failures +=                                                                                          \
            walk<cutlass::gemm::GemmShape<tm, tn, tk>, cutlass::gemm::GemmShape<wm, wn, wk>>(#name, k);
    TAUTORCH_INT8_LINEAR_SM80(TAUTORCH_WALK)
    return failures != 0;
}
