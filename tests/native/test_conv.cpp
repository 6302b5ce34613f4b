// int8_conv2d and sparse_conv2d: dense, grouped, depthwise and dilated filters, odd channels, both layouts.
#include "groups.h"
#include "layers.h"

#include "kernels/int8_conv2d/int8_conv2d.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"

#include <algorithm>
#include <cmath>

namespace tautorch::tests {
namespace {

struct Conv {
    Geometry g;
    int64_t outputs, groups;
    int64_t inputs() const { return g.channels / groups; } // of a group
    int64_t weights() const { return outputs * inputs() * g.kh * g.kw; }
};

Conv conv(int64_t b, int64_t c, int64_t h, int64_t w, int64_t o, int64_t kernel, int64_t stride, int64_t pad,
          int64_t dilation, int64_t groups) {
    return {{b, c, h, w, kernel, kernel, stride, stride, pad, pad, dilation, dilation}, o, groups};
}

const std::vector<Conv> &convs() {
    static const std::vector<Conv> all = {
        conv(2, 3, 9, 8, 5, 3, 1, 1, 1, 1),       conv(1, 16, 6, 7, 17, 3, 2, 1, 1, 1),
        conv(2, 7, 5, 5, 12, 1, 1, 0, 1, 1),      conv(1, 20, 5, 4, 33, 1, 2, 0, 1, 1),
        conv(1, 5, 9, 9, 6, 3, 1, 2, 2, 1),       conv(1, 12, 7, 6, 20, 3, 2, 2, 2, 4),
        conv(2, 6, 5, 7, 6, 5, 1, 2, 1, 3),       conv(1, 1, 4, 4, 1, 3, 1, 1, 1, 1),
        conv(1, 64, 3, 3, 64, 3, 1, 1, 1, 1),     conv(2, 19, 7, 8, 19, 3, 1, 1, 1, 19),
        conv(1, 70, 6, 5, 70, 3, 2, 1, 1, 70),    conv(1, 33, 9, 8, 33, 5, 1, 4, 2, 33),
        conv(1, 128, 4, 3, 128, 7, 1, 3, 1, 128),
    };
    return all;
}

// Sums of centred q [b][c][h][w] by w [o][c / groups][kh][kw], [b][o][oh][ow].
std::vector<int32_t> convolve(const Conv &c, const std::vector<int64_t> &q, const std::vector<int64_t> &w) {
    const Geometry &g = c.g;
    std::vector<int32_t> out;
    for (int64_t b = 0; b < g.batch; ++b)
        for (int64_t o = 0; o < c.outputs; ++o)
            for (int64_t oy = 0; oy < g.out_height(); ++oy)
                for (int64_t ox = 0; ox < g.out_width(); ++ox) {
                    int64_t sum = 0;
                    const int64_t group = o / (c.outputs / c.groups);
                    for (int64_t i = 0; i < c.inputs(); ++i)
                        for (int64_t ky = 0; ky < g.kh; ++ky)
                            for (int64_t kx = 0; kx < g.kw; ++kx) {
                                const int64_t y = oy * g.sh - g.ph + ky * g.dh,
                                              x = ox * g.sw - g.pw + kx * g.dw;
                                if (y < 0 || y >= g.height || x < 0 || x >= g.width)
                                    continue;
                                const int64_t ch = group * c.inputs() + i;
                                sum += q[static_cast<size_t>(
                                           ((b * g.channels + ch) * g.height + y) * g.width + x)] *
                                       w[static_cast<size_t>(((o * c.inputs() + i) * g.kh + ky) * g.kw + kx)];
                            }
                    out.push_back(static_cast<int32_t>(sum));
                }
    return out;
}

template <class T>
std::vector<T> channels_last(const std::vector<T> &v, int64_t batch, int64_t channels, int64_t pixels) {
    std::vector<T> out;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t p = 0; p < pixels; ++p)
            for (int64_t c = 0; c < channels; ++c)
                out.push_back(v[static_cast<size_t>((b * channels + c) * pixels + p)]);
    return out;
}

std::vector<int32_t> run(void (*op)(const ConvArgs &), const Conv &c, const Bytes &packed,
                         const ActQuant &quant, const void *x, bool last) {
    const Geometry &g = c.g;
    const Bytes in(x, static_cast<size_t>(g.batch * g.channels * g.height * g.width * size_of(quant.dtype)));
    const Bytes y =
        closed(std::vector<int32_t>(static_cast<size_t>(g.batch * c.outputs * g.out_pixels()), 77));
    ConvArgs a;
    a.geometry = g;
    a.x = in.data;
    a.channels_last = a.out_channels_last = last;
    a.quant = quant;
    a.packed = packed.data;
    a.epilogue = Tail().epilogue();
    a.outputs = c.outputs;
    a.out = y.data;
    op(a);
    const int32_t *from = reinterpret_cast<const int32_t *>(y.data);
    return {from, from + y.size / sizeof(int32_t)};
}

// Both layouts, dynamic scales and int8 images with a zero point.
void check_all(Group &group, void (*op)(const ConvArgs &), const Conv &c, const Bytes &packed,
               const std::vector<int64_t> &w, const std::string &what) {
    const Geometry &g = c.g;
    const int64_t sample = g.channels * g.height * g.width;
    const auto x = floats(g.batch, sample, 71);
    std::vector<int64_t> q;
    for (int64_t b = 0; b < g.batch; ++b) {
        const Row row = quantize_dynamic(x.data() + b * sample, sample);
        q.insert(q.end(), row.q.begin(), row.q.end());
    }
    auto codes = integers(g.batch * sample, -128, 127, 72);
    for (size_t i = 0; i < codes.size(); i += 5) // pairs of the lowest too
        codes[i] = -128;
    const auto codes8 = as<int8_t>(codes);
    std::vector<int64_t> centred = codes;
    for (int64_t &v : centred)
        v -= 3;
    const std::vector<float> one = {1.0f};
    const auto dynamic = convolve(c, q, w), given = convolve(c, centred, w);
    const int64_t in = g.height * g.width, out = g.out_pixels();
    group.equal(run(op, c, packed, dynamic_quant(), x.data(), false), dynamic, what + " NCHW");
    group.equal(run(op, c, packed, given_quant(one, 3), codes8.data(), false), given, what + " NCHW int8");
    const auto xl = channels_last(x, g.batch, g.channels, in);
    const auto cl = channels_last(codes8, g.batch, g.channels, in);
    group.equal(run(op, c, packed, dynamic_quant(), xl.data(), true),
                channels_last(dynamic, g.batch, c.outputs, out), what + " NHWC");
    group.equal(run(op, c, packed, given_quant(one, 3), cl.data(), true),
                channels_last(given, g.batch, c.outputs, out), what + " NHWC int8");
}

// [outputs][tap][channel]: a row of the filter is one run of memory.
std::vector<int8_t> by_rows(const Conv &c, const std::vector<int8_t> &w) {
    const int64_t taps = c.g.kh * c.g.kw, k = c.inputs();
    std::vector<int8_t> rows;
    for (int64_t o = 0; o < c.outputs; ++o)
        for (int64_t t = 0; t < taps; ++t)
            for (int64_t i = 0; i < k; ++i)
                rows.push_back(w[static_cast<size_t>((o * k + i) * taps + t)]);
    return rows;
}

std::string name_of(const Isa &isa, const Conv &c) {
    const Geometry &g = c.g;
    return describe("%s %lldx%lldx%lldx%lld o %lld kernel %lld stride %lld dilation %lld groups %lld",
                    isa.name, (long long)g.batch, (long long)g.channels, (long long)g.height,
                    (long long)g.width, (long long)c.outputs, (long long)g.kh, (long long)g.sh,
                    (long long)g.dh, (long long)c.groups);
}

} // namespace

