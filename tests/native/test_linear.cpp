// int8_linear: every kernel through its own packing, against sums in int64.
#include "groups.h"
#include "layers.h"

#include "kernels/int8_linear/int8_linear.h"

#include <cmath>

namespace tautorch::tests {
namespace {

struct Size {
    int64_t m, n, k;
};

// Around every tile (4, 6, 8, 12 rows; 16, 48, 64 outputs; 4, 8, 16 inputs), primes, and the block of 192
// rows.
std::vector<Size> sizes() {
    std::vector<Size> s;
    for (const int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13})
        for (const int64_t n : {1, 3, 4, 5, 8, 12, 13, 16, 17, 31, 64, 71})
            s.push_back({m, n, 37});
    for (const int64_t k :
         {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 48, 64, 65, 127, 257, 1031})
        for (const int64_t m : {1, 2, 6, 7})
            s.push_back({m, 21, k});
    for (const int64_t m : {47, 48, 49, 97, 193})
        s.push_back({m, 18, 20});
    return s;
}

std::vector<float> scales(int64_t n, uint64_t seed) {
    std::vector<float> out;
    for (const int64_t i : integers(n, 1, 1 << 20, seed))
        out.push_back(static_cast<float>(i) * 0x1p-24f);
    return out;
}
std::vector<float> biases(int64_t n, uint64_t seed) {
    std::vector<float> out;
    for (const int64_t i : integers(n, -(1 << 16), 1 << 16, seed))
        out.push_back(static_cast<float>(i) * 0x1p-6f);
    return out;
}

// Codes or weights of which two in three are at an end, -128 far more often: pairs of it too.
std::vector<int64_t> extremes(int64_t count, uint64_t seed) {
    std::vector<int64_t> v = integers(count, -128, 127, seed);
    for (size_t i = 0; i < v.size(); ++i)
        if (i % 3 != 0)
            v[i] = i % 7 < 5 ? -128 : 127;
    return v;
}

} // namespace

