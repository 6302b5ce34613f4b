// Products of one SELL strip; see sell.h.
#pragma once

#include <cstdint>

namespace tautorch {

constexpr int kSellRows1 = 12, kSellRows4 = 6; // most rows of a tile for groups of 1 and of 4

// acc[r][16 * gs] (leading dimension ld) = rows[r] by the strip's slots, outputs in order. Rows are readable
// for 64 bytes past any slot's offset.
void sell_i8_avx512vbmi(int gs, const void *const *rows, int mr, const uint16_t *offset, int64_t slots,
                        const uint8_t *data, int32_t *acc, int64_t ld);

} // namespace tautorch