void test_int8_conv2d() {
    Group group("int8_conv2d"), deep("int8_conv2d, depthwise");
    for (const Isa *isa : kernels()) {
        group.ran(*isa);
        deep.ran(*isa);
        for (const Conv &c : convs()) {
            const int64_t taps = c.g.kh * c.g.kw, k = c.inputs();
            const std::string what = name_of(*isa, c);
            if (k == 1 && c.groups > 1) {
                // Without -128, as weights are quantised, two products fit 16 bits; with it they may not.
                for (const int64_t low : {-127, -128}) {
                    auto w = integers(c.weights(), low, 127, 73);
                    for (size_t i = 0; i < w.size(); i += 3)
                        w[i] = i % 2 ? 127 : low;
                    const Packed p = pack_dense(*isa, PackKind::depthwise_i8, c.groups, 1, 1, taps,
                                                as<int8_t>(w).data(), {taps, taps, 1});
                    check_all(deep, int8_conv2d, c, *p, w, what + describe(" from %lld", (long long)low));
                }
                continue;
            }
            const auto w = integers(c.weights(), -128, 127, 73);
            const auto w8 = as<int8_t>(w);
            const Packed p = pack_dense(*isa, PackKind::dense_i8, c.groups, c.outputs / c.groups, k, taps,
                                        w8.data(), {k * taps, taps, 1});
            check_all(group, int8_conv2d, c, *p, w, what);
            if (c.groups != 1 || c.g.dw != 1)
                continue;
            const auto rows = by_rows(c, w8);
            const int64_t run_length = c.g.kw * k;
            const Packed r = pack_dense(*isa, PackKind::dense_i8, 1, c.outputs, run_length, c.g.kh,
                                        rows.data(), {k * taps, 1, run_length});
            check_all(group, int8_conv2d, c, *r, w, what + " by rows");
            if (c.g.kh == 1)
                continue;
            const Packed whole = pack_dense(*isa, PackKind::dense_i8, 1, c.outputs, k * taps, 1, rows.data(),
                                            {k * taps, 1, 1});
            check_all(group, int8_conv2d, c, *whole, w, what + " by windows");
        }
    }
}

