#include "layers.h"

#include <cmath>
#include <cstring>

namespace tautorch::tests {

Packed pack_dense(const Isa &isa, PackKind kind, int64_t groups, int64_t n, int64_t k, int64_t taps,
                  const void *w, WeightStrides strides) {
    const PackHeader h = dense_header(isa, kind, groups, n, k, taps);
    auto out = std::make_unique<Bytes>(static_cast<size_t>(h.total));
    dense_pack(h, w, strides, out->data);
    return out;
}

template <class T>
Packed pack_sparse(const Isa &isa, int gs, int64_t groups, int64_t n, int64_t k, int64_t taps,
                   const std::vector<T> &w, const std::vector<bool> &keep, SparseForm form) {
    const int64_t inputs = k * taps, per_group = div_up(n, gs);
    std::vector<uint32_t> start = {0};
    std::vector<uint16_t> index;
    std::vector<T> values;
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t s = 0; s < per_group; ++s) {
            for (int64_t i = 0; i < inputs; ++i) {
                const auto at = [&](int64_t r) {
                    return static_cast<size_t>((g * n + s * gs + r) * inputs + i);
                };
                if (!keep[at(0)])
                    continue;
                index.push_back(static_cast<uint16_t>(i));
                for (int64_t r = 0; r < gs; ++r)
                    values.push_back(s * gs + r < n ? w[at(r)] : T{0});
            }
            start.push_back(static_cast<uint32_t>(index.size()));
        }
    const SparseEntries e = {groups * per_group, start.data(), index.data(), values.data()};
    const PackKind kind = sizeof(T) == 1 ? PackKind::sparse_i8 : PackKind::sparse_f32;
    const PackHeader h = sparse_header(isa, kind, gs, groups, n, k, taps, e, form);
    auto out = std::make_unique<Bytes>(static_cast<size_t>(h.total));
    sparse_pack(h, e, out->data);
    return out;
}
template Packed pack_sparse(const Isa &, int, int64_t, int64_t, int64_t, int64_t, const std::vector<int8_t> &,
                            const std::vector<bool> &, SparseForm);
template Packed pack_sparse(const Isa &, int, int64_t, int64_t, int64_t, int64_t, const std::vector<float> &,
                            const std::vector<bool> &, SparseForm);

Epilogue Tail::epilogue() const {
    Epilogue e;
    e.w_scale = w_scale.empty() ? nullptr : w_scale.data();
    e.bias = bias.empty() ? nullptr : bias.data();
    e.activation = activation;
    e.out_dtype = dtype;
    e.out_inv_scale = 1.0f / out_scale;
    e.out_zero_point = out_zero_point;
    return e;
}

float Tail::value(int64_t acc, float row_scale, int64_t output) const {
    const auto i = static_cast<size_t>(output);
    float y = static_cast<float>(static_cast<int32_t>(acc)) * row_scale;
    y *= w_scale.empty() ? 1.0f : w_scale[i];
    y += bias.empty() ? 0.0f : bias[i];
    return activation == Activation::relu && y < 0.0f ? 0.0f : y;
}

int8_t Tail::code(float y) const {
    const float v = y * (1.0f / out_scale);
    if (v != v)
        return static_cast<int8_t>(out_zero_point);
    const double q = std::nearbyint(std::fmin(std::fmax(v, -1000.0f), 1000.0f)) + out_zero_point;
    return static_cast<int8_t>(std::fmin(std::fmax(q, -128.0), 127.0));
}

ActQuant dynamic_quant(DType dtype) {
    ActQuant q;
    q.dtype = dtype;
    return q;
}
ActQuant static_quant(float scale, int32_t zero_point, DType dtype) {
    ActQuant q;
    q.mode = ActQuant::fixed;
    q.scale = scale;
    q.zero_point = zero_point;
    q.dtype = dtype;
    return q;
}
ActQuant given_quant(const std::vector<float> &scales, int32_t zero_point) {
    ActQuant q;
    q.mode = ActQuant::given;
    q.given_scale = scales.data();
    q.given_scales = static_cast<int64_t>(scales.size());
    q.zero_point = zero_point;
    q.dtype = DType::i8;
    return q;
}

