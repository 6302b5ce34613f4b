// What the native tests share: deterministic numbers, sha256, the quantiser written a second time, and a
// count of failures. Nothing here is shared with the product but the types its functions take.
#pragma once

#include "kernels/common/gemm.h"

#include <cstdint>
#include <string>
#include <vector>

namespace tautorch::tests {

// splitmix64, as tests/golden/quantizer_numpy.py has it.
std::vector<uint64_t> bits(int64_t count, uint64_t seed);
std::vector<int64_t> integers(int64_t count, int64_t low, int64_t high, uint64_t seed);
// [rows][per_row] in (-1, 1) times a power of two of each row.
std::vector<float> floats(int64_t rows, int64_t per_row, uint64_t seed);

// Hex sha256 of "<dtype>(<shape>)" and the bytes, every NaN counted as one.
std::string digest(const char *dtype, const std::vector<int64_t> &shape, const void *data, size_t bytes);
template <class T> std::string digest(const std::vector<int64_t> &shape, const std::vector<T> &v);

// A row of floats as the contract has it: q and scale (NaN where a value is not finite).
struct Row {
    std::vector<int64_t> q;
    float scale;
};
Row quantize_dynamic(const float *x, int64_t n);
Row quantize_static(const float *x, int64_t n, float scale, int32_t zero_point);

// Memory that ends where its page does, the next one being closed: a byte touched past the end is the end of
// the program, under an emulator and without sanitizers too. Aligned to 64 if n is a multiple of that.
struct Bytes {
    explicit Bytes(size_t n);
    Bytes(const void *from, size_t n);
    ~Bytes();
    Bytes(const Bytes &) = delete;
    Bytes &operator=(const Bytes &) = delete;
    uint8_t *data;
    size_t size;

  private:
    void *pages_;
    size_t length_;
};
template <class T> Bytes closed(const std::vector<T> &v) { return Bytes(v.data(), v.size() * sizeof(T)); }

// One line a group: what was compared, with which kernels; failures are printed as they come, the first few
// of each group.
class Group {
  public:
    explicit Group(std::string name) : name_(std::move(name)) {}
    ~Group();
    Group(const Group &) = delete;
    Group &operator=(const Group &) = delete;
    void ran(const Isa &isa);
    // Counts a comparison; `what` describes the case.
    void check(bool ok, const std::string &what);
    template <class T>
    void equal(const std::vector<T> &got, const std::vector<T> &want, const std::string &what);

  private:
    std::string name_, kernels_;
    int64_t checks_ = 0, failures_ = 0;
};
int64_t failures();

std::string describe(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Kernels this CPU runs.
std::vector<const Isa *> kernels();

} // namespace tautorch::tests
