// sparse_linear: lists, blocks and float values, through the real packing.
#include "groups.h"
#include "layers.h"

#include "kernels/lowrank_linear/lowrank_linear.h"
#include "kernels/sparse_linear/sparse_linear.h"

#include <cmath>

namespace tautorch::tests {
namespace {

// Blocks of height x width, about one in `one_in` kept; height 1 and 4 are the groups of a list.
std::vector<bool> mask(int64_t n, int64_t k, int64_t height, int64_t width, int64_t one_in, uint64_t seed) {
    const int64_t across = div_up(k, width);
    const auto drawn = integers(div_up(n, height) * across, 0, one_in - 1, seed);
    std::vector<bool> keep;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j)
            keep.push_back(drawn[static_cast<size_t>(i / height * across + j / width)] == 0);
    return keep;
}

struct Case {
    int64_t m, n, k, height, width, one_in;
};

const std::vector<Case> &cases() {
    static const std::vector<Case> all = [] {
        std::vector<Case> c;
        for (const int64_t m : {1, 2, 3, 4, 5, 15, 16, 17, 33, 49, 64, 65, 100})
            for (const int64_t h : {1, 4})
                c.push_back({m, 23, 70, h, 1, 3});
        for (const int64_t k : {1, 3, 4, 5, 16, 17, 63, 511, 513, 1100})
            for (const int64_t h : {1, 4})
                for (const int64_t m : {1, 20})
                    c.push_back({m, 9, k, h, 1, 2});
        for (const int64_t b : {16, 32, 64})
            for (const int64_t m : {1, 5, 12, 13, 40})
                c.push_back({m, 70, 131, b, b, 2});
        for (const int64_t h : {1, 4}) {
            c.push_back({7, 40, 4200, h, 1, 25});     // long lists of few inputs
            c.push_back({7, 130, 40, h, 1, 1 << 20}); // nothing kept
            c.push_back({0, 8, 8, h, 1, 2});
        }
        return c;
    }();
    return all;
}

} // namespace

void test_sparse_linear() {
    Group group("sparse_linear, int8");
    for (const Isa *isa : kernels()) {
        group.ran(*isa);
        uint64_t seed = 40;
        for (const auto [m, n, k, height, width, one_in] : cases()) {
            seed += 10;
            const int gs = height == 1 ? 1 : 4;
            const auto keep = mask(n, k, height, width, one_in, seed);
            auto w = integers(n * k, -128, 127, seed + 1);
            for (size_t i = 0; i < w.size(); ++i)
                w[i] = keep[i] ? w[i] : 0;
            const auto q = integers(m * k, -128, 127, seed + 2);
            const auto q8 = as<int8_t>(q);
            const std::vector<float> one = {1.0f};
            for (const SparseForm form : {SparseForm::automatic, SparseForm::lists, SparseForm::both}) {
                const Packed packed = pack_sparse(*isa, gs, 1, n, k, 1, as<int8_t>(w), keep, form);
                const std::string what = describe("%s m %lld n %lld k %lld %lldx%lld form %d", isa->name,
                                                  (long long)m, (long long)n, (long long)k, (long long)height,
                                                  (long long)width, static_cast<int>(form));
                group.check(header_of(packed->data).isa == isa->id, what + " is packed for another kernel");
                group.equal(
                    run_linear<int32_t>(sparse_linear, *packed, given_quant(one, 0), q8.data(), k, m, n, {}),
                    matmul(q, w, m, n, k), what);
            }
            if (m == 0)
                continue;
            // Floats in and out, scaled; every row has a scale of its own.
            const Packed packed = pack_sparse(*isa, gs, 1, n, k, 1, as<int8_t>(w), keep);
            const auto x = floats(m, k, seed + 3);
            Tail tail;
            tail.dtype = DType::f32;
            tail.activation = seed % 20 == 0 ? Activation::relu : Activation::none;
            for (const int64_t i : integers(n, 1, 1 << 20, seed + 4)) {
                tail.w_scale.push_back(static_cast<float>(i) * 0x1p-20f);
                tail.bias.push_back(static_cast<float>(i % 1001 - 500));
            }
            std::vector<float> y;
            for (int64_t i = 0; i < m; ++i) {
                const Row r = quantize_dynamic(x.data() + i * k, k);
                const auto sums = matmul(r.q, w, 1, n, k);
                for (int64_t j = 0; j < n; ++j)
                    y.push_back(tail.value(sums[static_cast<size_t>(j)], r.scale, j));
            }
            group.equal(run_linear<float>(sparse_linear, *packed, dynamic_quant(), x.data(), k, m, n, tail),
                        y,
                        describe("%s dynamic m %lld n %lld k %lld %lldx%lld", isa->name, (long long)m,
                                 (long long)n, (long long)k, (long long)height, (long long)width));
        }
    }
}

