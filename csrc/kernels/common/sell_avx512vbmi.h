// Products of one SELL strip; see sell.h.
#pragma once

#include "kernels/common/product_i8.h"

namespace tautorch {

constexpr int kSellRows1 = 12, kSellRows4 = 6; // most rows of a tile for groups of 1 and of 4

struct SellI8 : ToOutput {
    const void *const *rows; // readable for 64 bytes past any slot's offset
    int count;               // of rows, any number of tiles
    uint8_t flip;            // turns the top bit (0x80) of what they hold, or does not (0)
    int gs;                  // the strip has 16 * gs outputs
    const uint16_t *offset;  // [slots]
    int64_t slots;
    const uint8_t *data;
};

void sell_i8_avx512vbmi(const SellI8 &s);
// int8 output of the first rows, and how many these are: 0 where this is not the kernel for them.
int sell_codes_avx512vbmi(const SellI8 &s);

} // namespace tautorch
