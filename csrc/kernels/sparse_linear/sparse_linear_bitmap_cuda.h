// Unstructured int8 weights for few rows: a bit says where a weight is, and only what is kept is stored.
//
// A unit is 16 outputs by 64 of K. With g = lane / 4 and t = lane % 4, a lane owns outputs g and g + 8 and
// the 16 elements of K from 16 t on:
//   maps     uint32 [tiles of 16 outputs][steps of 64][lane]: output g in the lower half, g + 8 in the upper;
//            element i of 16 is bit 4 (i % 4) + i / 4, so that (half >> j) & 0x1111 are elements 4 j to 4 j +
//            3
//   offsets  uint32 [tiles x steps + 1]: where a unit's values start, in 16 bytes from values_off on
//   sums     int32 [n] of the weight's rows
//   values   int8: of each unit lane after lane, a lane's by output, then by element; units start on 16 bytes
// Outputs and elements that do not exist have no bit. Parts start on lines of 128 bytes.
#pragma once

#include "kernels/int8_linear/int8_linear_cuda.h"

namespace tautorch::cuda {

// X(name, tiles of 8 rows, warps that share K, stages)
#define TAUTORCH_SPARSE_LINEAR_BITMAP(X)                                                                     \
    X(bitmap_8, 1, 8, 5)                                                                                     \
    X(bitmap_16, 2, 8, 4)                                                                                    \
    X(bitmap_32, 4, 8, 3)

constexpr int kBitmapOutputs = 16, kBitmapStep = 64;
constexpr int64_t kBitmapMaps = 128;                        // bytes a unit
constexpr int kBitmapValues = kBitmapOutputs * kBitmapStep; // bytes of a unit at most: two pieces a lane

struct BitmapLayout {
    int64_t tiles, steps, offsets_off, sums_off, values_off;
};
inline BitmapLayout bitmap_layout(int64_t n, int64_t k) {
    BitmapLayout l{};
    l.tiles = div_up(n, kBitmapOutputs);
    l.steps = div_up(k, kBitmapStep);
    l.offsets_off = l.tiles * l.steps * kBitmapMaps;
    l.sums_off = l.offsets_off + round_up(4 * (l.tiles * l.steps + 1), kLine);
    l.values_off = l.sums_off + round_up(4 * n, kLine);
    return l;
}

} // namespace tautorch::cuda
