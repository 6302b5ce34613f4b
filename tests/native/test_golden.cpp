// The committed hashes (tests/golden/golden.json) of q, scales, accumulators and weight-only products: the
// same numbers as numpy, the Python tests and every other machine.
#include "groups.h"
#include "layers.h"

#include "kernels/common/pairs.h"
#include "kernels/int8_conv2d/int8_conv2d.h"
#include "kernels/int8_linear/int8_linear.h"
#include "kernels/lowrank_conv2d/lowrank_conv2d.h"
#include "kernels/lowrank_linear/lowrank_linear.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"
#include "kernels/sparse_linear/sparse_linear.h"

#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>

namespace tautorch::tests {
namespace {

constexpr float kStaticScale = 0.0073f;
constexpr int32_t kZeroPoint = -11;

class Committed {
  public:
    explicit Committed(const std::string &file) {
        std::ifstream in(file);
        text_.assign(std::istreambuf_iterator<char>(in), {});
    }
    // The hash of an output of a case; empty if there is none.
    std::string find(const std::string &name, const std::string &output) const {
        const size_t at = text_.find("\"" + name + "\": {"), end = text_.find('}', at);
        const std::string key = "\"" + output + "\": \"";
        const size_t value = at == std::string::npos ? at : text_.find(key, at);
        return value == std::string::npos || value > end ? "" : text_.substr(value + key.size(), 64);
    }

