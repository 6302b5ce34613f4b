// Convolutions in groups of 4, 8 or 16 channels, as many inputs as outputs: 16 channels at a time.
//
// A pixel's 16 bytes go to all four 128-bit lanes of a vector, by a load alone. Lane j, dword d then is quad
// d % quads of group d / quads of these channels, and meets output 4 v + j of that group's: `quads` products
// for 16 outputs, none of them with a zero. The quads' sums are added at the end.
// Weights: [channels / 16][tap][v < quads][j][d][4 inputs], zeros past the last channel.
#pragma once

#include "kernels/common/pack.h"

namespace tautorch {

constexpr int kGroupedBlock = 16; // channels
constexpr int64_t kMostGroupedTaps = 64;

inline int64_t grouped_blocks(const PackHeader &h) { return div_up(h.groups * h.n, kGroupedBlock); }
inline int64_t grouped_bytes(const PackHeader &h) { // of a block
    return h.taps * h.n * kGroupedBlock;
}
// Where weight (group, output, input, tap) is.
inline int64_t grouped_at(const PackHeader &h, int64_t g, int64_t n, int64_t k, int64_t t) {
    const int64_t quads = h.n / 4, channel = g * h.n, d = channel % kGroupedBlock / 4 + k / 4;
    return (((channel / kGroupedBlock * h.taps + t) * quads + n / 4) * 16 + n % 4 * 4 + d) * 4 + k % 4;
}
// Whether a kernel has this form for groups of n outputs and k inputs.
inline bool grouped_fits(const Isa &isa, int64_t groups, int64_t n, int64_t k, int64_t taps) {
    return isa.grouped_i8 && groups > 1 && n == k && (n == 4 || n == 8 || n == 16) &&
           taps <= kMostGroupedTaps;
}

} // namespace tautorch
