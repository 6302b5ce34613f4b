#include "support.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <sys/mman.h>
#include <unistd.h>

namespace tautorch::tests {

std::vector<uint64_t> bits(int64_t count, uint64_t seed) {
    std::vector<uint64_t> out(static_cast<size_t>(count));
    for (size_t i = 0; i < out.size(); ++i) {
        uint64_t z = seed + (i + 1) * 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        out[i] = z ^ (z >> 31);
    }
    return out;
}

std::vector<int64_t> integers(int64_t count, int64_t low, int64_t high, uint64_t seed) {
    std::vector<int64_t> out;
    for (const uint64_t z : bits(count, seed))
        out.push_back(static_cast<int64_t>(z % static_cast<uint64_t>(high - low + 1)) + low);
    return out;
}

std::vector<float> floats(int64_t rows, int64_t per_row, uint64_t seed) {
    const auto mantissa = integers(rows * per_row, -(1 << 23) + 1, (1 << 23) - 1, seed);
    const auto exponent = integers(rows, -40, 10, seed + 1);
    std::vector<float> out;
    for (int64_t i = 0; i < rows * per_row; ++i)
        out.push_back(std::ldexp(static_cast<float>(mantissa[static_cast<size_t>(i)]),
                                 static_cast<int>(exponent[static_cast<size_t>(i / per_row)]) - 23));
    return out;
}

namespace {

std::string sha256(std::string text) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const uint64_t length = text.size() * 8;
    text += '\x80';
    while (text.size() % 64 != 56)
        text += '\0';
    for (int i = 56; i >= 0; i -= 8)
        text += static_cast<char>(length >> i);
    const auto turn = [](uint32_t x, int n) { return x >> n | x << (32 - n); };
    for (size_t at = 0; at < text.size(); at += 64) {
        uint32_t w[64];
        for (int i = 0; i < 16; ++i) {
            w[i] = 0;
            for (size_t j = 0; j < 4; ++j)
                w[i] = w[i] << 8 | static_cast<uint8_t>(text[at + 4 * static_cast<size_t>(i) + j]);
        }
        for (int i = 16; i < 64; ++i) {
            const uint32_t a = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3;
            const uint32_t b = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + a + w[i - 7] + b;
        }
        uint32_t v[8];
        std::copy(h, h + 8, v);
        for (int i = 0; i < 64; ++i) {
            const uint32_t s1 = turn(v[4], 6) ^ turn(v[4], 11) ^ turn(v[4], 25);
            const uint32_t t1 = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
            const uint32_t s0 = turn(v[0], 2) ^ turn(v[0], 13) ^ turn(v[0], 22);
            const uint32_t t2 = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            std::copy_backward(v, v + 7, v + 8);
            v[4] += t1;
            v[0] = t1 + t2;
        }
        for (int i = 0; i < 8; ++i)
            h[i] += v[i];
    }
    std::string hex;
    for (const uint32_t word : h)
        hex += describe("%08x", word);
    return hex;
}

} // namespace

std::string digest(const char *dtype, const std::vector<int64_t> &shape, const void *data, size_t bytes) {
    std::string text = dtype;
    text += '(';
    for (size_t i = 0; i < shape.size(); ++i)
        text += (i ? ", " : "") + std::to_string(shape[i]);
    text += shape.size() == 1 ? ",)" : ")";
    return sha256(text + std::string(static_cast<const char *>(data), bytes));
}
template <class T> std::string digest(const std::vector<int64_t> &shape, const std::vector<T> &v) {
    return digest(sizeof(T) == 1 ? "|i1" : "<i4", shape, v.data(), v.size() * sizeof(T));
}
template std::string digest(const std::vector<int64_t> &, const std::vector<int8_t> &);
template std::string digest(const std::vector<int64_t> &, const std::vector<int32_t> &);
template <> std::string digest(const std::vector<int64_t> &shape, const std::vector<float> &v) {
    std::vector<uint32_t> out(v.size());
    for (size_t i = 0; i < v.size(); ++i) {
        std::memcpy(&out[i], &v[i], 4);
        if (std::isnan(v[i]))
            out[i] = 0x7fc00000;
    }
    return digest("<f4", shape, out.data(), out.size() * 4);
}

