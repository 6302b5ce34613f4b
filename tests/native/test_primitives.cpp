// Conversions: every half, and floats around every boundary of the narrower types. Activations.
#include "groups.h"
#include "layers.h"

#include <cmath>
#include <cstring>

namespace tautorch::tests {
namespace {

float bf16_value(uint16_t b) {
    const uint32_t bits = uint32_t{b} << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
std::vector<float> hard_floats() {
    std::vector<float> x = {0.0f,     -0.0f,     INFINITY, -INFINITY, NAN,
                            65504.0f, 65519.99f, 65520.0f, 0x1p-24f,  0x1p-25f};
    for (const uint64_t z : bits(4000, 7)) {
        uint32_t b = static_cast<uint32_t>(z);
        if (z >> 60 < 12) // of the size of halves
            b = (b & 0x87ffffffu) | (b >> 27 & 1u ? 0x38000000u : 0x40000000u);
        if (z >> 60 < 4) // and half-way between two of them
            b = (b & 0xffffe000u) | 0x1000u;
        float v;
        std::memcpy(&v, &b, 4);
        x.push_back(v);
    }
    return x;
}

} // namespace

void test_half_precision() {
    Group group("f16, bf16, amax, activations");
    for (const Isa *isa : kernels()) {
        group.ran(*isa);
        std::vector<uint16_t> all(65536);
        std::vector<float> f16(65536), bf16(65536), got(65536);
        for (size_t i = 0; i < all.size(); ++i) {
            all[i] = static_cast<uint16_t>(i);
            f16[i] = f16_value(all[i]);
            bf16[i] = bf16_value(all[i]);
        }
        isa->to_f32(all.data(), DType::f16, 65536, got.data());
        group.equal(got, f16, std::string(isa->name) + " f16 to f32");
        isa->to_f32(all.data(), DType::bf16, 65536, got.data());
        group.equal(got, bf16, std::string(isa->name) + " bf16 to f32");

        const auto x = hard_floats();
        const auto n = static_cast<int>(x.size());
        for (const DType type : {DType::f16, DType::bf16}) {
            Epilogue e;
            e.acc_float = true;
            e.out_dtype = type;
            std::vector<uint16_t> y(x.size()), want;
            isa->epilogue(e, x.data(), n, 1, n, false, 0, nullptr, y.data(), n);
            for (const float in : x) {
                const float v = in + 0.0f; // the bias that is not there; -0 becomes 0
                uint16_t half = type == DType::f16 ? f16_of(v) : bf16_of(v);
                want.push_back(v != v ? uint16_t{0x7e00} : half);
            }
            for (size_t i = 0; i < y.size(); ++i) // one NaN
                if (x[i] != x[i] && (y[i] & 0x7fff) > (type == DType::f16 ? 0x7c00 : 0x7f80))
                    y[i] = 0x7e00;
            group.equal(y, want,
                        std::string(isa->name) + (type == DType::f16 ? " f32 to f16" : " f32 to bf16"));
        }

        const auto activated = [](Activation a, double v) {
            const double inner = 0.7978845608028654 * (v + 0.044715 * v * v * v);
            return a == Activation::relu   ? std::fmax(v, 0.0)
                   : a == Activation::silu ? v / (1 + std::exp(-v))
                   : a == Activation::gelu ? 0.5 * v * std::erfc(-v * 0.7071067811865476)
                                           : v / (1 + std::exp(-2 * inner));
        };
        for (const Activation a :
             {Activation::relu, Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
            std::vector<float> in, y;
            for (int i = -1200; i <= 1200; ++i) // nothing left of silu at -12, all of it at 12
                in.push_back(static_cast<float>(i) * 0.01f);
            const auto count = static_cast<int>(in.size());
            y.resize(in.size());
            Epilogue e;
            e.acc_float = true;
            e.activation = a;
            e.out_dtype = DType::f32;
            isa->epilogue(e, in.data(), count, 1, count, false, 0, nullptr, y.data(), count);
            for (size_t i = 0; i < in.size(); ++i) {
                const double want = activated(a, in[i]);
                group.check(std::fabs(y[i] - want) <= 1e-6 * (1 + std::fabs(want)),
                            describe("%s activation %d of %g: %.9g, not %.9g", isa->name, static_cast<int>(a),
                                     in[i], y[i], want));
            }
        }

        for (const DType type : {DType::f32, DType::f16, DType::bf16})
            for (int64_t k = 0; k < 41; ++k) {
                std::vector<float> row;
                std::vector<uint16_t> halves;
                for (const uint64_t z : bits(k, 900 + static_cast<uint64_t>(k))) {
                    const uint16_t h =
                        static_cast<uint16_t>(z & 0xbfff) % 0x7b00 | static_cast<uint16_t>(z & 0x8000);
                    halves.push_back(type == DType::bf16 ? bf16_of(f16_value(h)) : h);
                    row.push_back(type == DType::bf16 ? bf16_value(halves.back()) : f16_value(h));
                }
                const Bytes in = type == DType::f32 ? closed(row) : closed(halves);
                const void *at = in.data;
                float amax = 0;
                for (const float v : row)
                    amax = std::fmax(amax, std::fabs(v));
                bool finite = false;
                const float measured = isa->amax(at, type, k, &finite);
                group.check(finite && measured == amax, describe("%s amax type %d k %lld", isa->name,
                                                                 static_cast<int>(type), (long long)k));
                const Row want = quantize_dynamic(row.data(), k),
                          fixed = quantize_static(row.data(), k, 0.37f, 4);
                for (const ActKind act : {ActKind::u8_shifted, ActKind::s16, isa->act}) {
                    std::vector<uint8_t> q(static_cast<size_t>(2 * k + 2), 99);
                    const auto code = [&](int64_t i) {
                        return act == ActKind::s16
                                   ? int64_t{reinterpret_cast<const int16_t *>(q.data())[i]}
                                   : int64_t{static_cast<int8_t>(q[static_cast<size_t>(i)] - act_shift(act))};
                    };
                    bool equal = true;
                    isa->quantize(at, type, k, k && amax > 0 ? 127.0f / amax : 0.0f, 0, -127, 127, act,
                                  q.data());
                    for (int64_t i = 0; i < k && amax > 0; ++i)
                        equal = equal && code(i) == want.q[static_cast<size_t>(i)];
                    equal = equal && isa->quantize(at, type, k, 1.0f / 0.37f, 4, -128, 127, act, q.data());
                    for (int64_t i = 0; i < k; ++i)
                        equal = equal && code(i) == fixed.q[static_cast<size_t>(i)];
                    equal = equal && q[static_cast<size_t>(k * act_bytes(act))] == 99; // nothing past the end
                    group.check(equal, describe("%s quantise type %d k %lld form %d", isa->name,
                                                static_cast<int>(type), (long long)k, static_cast<int>(act)));
                }
            }
    }
}

} // namespace tautorch::tests