void test_sparse_float() {
    Group group("sparse_linear, float");
    for (const Isa *isa : kernels()) {
        group.ran(*isa);
        uint64_t seed = 4000;
        for (const auto [m, n, k, height, width, one_in] : cases()) {
            seed += 10;
            const auto keep = mask(n, k, height, width, one_in, seed);
            // Small integers as floats: sums are exact whatever their order, so nothing hides in a tolerance.
            auto w = integers(n * k, -100, 100, seed + 1);
            std::vector<float> wf;
            for (size_t i = 0; i < w.size(); ++i) {
                w[i] = keep[i] ? w[i] : 0;
                wf.push_back(static_cast<float>(w[i]));
            }
            const auto q = integers(m * k, -50, 50, seed + 2);
            const auto x = as<float>(q);
            const Packed packed = pack_sparse(*isa, height == 1 ? 1 : 4, 1, n, k, 1, wf, keep);
            ActQuant none;
            none.mode = ActQuant::none;
            Tail tail;
            tail.dtype = DType::f32;
            const auto sums = matmul(q, w, m, n, k);
            group.equal(run_linear<float>(sparse_linear, *packed, none, x.data(), k, m, n, tail),
                        std::vector<float>(sums.begin(), sums.end()),
                        describe("%s m %lld n %lld k %lld %lldx%lld", isa->name, (long long)m, (long long)n,
                                 (long long)k, (long long)height, (long long)width));
        }
    }
}

void test_lowrank() {
    Group group("lowrank_linear, int8"), plain("lowrank_linear, float");
    struct Size {
        int64_t m, n, k, r;
    };
    for (const Isa *isa : kernels()) {
        group.ran(*isa);
        plain.ran(*isa);
        for (const auto [m, n, k, r] : {Size{1, 5, 7, 1},
                                        {1, 70, 131, 24},
                                        {6, 33, 64, 16},
                                        {7, 17, 100, 17},
                                        {50, 64, 48, 8},
                                        {193, 20, 30, 5}}) {
            const std::string what = describe("%s m %lld n %lld k %lld r %lld", isa->name, (long long)m,
                                              (long long)n, (long long)k, (long long)r);
            const auto down = integers(r * k, -127, 127, 61), up = integers(n * r, -127, 127, 62);
            const auto down8 = as<int8_t>(down), up8 = as<int8_t>(up);
            std::vector<float> down_scale;
            for (const int64_t i : integers(r, 1, 1 << 20, 63))
                down_scale.push_back(static_cast<float>(i) * 0x1p-22f);
            const auto x = floats(m, k, 64);
            std::vector<int32_t> want;
            for (int64_t i = 0; i < m; ++i) {
                const Row row = quantize_dynamic(x.data() + i * k, k);
                const auto sums = matmul(row.q, down, 1, r, k);
                std::vector<float> inner;
                for (int64_t j = 0; j < r; ++j)
                    inner.push_back(static_cast<float>(sums[static_cast<size_t>(j)]) * row.scale *
                                    down_scale[static_cast<size_t>(j)]);
                const auto part = matmul(quantize_dynamic(inner.data(), r).q, up, 1, n, r);
                want.insert(want.end(), part.begin(), part.end());
            }
            const Packed pd = pack_dense(*isa, PackKind::dense_i8, 1, r, k, 1, down8.data(), {k, 1, 0});
            const Packed pu = pack_dense(*isa, PackKind::dense_i8, 1, n, r, 1, up8.data(), {r, 1, 0});
            std::vector<int32_t> y(static_cast<size_t>(m * n));
            LowRankLinearArgs a;
            a.m = m;
            const Bytes in = closed(x);
            a.x = in.data;
            a.x_stride = k;
            a.packed = pd->data;
            a.up = pu->data;
            a.down_scale = down_scale.data();
            a.out.epilogue = Tail().epilogue();
            a.out.data = y.data();
            a.out.row_stride = n;
            lowrank_linear(a);
            group.equal(y, want, what);

            // Small integers as floats: exact, as above.
            std::vector<float> df, uf, xf;
            std::vector<int64_t> di, ui, xi = integers(m * k, -3, 3, 65);
            for (const int64_t v : down) {
                di.push_back(v % 5);
                df.push_back(static_cast<float>(v % 5));
            }
            for (const int64_t v : up) {
                ui.push_back(v % 7);
                uf.push_back(static_cast<float>(v % 7));
            }
            for (const int64_t v : xi)
                xf.push_back(static_cast<float>(v));
            const auto inner = matmul(xi, di, m, r, k);
            const auto sums = matmul({inner.begin(), inner.end()}, ui, m, n, r);
            const Packed fd = pack_dense(*isa, PackKind::dense_f32, 1, r, k, 1, df.data(), {k, 1, 0});
            const Packed fu = pack_dense(*isa, PackKind::dense_f32, 1, n, r, 1, uf.data(), {r, 1, 0});
            std::vector<float> yf(static_cast<size_t>(m * n));
            const Bytes in_floats = closed(xf);
            a.x = in_floats.data;
            a.quant.mode = ActQuant::none;
            a.packed = fd->data;
            a.up = fu->data;
            a.down_scale = nullptr;
            a.out.epilogue.out_dtype = DType::f32;
            a.out.data = yf.data();
            lowrank_linear(a);
            plain.equal(yf, std::vector<float>(sums.begin(), sums.end()), what);
        }
    }
}

} // namespace tautorch::tests
