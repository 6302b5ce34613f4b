// What CUTLASS's tile schedulers for 9.0 make of a number of tiles, as far as choosing kernels and their
// arguments needs it, and the K of its main loop for 8.0: host code without CUTLASS, which a test holds
// against CUTLASS's own.
#pragma once

#include <algorithm>

#include "kernels/common/dtype.h"

namespace tautorch::cuda {

// Tiles along both sides of D, in whole clusters.
struct TileGrid {
    int64_t m, n;
    int cluster_m, cluster_n;
    int64_t tiles() const { return round_up(m, cluster_m) * round_up(n, cluster_n); }
};

// So many tiles in a row share operands in L2: CUTLASS's max_swizzle_size. It rounds both sides up to whole
// swizzles of whole clusters and multiplies the tiles so added like any other: with 8, tiles of 128 rows in
// clusters of 2 would make 1024 rows of 512. So: the largest that adds at most one tile in 64.
inline int swizzle_of(const TileGrid &g) {
    const int64_t shorter = std::min(round_up(g.m, g.cluster_m), round_up(g.n, g.cluster_n));
    for (const int s : {8, 4, 2}) {
        if (shorter < (s == 8 ? 6 : s == 4 ? 3 : 2))
            continue; // CUTLASS takes less by itself
        const TileGrid rounded{g.m, g.n, s * g.cluster_m, s * g.cluster_n};
        if (rounded.tiles() * 64 <= g.tiles() * 65)
            return s;
    }
    return 1;
}

// Tiles a multiprocessor makes while the busiest is at work, and whether any tile is made by several.
struct TileRounds {
    double rounds;
    bool split;
};

inline TileRounds whole_rounds(int64_t tiles, int multiprocessors) {
    return {static_cast<double>(div_up(tiles, multiprocessors)), false};
}

// By stream-K, with clusters of one block: of the tiles that would leave multiprocessors idle, together with
// a round before them, everybody gets the same number of steps of K, but at least 8.
inline TileRounds shared_rounds(int64_t tiles, int64_t steps, int multiprocessors) {
    constexpr int64_t kLeastSteps = 8;
    const int64_t full = tiles / multiprocessors, left = tiles % multiprocessors;
    if (left == 0 || 2 * left >= multiprocessors || steps <= kLeastSteps)
        return whole_rounds(tiles, multiprocessors);
    const int64_t before = std::max<int64_t>(full - 1, 0), shared = tiles - before * multiprocessors;
    const int64_t sharers = std::min<int64_t>(multiprocessors, shared * steps / kLeastSteps);
    return {static_cast<double>(before) + static_cast<double>(shared) / static_cast<double>(sharers), true};
}

// The K to tell CUTLASS 2 of int8 rows that are read in pieces of 16 bytes. Of its steps the first is the
// short one and the next begins where that ends: off 16 bytes, had K not been rounded up to whole pieces.
inline int64_t k_in_pieces(int64_t k) { return round_up(k, 16); }

} // namespace tautorch::cuda
