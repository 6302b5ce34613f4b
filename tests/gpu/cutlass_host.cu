// What CUTLASS's own host code says about tiles and about the layout of 2:4 weights, beside ours. Runs on the
// CPU.
//   cutlass_host schedule     compares common/tile_schedule.h with CUTLASS's schedulers over many grids
//   cutlass_host place        n, k (int64) and an int8 weight [n, k], 2 of each 4 not 0, from standard input;
//                             to standard output values and places as CUTLASS's sparse main loop reads them
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
#include "cutlass/gemm/kernel/tile_scheduler_params.h"
#include "kernels/common/tile_schedule.h"

using namespace tautorch::cuda;
using cutlass::gemm::GemmCoord;
using cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90Params;
using cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamKParams;
using Raster = PersistentTileSchedulerSm90Params::RasterOrderOptions;

namespace {

int failures = 0;
template <class... Args> void expect(bool holds, const char *format, Args... args) {
    if (!holds && ++failures <= 20)
        std::fprintf(stderr, format, args...);
}

cutlass::KernelHardwareInfo hardware(int multiprocessors) {
    cutlass::KernelHardwareInfo h;
    h.sm_count = multiprocessors;
    return h;
}

dim3 blocks_of(const TileGrid &g) {
    return PersistentTileSchedulerSm90Params::get_tiled_cta_shape_mnl(
        cutlass::gemm::BatchedGemmCoord(1, 1, 1, 1), GemmCoord(g.cluster_m, g.cluster_n, 1),
        static_cast<uint32_t>(g.m), static_cast<uint32_t>(g.n));
}

// Tiles that CUTLASS will make.
int64_t made(const TileGrid &g, int swizzle) {
    PersistentTileSchedulerSm90Params p;
    p.initialize(blocks_of(g), GemmCoord(g.cluster_m, g.cluster_n, 1), hardware(132), swizzle,
                 Raster::Heuristic);
    return static_cast<int64_t>(p.blocks_per_problem_);
}

void check_swizzles() {
    for (const auto [cm, cn] : {std::pair{1, 1}, {2, 1}, {1, 2}})
        for (int m = 1; m <= 80; ++m)
            for (int n = 1; n <= 130; ++n) {
                const TileGrid g{m, n, cm, cn};
                const int swizzle = swizzle_of(g);
                const int64_t got = made(g, swizzle), at_least = made(g, 1);
                expect(at_least == g.tiles(), "%d x %d tiles: %" PRId64 ", not %" PRId64 "\n", m, n, at_least,
                       g.tiles());
                expect(64 * got <= 65 * g.tiles(), "%d x %d tiles, swizzle %d: %" PRId64 " made\n", m, n,
                       swizzle, got);
                for (const int more : {2, 4, 8}) // no larger one would have done
                    expect(more <= swizzle || made(g, more) == got || 64 * made(g, more) > 65 * g.tiles(),
                           "%d x %d tiles: swizzle %d where %d would do\n", m, n, swizzle, more);
            }
}

void check_shares() {
    for (const int processors : {78, 108, 114, 132})
        for (int m = 1; m <= 9; ++m)
            for (int n = 1; n <= 130; n += n < 40 ? 1 : 9)
                for (int steps = 1; steps <= 112; steps += steps < 20 ? 1 : 23) {
                    const TileGrid g{m, n, 1, 1};
                    PersistentTileSchedulerSm90StreamKParams p;
                    using Params = decltype(p);
                    p.initialize(blocks_of(g), static_cast<uint32_t>(steps), GemmCoord(1, 1, 1),
                                 hardware(processors), 1, 1, Params::RasterOrderOptions::Heuristic,
                                 Params::ReductionMode::Deterministic, Params::DecompositionMode::Heuristic,
                                 nullptr);
                    const int64_t tiles = g.tiles();
                    // As many blocks as multiprocessors take units in turn: whole tiles, equal parts of
                    // tiles, or the shares of sk_units_ blocks and then whole tiles.
                    const auto splits = static_cast<int64_t>(p.divmod_splits_.divisor);
                    double rounds = static_cast<double>(tautorch::div_up(tiles, processors));
                    if (splits > 1)
                        rounds = 1. / static_cast<double>(splits);
                    else if (p.sk_units_ > 0)
                        rounds = static_cast<double>(p.sk_tiles_) / p.sk_units_ +
                                 static_cast<double>((tiles - p.sk_tiles_) / processors);
                    const TileRounds ours = shared_rounds(tiles, steps, processors);
                    expect(ours.split == (splits > 1 || p.sk_units_ > 0),
                           "%d x %d tiles of %d steps on %d: split %d\n", m, n, steps, processors,
                           ours.split);
                    expect(std::abs(ours.rounds - rounds) < 1e-9,
                           "%d x %d tiles of %d steps on %d: %f rounds, not %f\n", m, n, steps, processors,
                           ours.rounds, rounds);
                }
}

int place() {
    using namespace cute;
    using Config = cutlass::Sm90GemmSparseConfig<sparse_elem<2, int8_t>, GMMA::Major::K,
                                                 sparse_elem<8, uint8_t>, Int<128>>;
    int64_t size[2];
    if (std::fread(size, 8, 2, stdin) != 2)
        return 2;
    const int n = static_cast<int>(size[0]), k = static_cast<int>(size[1]);
    std::vector<int8_t> weight(static_cast<size_t>(n) * k);
    if (std::fread(weight.data(), 1, weight.size(), stdin) != weight.size())
        return 2;
    // K rounded up as for TMA's rows of values.
    const auto shape = make_tuple(n, 1, cutlass::round_up(k, Config::TensorAAlignmentK{}), 1);
    const auto layout_a = Config::fill_layoutA(shape);
    const auto layout_e = Config::fill_layoutE(shape);
    std::vector<int8_t> values(static_cast<size_t>(cosize(layout_a)) / 2);
    std::vector<uint8_t> places(static_cast<size_t>(cosize(layout_e)) / 8);
    for (int row = 0; row < n; ++row)
        for (int group = 0; group < k; group += 4) {
            int kept = 0;
            for (int i = 0; i < 4 && group + i < k; ++i)
                if (const int8_t v = weight[static_cast<size_t>(row) * k + group + i]; v != 0) {
                    // An element of A stands for two of K, one of E for 8; a place is two bits, groups of 4
                    // lowest first.
                    const auto at = layout_a(row, make_coord(0, group / 2 + kept), 0);
                    values[static_cast<size_t>(at / 2)] = v;
                    const auto byte = static_cast<size_t>(layout_e(row, group, 0) / 8);
                    places[byte] |= static_cast<uint8_t>(i << (group % 8 / 4 * 4 + 2 * kept++));
                }
        }
    const int64_t sizes[] = {static_cast<int64_t>(values.size()), static_cast<int64_t>(places.size())};
    std::fwrite(sizes, 8, 2, stdout);
    std::fwrite(values.data(), 1, values.size(), stdout);
    std::fwrite(places.data(), 1, places.size(), stdout);
    return 0;
}

} // namespace

int main(int argc, char **argv) {
    if (argc == 2 && std::strcmp(argv[1], "place") == 0)
        return place();
    check_swizzles();
    check_shares();
    return failures != 0;
}
