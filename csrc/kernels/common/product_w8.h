// A row of floats times int8 weights by integer products.
//
// The row's elements become integers of one power of two, each of them two or three signed digits of 8 bits,
// and the kernel of bytes sums every digit exactly. Elements that do not fit (below) stay apart and are
// multiplied as floats; rows with more than an eighth of these are floats as a whole. The sums' conversion
// and addition round by less than 4 * 2^-23 * S, S = sum |x||w|.
//
// - bfloat16 and float16 (8 and 11 significant bits) lose nothing: elements with bits below the unit, or
//   beyond the digits, are the ones apart. bfloat16 takes two digits where at most a sixteenth are.
// - float32 rounds to three digits, which reach 2^23: by at most u = 1.004 * 2^-23 of the largest element.
//   Elements below 2 / k of the largest stay apart, so that the row's roundings are at most k * 2^-24 * S
//   whatever the weights are: a float sum's own bound. As they are independent of each other, they add up to
//   about u / sqrt(3) * |w|_2, and S is about mean |x| * |w|_1. Where the largest element, those beyond
//   staying apart, is at most kSpread * mean |x| * |w|_1 / |w|_2, that is kSpread / sqrt(3) * 2^-23 * S at
//   most; float sums of 64 to 4096 inputs had 0.20 to 0.26, as the root mean square of Gaussian rows. A pack
//   knows its panels' effective inputs, (|w|_1 / |w|_2)^2. Rows are made for a quarter of k (64 % are those
//   of Gaussian weights); panels with fewer than a row needs are multiplied as floats.
#pragma once

#include <cstdint>

namespace tautorch {

struct DigitRow {
    const float *x;
    const int8_t *data;   // the digits, as the kernel takes them
    int digits;           // 2 or 3
    float unit;           // x = unit * sum of digit d * 256^d
    int32_t offset[3];    // avx512vnni: 128 * sum of each digit
    const int32_t *apart; // inputs that are not in digits
    int32_t count;        // of them
    float needs;          // effective inputs
};

constexpr int64_t kLeastDigitInputs = 64, kMostDigitInputs = 65536; // 255 * 128 * k < 2^31
// Bytes of digits and entries of `apart` that a row of k needs.
inline int64_t digit_bytes(int64_t k) { return (k + 15) / 16 * 48 + 64; }
inline int64_t most_apart(int64_t k) { return k / 8 + 3; }

struct DigitKernels {
    int64_t most_rows; // of a whole product: floats are faster for more
    int at_once;       // rows times digits, at most
    int least_width;   // of panels
    // x: of `significant` bits. False if the row is not finite, has more elements apart than pay, or is of a
    // size next to the ends of float.
    bool (*row)(const float *x, int64_t k, int significant, int8_t *data, int32_t *apart, DigitRow &row);
    // out[r][n] (rows of kTileN) = one row, or two of as many digits, times a panel of a dense_w8 pack. All
    // kernels round alike: the highest digit's sum as a float, times 256 plus the next in one rounding, and
    // so on; times the unit; plus the sum of what stays apart.
    void (*product)(const DigitRow *rows, int count, int64_t k, const int8_t *panel, int width, float *out);
};
extern const DigitKernels digits_avx512vnni;

} // namespace tautorch
