// 2:4 int8 weights: two of each four inputs kept, as values and 2-bit places, 0.625 of the dense bytes.
//
// A strip is 32 outputs, the last filled up with zeros; a step is 32 inputs: [2 x 16 outputs] of 64 bytes of
// places, then [octet of inputs][2 x 16 outputs] of 64 bytes of values. Of an output's four bytes of values
// two are of the first quad of the octet and two of the second; the places of value j are in byte j of its
// four, at bits 2 o and 2 o + 1 for octet o. Any bytes are a legal pack: no place leaves its quad.
#pragma once

#include "kernels/common/pack.h"
#include "kernels/common/strip_i8.h"

namespace tautorch {

constexpr int64_t kPairStep = 320 * (kPairOutputs / 16); // bytes

inline int64_t pair_steps(const PackHeader &h) { return div_up(h.k, kPairInputs); }
inline int64_t pair_bytes(const PackHeader &h) {
    return div_up(h.n, kPairOutputs) * pair_steps(h) * kPairStep;
}

// Whether this kernel runs it, and fills it well enough to beat a dense pack.
bool pairs_pay(const Isa &isa, int64_t n, int64_t k);
// Whether no quad of inputs of w [n][k] has more than two weights.
bool fits_pairs(int64_t n, int64_t k, const int8_t *w, WeightStrides s);
void pairs_pack(const PackHeader &h, const int8_t *w, WeightStrides s, uint8_t *out);
void pairs_unpack(const uint8_t *packed, int8_t *w, WeightStrides s);

} // namespace tautorch