void test_int8_linear() {
    Group raw("int8_linear, int8 in"), dynamic("int8_linear, dynamic"), fixed("int8_linear, static"),
        out("int8_linear, int8/bf16 out");
    for (const Isa *isa : kernels()) {
        for (Group *g : {&raw, &dynamic, &fixed, &out})
            g->ran(*isa);
        uint64_t seed = 1;
        for (const auto [m, n, k] : sizes()) {
            seed += 10;
            const std::string what =
                describe("%s m %lld n %lld k %lld", isa->name, (long long)m, (long long)n, (long long)k);
            // Weights of -128 too: nothing that quantises makes them, but the functional form takes them.
            const auto w = integers(n * k, -128, 127, seed);
            const auto w8 = as<int8_t>(w);
            const Packed packed = pack_dense(*isa, PackKind::dense_i8, 1, n, k, 1, w8.data(), {k, 1, 0});
            raw.check(header_of(packed->data).isa == isa->id, what + " is packed for another kernel");

            const auto q = integers(m * k, -127, 127, seed + 1);
            const auto q8 = as<int8_t>(q);
            const std::vector<float> one = {1.0f};
            raw.equal(run_linear<int32_t>(int8_linear, *packed, given_quant(one, 0), q8.data(), k, m, n, {}),
                      matmul(q, w, m, n, k), what);
            const auto we = extremes(n * k, seed), qe = extremes(m * k, seed + 1);
            const Packed at_ends =
                pack_dense(*isa, PackKind::dense_i8, 1, n, k, 1, as<int8_t>(we).data(), {k, 1, 0});
            raw.equal(run_linear<int32_t>(int8_linear, *at_ends, given_quant(one, 0), as<int8_t>(qe).data(),
                                          k, m, n, {}),
                      matmul(qe, we, m, n, k), what + " at the ends");
            std::vector<int64_t> centred = q;
            for (int64_t &v : centred)
                v += 5;
            raw.equal(run_linear<int32_t>(int8_linear, *packed, given_quant(one, -5), q8.data(), k, m, n, {}),
                      matmul(centred, w, m, n, k), what + " zero point -5");

            if (k == 0)
                continue;
            // Rows one float further apart than they are long.
            const int64_t stride = k + 1;
            const auto x = floats(m, stride, seed + 2);
            std::vector<int64_t> qd, qs;
            std::vector<float> rows;
            for (int64_t i = 0; i < m; ++i) {
                const Row d = quantize_dynamic(x.data() + i * stride, k);
                const Row s = quantize_static(x.data() + i * stride, k, 0.0073f, -11);
                qd.insert(qd.end(), d.q.begin(), d.q.end());
                for (const int64_t v : s.q)
                    qs.push_back(v + 11);
                rows.push_back(d.scale);
            }
            const auto sums = matmul(qd, w, m, n, k);
            dynamic.equal(
                run_linear<int32_t>(int8_linear, *packed, dynamic_quant(), x.data(), stride, m, n, {}), sums,
                what);
            fixed.equal(run_linear<int32_t>(int8_linear, *packed, static_quant(0.0073f, -11), x.data(),
                                            stride, m, n, {}),
                        matmul(qs, w, m, n, k), what);

            // The epilogue multiplies and adds one step after another: floats agree bit for bit.
            Tail tail;
            tail.dtype = DType::f32;
            tail.w_scale = scales(n, seed + 3);
            tail.bias = biases(n, seed + 4);
            tail.activation = seed % 4 == 1 ? Activation::relu : Activation::none;
            std::vector<float> y;
            std::vector<int8_t> codes;
            std::vector<uint16_t> halves;
            tail.out_scale = 3.7f;
            tail.out_zero_point = 9;
            for (int64_t i = 0; i < m; ++i)
                for (int64_t j = 0; j < n; ++j) {
                    const auto at = static_cast<size_t>(i * n + j);
                    y.push_back(tail.value(sums[at], rows[static_cast<size_t>(i)], j));
                    codes.push_back(tail.code(y.back()));
                    halves.push_back(bf16_of(y.back()));
                }
            dynamic.equal(
                run_linear<float>(int8_linear, *packed, dynamic_quant(), x.data(), stride, m, n, tail), y,
                what + " f32");
            tail.dtype = DType::i8;
            out.equal(run_linear<int8_t>(int8_linear, *packed, dynamic_quant(), x.data(), stride, m, n, tail),
                      codes, what + " int8");
            tail.dtype = DType::bf16;
            out.equal(
                run_linear<uint16_t>(int8_linear, *packed, dynamic_quant(), x.data(), stride, m, n, tail),
                halves, what + " bf16");
        }
    }
}

// As many inputs as there may be, all of them at an end: the largest sums of either sign.
void test_longest_rows() {
    Group group("int8_linear, longest rows");
    const int64_t n = 5, k = kMaxK;
    for (const Isa *isa : kernels()) {
        group.ran(*isa);
        for (const int wv : {-128, -127, 127}) {
            const std::vector<int8_t> w8(static_cast<size_t>(n * k), static_cast<int8_t>(wv));
            const Packed packed = pack_dense(*isa, PackKind::dense_i8, 1, n, k, 1, w8.data(), {k, 1, 0});
            for (const int64_t m : {1, 2, 3, 7})
                for (const int xv : {-128, -127, 127}) {
                    const std::vector<int8_t> x8(static_cast<size_t>(m * k), static_cast<int8_t>(xv));
                    const std::vector<float> one = {1.0f};
                    group.equal(
                        run_linear<int32_t>(int8_linear, *packed, given_quant(one, 0), x8.data(), k, m, n,
                                            {}),
                        std::vector<int32_t>(static_cast<size_t>(m * n), static_cast<int32_t>(k * xv * wv)),
                        describe("%s m %lld, %d by %d", isa->name, (long long)m, xv, wv));
                }
        }
    }
}