template <class Out>
std::vector<Out> run_linear(void (*op)(const LinearArgs &), const Bytes &packed, const ActQuant &quant,
                            const void *x, int64_t stride, int64_t m, int64_t n, const Tail &tail) {
    // Everything that is read or written ends where its memory does.
    const int64_t used = m > 0 ? (m - 1) * stride + header_of(packed.data).k : 0;
    const Bytes in(x, static_cast<size_t>(used * size_of(quant.dtype)));
    const Bytes w_scale = closed(tail.w_scale), bias = closed(tail.bias);
    const Bytes y = closed(std::vector<Out>(static_cast<size_t>(m * n), Out{77}));
    LinearArgs a;
    a.m = m;
    a.x = in.data;
    a.x_stride = stride;
    a.quant = quant;
    a.packed = packed.data;
    a.out.epilogue = tail.epilogue();
    if (w_scale.size > 0)
        a.out.epilogue.w_scale = reinterpret_cast<const float *>(w_scale.data);
    if (bias.size > 0)
        a.out.epilogue.bias = reinterpret_cast<const float *>(bias.data);
    a.out.data = y.data;
    a.out.row_stride = n;
    op(a);
    const Out *from = reinterpret_cast<const Out *>(y.data);
    return {from, from + m * n};
}
template std::vector<int32_t> run_linear(void (*)(const LinearArgs &), const Bytes &, const ActQuant &,
                                         const void *, int64_t, int64_t, int64_t, const Tail &);
template std::vector<int8_t> run_linear(void (*)(const LinearArgs &), const Bytes &, const ActQuant &,
                                        const void *, int64_t, int64_t, int64_t, const Tail &);
template std::vector<uint16_t> run_linear(void (*)(const LinearArgs &), const Bytes &, const ActQuant &,
                                          const void *, int64_t, int64_t, int64_t, const Tail &);
template std::vector<float> run_linear(void (*)(const LinearArgs &), const Bytes &, const ActQuant &,
                                       const void *, int64_t, int64_t, int64_t, const Tail &);

std::vector<int32_t> matmul(const std::vector<int64_t> &q, const std::vector<int64_t> &w, int64_t m,
                            int64_t n, int64_t k) {
    std::vector<int32_t> out;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
            int64_t sum = 0;
            for (int64_t l = 0; l < k; ++l)
                sum += q[static_cast<size_t>(i * k + l)] * w[static_cast<size_t>(j * k + l)];
            out.push_back(static_cast<int32_t>(sum));
        }
    return out;
}

uint16_t bf16_of(float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    return x == x ? static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16) : 0x7fc0;
}

float f16_value(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    float v = exponent == 31 ? (mantissa ? NAN : INFINITY)
              : exponent     ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                             : std::ldexp(static_cast<float>(mantissa), -24);
    return h & 0x8000 ? -v : v;
}
// Nearest half, ties to even, by search among its neighbours.
uint16_t f16_of(float x) {
    if (x != x)
        return 0x7e00;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double a = std::fabs(static_cast<double>(x));
    if (a >= 65520.0)
        return static_cast<uint16_t>(sign | 0x7c00);
    uint16_t low = 0, high = 0x7bff;
    while (low < high) { // the largest half that is not above a
        const auto middle = static_cast<uint16_t>((low + high + 1) / 2);
        if (static_cast<double>(f16_value(middle)) <= a)
            low = middle;
        else
            high = static_cast<uint16_t>(middle - 1);
    }
    const double below = a - static_cast<double>(f16_value(low));
    const double next =
        low == 0x7bff ? 65536.0 : static_cast<double>(f16_value(static_cast<uint16_t>(low + 1)));
    const double above = next - a;
    if (above < below || (above == below && low % 2 == 1))
        ++low;
    return static_cast<uint16_t>(sign | low);
}

} // namespace tautorch::tests
