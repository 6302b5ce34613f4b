// A row of floats times int8 weights by integer products.
//
// The row's large elements become integers of one power of two, exactly: those within 2^-7 of the largest
// have no bit below it. Each integer is four signed digits of 8 bits, and vpdpbusd sums every digit exactly.
// What is smaller is left to float multiply-adds; rows of which an eighth is so small are floats as a whole.
// So no element loses precision, however the weights are: the sums' conversion and addition round by less
// than 4 * 2^-23 * sum |x||w|, the small elements' as floats do.
#pragma once

#include <cstdint>

namespace tautorch {

struct DigitRow {
    const float *x;
    const int8_t *digits; // [k / 4][4 digits][4 inputs], digit 0 the lowest
    float unit;           // x = unit * sum of digit d * 256^d
    int32_t offset[4];    // 128 * sum of each digit
    const int32_t *small; // inputs that are not in digits
    int32_t smalls;
};

constexpr int64_t kMostDigitInputs = 65536; // 255 * 128 * k < 2^31
// Bytes of digits and entries of `small` that a row of k needs.
inline int64_t digit_bytes(int64_t k) { return (k + 15) / 16 * 64; }
inline int64_t most_smalls(int64_t k) { return k / 8 + 3; }

// False if the row is not finite, has more small elements than pay, or is of a size next to the ends of
// float.
bool digit_row_avx512vnni(const float *x, int64_t k, int8_t *digits, int32_t *small, DigitRow &row);
// out[64] = the row times a panel [k][64] of a dense_w8 pack.
void digit_product_avx512vnni(const DigitRow &row, int64_t k, const int8_t *panel, float *out);

} // namespace tautorch