void test_special_rows() {
    Group group("rows of NaN, Inf, nothing");
    for (const Isa *isa : kernels()) {
        group.ran(*isa);
        const int64_t m = 6, n = 9, k = 37;
        auto x = floats(m, k, 5);
        x[1 * k + 36] = NAN;
        x[2 * k + 3] = -INFINITY;
        for (int64_t i = 0; i < k; ++i) {
            x[static_cast<size_t>(3 * k + i)] = -0.0f;
            x[static_cast<size_t>(4 * k + i)] *= 0x1p-110f;
        }
        const auto w = integers(n * k, -127, 127, 6);
        const auto w8 = as<int8_t>(w);
        const Packed packed = pack_dense(*isa, PackKind::dense_i8, 1, n, k, 1, w8.data(), {k, 1, 0});
        for (const bool is_static : {false, true}) {
            std::vector<float> y;
            for (int64_t i = 0; i < m; ++i) {
                const Row r = is_static ? quantize_static(x.data() + i * k, k, 0.5f, 3)
                                        : quantize_dynamic(x.data() + i * k, k);
                std::vector<int64_t> q = r.q;
                for (int64_t &v : q)
                    v -= is_static ? 3 : 0;
                for (const int32_t sum : matmul(q, w, 1, n, k))
                    y.push_back(static_cast<float>(sum) * r.scale);
            }
            Tail tail;
            tail.dtype = DType::f32;
            const ActQuant quant = is_static ? static_quant(0.5f, 3) : dynamic_quant();
            group.equal(run_linear<float>(int8_linear, *packed, quant, x.data(), k, m, n, tail), y,
                        describe("%s %s", isa->name, is_static ? "static" : "dynamic"));
            tail.dtype = DType::i8; // NaN becomes the zero point
            tail.out_scale = 0.9f;
            tail.out_zero_point = -7;
            std::vector<int8_t> codes;
            for (const float v : y)
                codes.push_back(tail.code(v));
            group.equal(run_linear<int8_t>(int8_linear, *packed, quant, x.data(), k, m, n, tail), codes,
                        describe("%s %s int8", isa->name, is_static ? "static" : "dynamic"));
        }
    }
}

void test_weight_only() {
    Group group("int8_linear, weight-only");
    for (const Isa *isa : kernels()) {
        group.ran(*isa);
        for (const auto [m, n, k] : {Size{1, 1, 1},
                                     {1, 64, 64},
                                     {1, 70, 257},
                                     {2, 130, 300},
                                     {4, 64, 1031},
                                     {5, 17, 31},
                                     {7, 65, 33},
                                     {13, 12, 5},
                                     {50, 16, 260},
                                     {3, 4, 0}}) {
            const auto w = integers(n * k, -128, 127, 21);
            const auto w8 = as<int8_t>(w);
            const Packed packed = pack_dense(*isa, PackKind::dense_w8, 1, n, k, 1, w8.data(), {k, 1, 0});
            const auto x = floats(m, std::max<int64_t>(k, 1), 22);
            Tail tail;
            tail.dtype = DType::f32;
            tail.w_scale = scales(n, 23);
            tail.bias = biases(n, 24);
            ActQuant quant;
            quant.mode = ActQuant::none;
            const auto y = run_linear<float>(int8_linear, *packed, quant, x.data(), k, m, n, tail);
            for (int64_t i = 0; i < m; ++i)
                for (int64_t j = 0; j < n; ++j) {
                    double sum = 0, size = 0;
                    for (int64_t l = 0; l < k; ++l) {
                        const double term = static_cast<double>(x[static_cast<size_t>(i * k + l)]) *
                                            static_cast<double>(w[static_cast<size_t>(j * k + l)]);
                        sum += term;
                        size += std::fabs(term);
                    }
                    const double scale = tail.w_scale[static_cast<size_t>(j)],
                                 bias = tail.bias[static_cast<size_t>(j)];
                    // A sum of k rounded products, then a product and a sum.
                    const double bound =
                        0x1p-23 * ((static_cast<double>(k) / 2 + 6) * size * scale + std::fabs(bias));
                    const double got = y[static_cast<size_t>(i * n + j)];
                    group.check(std::fabs(got - (sum * scale + bias)) <= bound,
                                describe("%s m %lld n %lld k %lld at %lld %lld: %.9g, not %.9g", isa->name,
                                         (long long)m, (long long)n, (long long)k, (long long)i, (long long)j,
                                         got, sum * scale + bias));
                }
        }
    }
}

} // namespace tautorch::tests