// Floats by int8 weights: small integers, whose sums are exact however they are made.
void test_weight_only_conv2d() {
    Group group("int8_conv2d, weight-only");
    for (const Isa *isa : kernels()) {
        group.ran(*isa);
        for (const Conv &c : convs()) {
            const Geometry &g = c.g;
            const int64_t taps = g.kh * g.kw, k = c.inputs();
            const auto w = integers(c.weights(), -128, 127, 76);
            const auto codes = integers(g.batch * g.channels * g.height * g.width, -9, 9, 77);
            const auto sums = convolve(c, codes, w);
            const Bytes x = closed(as<float>(codes));
            ConvArgs a;
            a.geometry = g;
            a.x = x.data;
            a.quant.mode = ActQuant::none;
            a.epilogue = Tail().epilogue();
            a.epilogue.out_dtype = DType::f32;
            a.outputs = c.outputs;
            std::vector<float> y(sums.size());
            a.out = y.data();
            const auto check = [&](const Packed &packed, const std::string &what) {
                a.packed = packed->data;
                int8_conv2d(a);
                group.equal(y, std::vector<float>(sums.begin(), sums.end()), name_of(*isa, c) + what);
            };
            check(pack_dense(*isa, PackKind::dense_w8, c.groups, c.outputs / c.groups, k, taps,
                             as<int8_t>(w).data(), {k * taps, taps, 1}),
                  "");
            if (c.groups == 1 && g.dw == 1)
                check(pack_dense(*isa, PackKind::dense_w8, 1, c.outputs, g.kw * k, g.kh,
                                 by_rows(c, as<int8_t>(w)).data(), {k * taps, 1, g.kw * k}),
                      " by rows");
        }
    }
}

void test_sparse_conv2d() {
    Group group("sparse_conv2d, int8");
    for (const Isa *isa : kernels()) {
        group.ran(*isa);
        for (const Conv &c : convs())
            for (const int height : {1, 4, 16}) { // whole blocks of 16 x 16 have a form of their own
                const int gs = std::min(height, 4), width = height == 16 ? 16 : 1;
                const int64_t taps = c.g.kh * c.g.kw, k = c.inputs(), n = c.outputs / c.groups,
                              inputs = taps * k;
                auto w = integers(c.weights(), -128, 127, 74);
                // Lists are over (tap, channel); groups of outputs do not cross convolution groups.
                std::vector<int8_t> ordered(w.size());
                std::vector<bool> keep(w.size());
                const int64_t down = div_up(n, height), across = div_up(inputs, width);
                const auto drawn = integers(c.groups * down * across, 0, 1, 75);
                for (int64_t o = 0; o < c.outputs; ++o)
                    for (int64_t t = 0; t < taps; ++t)
                        for (int64_t i = 0; i < k; ++i) {
                            const int64_t block = o / n * down + o % n / height, at = t * k + i;
                            const bool kept = drawn[static_cast<size_t>(block * across + at / width)] != 0;
                            int64_t &v = w[static_cast<size_t>((o * k + i) * taps + t)];
                            v = kept ? v : 0;
                            ordered[static_cast<size_t>(o * inputs + at)] = static_cast<int8_t>(v);
                            keep[static_cast<size_t>(o * inputs + at)] = kept;
                        }
                const Packed p = pack_sparse(*isa, gs, c.groups, n, k, taps, ordered, keep);
                check_all(group, sparse_conv2d, c, *p, w,
                          name_of(*isa, c) + describe(" blocks of %d", height));
            }
    }
}

} // namespace tautorch::tests