Row quantize_dynamic(const float *x, int64_t n) {
    Row row{std::vector<int64_t>(static_cast<size_t>(n), 0), 1.0f};
    float amax = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        if (!std::isfinite(x[i])) {
            row.scale = std::numeric_limits<float>::quiet_NaN();
            return row;
        }
        amax = std::max(amax, std::fabs(x[i]));
    }
    if (amax < std::ldexp(1.0f, -100))
        return row;
    row.scale = amax / 127.0f;
    const float inv = 127.0f / amax;
    for (int64_t i = 0; i < n; ++i)
        row.q[static_cast<size_t>(i)] =
            std::clamp<int64_t>(static_cast<int64_t>(std::nearbyint(x[i] * inv)), -127, 127);
    return row;
}

Row quantize_static(const float *x, int64_t n, float scale, int32_t zero_point) {
    Row row{std::vector<int64_t>(static_cast<size_t>(n), zero_point), scale};
    for (int64_t i = 0; i < n; ++i)
        if (!std::isfinite(x[i])) {
            row.scale = std::numeric_limits<float>::quiet_NaN();
            return row;
        }
    const float inv = 1.0f / scale;
    for (int64_t i = 0; i < n; ++i) {
        const double q = static_cast<double>(std::nearbyint(x[i] * inv)) + zero_point;
        row.q[static_cast<size_t>(i)] = static_cast<int64_t>(std::clamp(q, -128.0, 127.0));
    }
    return row;
}

Bytes::Bytes(size_t n) : size(n) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t open = (n + page - 1) / page * page;
    length_ = open + page;
    pages_ = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages_ == MAP_FAILED)
        throw std::bad_alloc();
    uint8_t *end = static_cast<uint8_t *>(pages_) + open;
    if (mprotect(end, page, PROT_NONE) != 0)
        throw std::bad_alloc();
    data = end - n;
}
Bytes::Bytes(const void *from, size_t n) : Bytes(n) {
    if (n > 0)
        std::memcpy(data, from, n);
}
Bytes::~Bytes() { munmap(pages_, length_); }

namespace {
int64_t all_failures = 0;
}
int64_t failures() { return all_failures; }

Group::~Group() {
    if (checks_ == 0) {
        ++failures_;
        ++all_failures;
    }
    std::printf("%-28s %6lld comparisons, %lld failed  [%s]\n", name_.c_str(),
                static_cast<long long>(checks_), static_cast<long long>(failures_), kernels_.c_str());
    std::fflush(stdout);
}

void Group::ran(const Isa &isa) { kernels_ += (kernels_.empty() ? "" : " ") + std::string(isa.name); }

void Group::check(bool ok, const std::string &what) {
    ++checks_;
    if (ok)
        return;
    ++all_failures;
    if (++failures_ <= 5)
        std::printf("FAILED %s: %s\n", name_.c_str(), what.c_str());
}

namespace {
template <class T> bool same(T a, T b) { return a == b || (a != a && b != b); }
} // namespace

template <class T>
void Group::equal(const std::vector<T> &got, const std::vector<T> &want, const std::string &what) {
    if (got.size() != want.size())
        return check(false, what + ": sizes differ");
    for (size_t i = 0; i < got.size(); ++i)
        if (!same(got[i], want[i]))
            return check(false, what + describe(": [%zu] is %.9g, not %.9g", i, static_cast<double>(got[i]),
                                                static_cast<double>(want[i])));
    check(true, what);
}
template void Group::equal(const std::vector<int32_t> &, const std::vector<int32_t> &, const std::string &);
template void Group::equal(const std::vector<int8_t> &, const std::vector<int8_t> &, const std::string &);
template void Group::equal(const std::vector<float> &, const std::vector<float> &, const std::string &);
template void Group::equal(const std::vector<uint16_t> &, const std::vector<uint16_t> &, const std::string &);

std::string describe(const char *format, ...) {
    char text[256];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return text;
}

std::vector<const Isa *> kernels() {
    std::vector<const Isa *> out;
    int count = 0;
    const IsaEntry *table = isa_table(&count);
    for (int i = 0; i < count; ++i)
        if (table[i].supported)
            out.push_back(table[i].isa);
    return out;
}

} // namespace tautorch::tests
