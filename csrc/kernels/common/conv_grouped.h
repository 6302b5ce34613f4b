// Convolutions in groups of few channels: no product with the zeros that a pack has between groups.
#pragma once

#include "kernels/common/conv_image.h"

namespace tautorch {

// Weights of every group of a pack, without what is 0 because it lies between the groups that were packed
// together. Which inputs an output sees is read off the pack: it holds no other trace of them.
class GroupedWeights {
  public:
    // False where the pack is not one of small groups, or this instruction set has no kernel for them. The
    // weights live in scratch of the calling thread.
    bool prepare(const Isa &isa, const uint8_t *packed);
    // Outputs of pixels [m0, m0 + rows), taps at these distances from a pixel's first.
    void run(const ConvBand &band, int64_t m0, int rows, const int64_t *taps, const float *scale,
             const Output &out) const;

  private:
    void row(const ConvBand &band, int64_t m, int n, int64_t group, const int64_t *taps, GroupedI8 &to) const;

    const Isa *isa_ = nullptr;
    const PackHeader *h_ = nullptr;
    GroupedI8 *groups_ = nullptr; // [groups], product not filled in but for panel
};

} // namespace tautorch
