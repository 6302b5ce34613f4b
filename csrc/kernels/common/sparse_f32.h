// Sparse float weights: their blocked pack and their product.
//
// A panel of 64 rows of x is 256 bytes an input: at K = 1024 it fills a quarter of L2, and entries that pick
// inputs at random wait for it. So entries are sorted by block of inputs, whose part of the panel stays in L1
// (128 inputs, 32 KB) while all outputs of a tile run over it; their accumulators wait in memory. Within a
// block outputs come in the order of how many entries they have there: the loop over entries then ends where
// the branch predictor expects.
#pragma once

#include "kernels/common/pack.h"
#include "kernels/common/source.h"

namespace tautorch {

// Blocks of a sparse_f32 pack: conv group after conv group, tile after tile, block of inputs after block.
// Block i has the entries start[i] .. start[i + 1] and one segment for each sparse group of its tile:
// entries << shift | group within the tile.
struct F32Blocks {
    explicit F32Blocks(const PackHeader &h);
    int64_t per_group; // sparse groups of a convolution group
    int64_t tile;      // of them in a tile
    int64_t tiles;     // tiles of a convolution group
    int64_t inputs;    // taps * k
    int64_t width;     // inputs of a block; the last may have fewer
    int64_t steps;     // blocks along the inputs
    int64_t blocks;    // in all
    int64_t segments;  // in all
    int shift;
    int index_bytes; // indices count from the block's first input: uint8 where gs is 1, uint16 where it is 4
    int64_t segment_off;

    int64_t block(int64_t group, int64_t t, int64_t step) const { return (group * tiles + t) * steps + step; }
    int64_t groups_in(int64_t t) const { return tile * (t + 1) <= per_group ? tile : per_group - tile * t; }
    int64_t first_segment(int64_t group, int64_t t, int64_t step) const {
        return (group * per_group + t * tile) * steps + step * groups_in(t);
    }
};

// Fills in blocks, index_off, data_off and total of a header that has start_off.
void sparse_f32_layout(PackHeader &h);
// out is zeroed and has its header.
void sparse_f32_pack(const PackHeader &h, const SparseEntries &e, uint8_t *out);
// sparse_unpack of such a pack.
int64_t sparse_f32_unpack(const uint8_t *packed, uint32_t *start, uint16_t *index, float *values);
// Whether the lists stay within the pack and the inputs.
bool sparse_f32_consistent(const uint8_t *packed);

void sparse_f32_product(const Isa &isa, const uint8_t *packed, const Source &x, const Output &out);

} // namespace tautorch