  private:
    std::string text_;
};

// As generate.py's _inputs: [rows][per_row] with a row of zeros, one with a NaN, one that is next to nothing.
std::vector<float> golden_inputs(int64_t rows, int64_t per_row, uint64_t seed) {
    auto x = floats(rows, per_row, seed);
    for (int64_t i = 0; i < per_row; ++i) {
        x[static_cast<size_t>(per_row + i)] = 0.0f;
        x[static_cast<size_t>(3 * per_row + i)] *= 0x1p-110f;
    }
    x[static_cast<size_t>(3 * per_row - 1)] = std::numeric_limits<float>::quiet_NaN();
    return x;
}

std::vector<int64_t> golden_weight(int64_t outputs, int64_t per_output, uint64_t seed) {
    auto w = integers(outputs * per_output, -127, 127, seed);
    for (int64_t i = 0; i < per_output; ++i) {
        w[static_cast<size_t>(i)] = -127;
        w[static_cast<size_t>((outputs - 1) * per_output + i)] = 127;
    }
    return w;
}

// As quantizer_numpy.keep, which draws 2:4 row by row.
std::vector<bool> golden_pairs(int64_t n, int64_t k, uint64_t seed) {
    std::vector<bool> keep(static_cast<size_t>(n * k));
    for (int64_t i = 0; i < n; ++i)
        for (int64_t q = 0; 4 * q < k; ++q)
            for (const int64_t place : integers(2, 0, 3, seed + static_cast<uint64_t>(i * 8191 + q)))
                if (4 * q + place < k)
                    keep[static_cast<size_t>(i * k + 4 * q + place)] = true;
    return keep;
}
std::vector<bool> golden_mask(int64_t n, int64_t k, int64_t height, int64_t width, int64_t groups,
                              uint64_t seed) {
    const int64_t per_group = n / groups, down = div_up(per_group, height), across = div_up(k, width);
    const auto drawn = integers(groups * down * across, 0, 1, seed);
    std::vector<bool> keep;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j)
            keep.push_back(drawn[static_cast<size_t>(
                               (i / per_group * down + i % per_group / height) * across + j / width)] != 0);
    return keep;
}

std::vector<float> golden_down_scale(int64_t n, uint64_t seed) {
    auto v = floats(n, 1, seed);
    for (float &s : v)
        s = std::fabs(s) + 0x1p-20f;
    return v;
}

struct Mode {
    const char *name;
    ActQuant quant;
};
std::vector<Mode> modes() {
    return {{"dynamic", dynamic_quant()}, {"static", static_quant(kStaticScale, kZeroPoint)}};
}

struct Pattern {
    const char *name;
    int64_t height, width;
};
std::vector<int8_t> only(const std::vector<bool> &keep, std::vector<int8_t> w) {
    for (size_t i = 0; i < w.size(); ++i)
        w[i] = keep[i] ? w[i] : int8_t{0};
    return w;
}

constexpr Pattern kPatterns[] = {
    {"unstructured", 1, 1}, {"4x1", 4, 1}, {"16x16", 16, 16}, {"32x32", 32, 32}, {"64x64", 64, 64}};

void linear(Group &group, const Committed &golden, const Isa &isa, const Mode &mode) {
    const int64_t m = 9, n = 70, k = 131, rank = 24;
    const auto x = golden_inputs(m, k, 101);
    const auto w = golden_weight(n, k, 102);
    const auto w8 = as<int8_t>(w);
    const auto check = [&](const std::string &name, const std::vector<int32_t> &acc) {
        const std::string hash = golden.find(name, "acc");
        group.check(!hash.empty() && digest({m, n}, acc) == hash, std::string(isa.name) + " " + name);
    };
    const std::string tail = std::string("-") + mode.name;
    std::vector<int8_t> codes;
    std::vector<float> scale;
    std::vector<uint8_t> raw(static_cast<size_t>(m * k * act_bytes(isa.act)));
    scale.resize(static_cast<size_t>(m));
    quantize_rows(isa, mode.quant, isa.act, x.data(), k, 0, m, k, k, raw.data(), k * act_bytes(isa.act),
                  scale.data());
    for (int64_t i = 0; i < m * k; ++i)
        codes.push_back(isa.act == ActKind::s16
                            ? static_cast<int8_t>(reinterpret_cast<const int16_t *>(raw.data())[i])
                            : static_cast<int8_t>(raw[static_cast<size_t>(i)] - act_shift(isa.act)));
    group.check(digest({m, k}, codes) == golden.find("int8_linear" + tail, "q"),
                std::string(isa.name) + " q" + tail);
    group.check(digest({m}, scale) == golden.find("int8_linear" + tail, "scale"),
                std::string(isa.name) + " scale" + tail);

    const Packed dense = pack_dense(isa, PackKind::dense_i8, 1, n, k, 1, w8.data(), {k, 1, 0});
    check("int8_linear" + tail, run_linear<int32_t>(int8_linear, *dense, mode.quant, x.data(), k, m, n, {}));
    for (const Pattern &p : kPatterns) {
        const auto keep = golden_mask(n, k, p.height, p.width, 1, 103);
        const Packed sparse = pack_sparse(isa, p.height == 1 ? 1 : 4, 1, n, k, 1, only(keep, w8), keep);
        check("sparse_linear" + tail + "-" + p.name,
              run_linear<int32_t>(sparse_linear, *sparse, mode.quant, x.data(), k, m, n, {}));
    }
    const auto kept = only(golden_pairs(n, k, 103), w8);
    for (const PackKind kind : {PackKind::dense_i8, PackKind::pairs_i8})
        if (kind == PackKind::dense_i8 || (isa.strip && isa.strip->pairs))
            check("sparse_linear" + tail + "-2:4",
                  run_linear<int32_t>(sparse_linear,
                                      *pack_dense(isa, kind, 1, n, k, 1, kept.data(), {k, 1, 0}), mode.quant,
                                      x.data(), k, m, n, {}));
    const auto down = as<int8_t>(golden_weight(rank, k, 104)), up = as<int8_t>(golden_weight(n, rank, 105));
    const auto down_scale = golden_down_scale(rank, 106);
    const Packed pd = pack_dense(isa, PackKind::dense_i8, 1, rank, k, 1, down.data(), {k, 1, 0});
    const Packed pu = pack_dense(isa, PackKind::dense_i8, 1, n, rank, 1, up.data(), {rank, 1, 0});
    std::vector<int32_t> y(static_cast<size_t>(m * n));
    LowRankLinearArgs a;
    a.m = m;
    a.x = x.data();
    a.x_stride = k;
    a.quant = mode.quant;
    a.packed = pd->data;
    a.up = pu->data;
    a.down_scale = down_scale.data();
    a.out.epilogue = Tail().epilogue();
    a.out.data = y.data();
    a.out.row_stride = n;
    lowrank_linear(a);
    check("lowrank_linear" + tail, y);
}

void convolution(Group &group, const Committed &golden, const Isa &isa, const Mode &mode, int64_t groups) {
    const int64_t b = 5, i = 6, h = 7, w = 6, o = 36, taps = 9, k = i / groups, n = o / groups;
    const auto x = golden_inputs(b, i * h * w, 201);
    const auto weight = as<int8_t>(golden_weight(o, k * taps, 202));
    ConvArgs a;
    a.geometry = {b, i, h, w, 3, 3, 2, 2, 2, 2, 2, 2};
    a.x = x.data();
    a.quant = mode.quant;
    a.epilogue = Tail().epilogue();
    a.outputs = o;
    const std::string tail = std::string("-") + mode.name, suffix = "-g" + std::to_string(groups);
    const int64_t oh = a.geometry.out_height(), ow = a.geometry.out_width();
    const auto check = [&](void (*op)(const ConvArgs &), const Packed &packed, const std::string &name) {
        std::vector<int32_t> y(static_cast<size_t>(b * o * oh * ow));
        a.packed = packed->data;
        a.out = y.data();
        op(a);
        const std::string hash = golden.find(name, "acc");
        group.check(!hash.empty() && digest({b, o, oh, ow}, y) == hash, std::string(isa.name) + " " + name);
    };
    check(int8_conv2d,
          pack_dense(isa, PackKind::dense_i8, groups, n, k, taps, weight.data(), {k * taps, taps, 1}),
          "int8_conv2d" + tail + suffix);
    for (const Pattern &p : kPatterns) {
        // The mask is over (channel, tap), lists are over (tap, channel): larger blocks are 4x1 ones there.
        const auto keep = golden_mask(o, k * taps, p.height, p.width, groups, 203);
        std::vector<int8_t> ordered(weight.size());
        std::vector<bool> kept(weight.size());
        for (int64_t j = 0; j < o; ++j)
            for (int64_t c = 0; c < k; ++c)
                for (int64_t t = 0; t < taps; ++t) {
                    const auto from = static_cast<size_t>((j * k + c) * taps + t);
                    const auto to = static_cast<size_t>(j * k * taps + t * k + c);
                    kept[to] = keep[from];
                    ordered[to] = keep[from] ? weight[from] : int8_t{0};
                }
        check(sparse_conv2d, pack_sparse(isa, p.height == 1 ? 1 : 4, groups, n, k, taps, ordered, kept),
              "sparse_conv2d" + tail + "-" + p.name + suffix);
    }
    check(sparse_conv2d,
          pack_dense(isa, PackKind::dense_i8, groups, n, k, taps,
                     only(golden_pairs(o, k * taps, 203), weight).data(), {k * taps, taps, 1}),
          "sparse_conv2d" + tail + "-2:4" + suffix);
}

void lowrank_convolution(Group &group, const Committed &golden, const Isa &isa, const Mode &mode,
                         int64_t groups) {
    const int64_t b = 5, i = 6, h = 7, w = 6, o = 36, rank = 4, taps = 9, k = i / groups, n = o / groups;
    const auto x = golden_inputs(b, i * h * w, 201);
    const auto down = as<int8_t>(golden_weight(groups * rank, k * taps, 204));
    const auto up = as<int8_t>(golden_weight(o, rank, 205));
    const auto scale = golden_down_scale(groups * rank, 206);
    const Packed pd =
        pack_dense(isa, PackKind::dense_i8, groups, rank, k, taps, down.data(), {k * taps, taps, 1});
    const Packed pu = pack_dense(isa, PackKind::dense_i8, groups, n, rank, 1, up.data(), {rank, 1, 0});
    LowRankConv2dArgs a;
    a.geometry = {b, i, h, w, 3, 3, 2, 2, 2, 2, 2, 2};
    a.x = x.data();
    a.quant = mode.quant;
    a.epilogue = Tail().epilogue();
    a.outputs = o;
    a.packed = pd->data;
    a.up = pu->data;
    a.down_scale = scale.data();
    const int64_t oh = a.geometry.out_height(), ow = a.geometry.out_width();
    std::vector<int32_t> y(static_cast<size_t>(b * o * oh * ow));
    a.out = y.data();
    lowrank_conv2d(a);
    const std::string name = std::string("lowrank_conv2d-") + mode.name + "-g" + std::to_string(groups);
    const std::string hash = golden.find(name, "acc");
    group.check(!hash.empty() && digest({b, o, oh, ow}, y) == hash, std::string(isa.name) + " " + name);
}

// As generate.py's _weight_only: floats by int8 weights, for kernels that multiply them as integers.
void weight_only(Group &group, const Committed &golden, const Isa &isa, const char *dtype, int significant) {
    const int64_t m = 6, n = 64, k = 263, end = int64_t{1} << significant;
    std::vector<float> x;
    for (const int64_t v : integers(m * k, 1 - end, end - 1, 301))
        x.push_back(std::ldexp(static_cast<float>(v), -significant));
    for (int64_t i = 0; i < k; ++i) {
        x[static_cast<size_t>(k + i)] = 0.0f;
        x[static_cast<size_t>(3 * k + i)] *= i % 8 == 0 ? 0x1p-6f : 1.0f;
        x[static_cast<size_t>(4 * k + i)] *= 0x1p9f;
    }
    x[static_cast<size_t>(2 * k + 9)] *= 16;
    const auto w = as<int8_t>(golden_weight(n, k, 302));
    const Packed packed = pack_dense(isa, PackKind::dense_w8, 1, n, k, 1, w.data(), {k, 1, 0});
    ActQuant quant;
    quant.mode = ActQuant::none;
    Tail tail;
    tail.dtype = DType::f32;
    const std::string name = std::string("int8_linear-weight_only-") + dtype;
    const std::string hash = golden.find(name, "y");
    for (const int64_t step : {1, 2, 6}) { // rows at a time
        if (step > isa.digits->most_rows)
            continue;
        std::vector<float> y;
        for (int64_t r = 0; r < m; r += step) {
            std::vector<float> part;
            if (significant == 24) {
                part = run_linear<float>(int8_linear, *packed, quant, x.data() + r * k, k, step, n, tail);
            } else {
                std::vector<uint16_t> half;
                for (int64_t i = r * k; i < (r + step) * k; ++i)
                    half.push_back(significant == 8 ? bf16_of(x[static_cast<size_t>(i)])
                                                    : f16_of(x[static_cast<size_t>(i)]));
                quant.dtype = significant == 8 ? DType::bf16 : DType::f16;
                part = run_linear<float>(int8_linear, *packed, quant, half.data(), k, step, n, tail);
            }
            y.insert(y.end(), part.begin(), part.end());
        }
        group.check(!hash.empty() && digest({m, n}, y) == hash,
                    std::string(isa.name) + " " + name + describe(", %lld rows", (long long)step));
    }
}

} // namespace

void test_golden(const std::string &file) {
    const Committed golden(file);
    Group group("golden hashes");
    for (const Isa *isa : kernels()) {
        group.ran(*isa);
        for (const Mode &mode : modes()) {
            linear(group, golden, *isa, mode);
            for (const int64_t groups : {1, 3}) {
                convolution(group, golden, *isa, mode, groups);
                lowrank_convolution(group, golden, *isa, mode, groups);
            }
        }
        if (isa->digits) {
            weight_only(group, golden, *isa, "float32", 24);
            weight_only(group, golden, *isa, "float16", 11);
            weight_only(group, golden, *isa, "bfloat16", 8);
        }
    }
}

} // namespace tautorch::tests
