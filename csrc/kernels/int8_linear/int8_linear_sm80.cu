// int8_linear on Ampere and Ada (and, from its PTX, on what has no kernel of its own): CUTLASS 2's multistage
// mainloop (cp.async into shared memory, mma.sync m16n8k32 s8 x s8 -> s32) with our epilogue as a visitor
// tree. One block per output tile.
//
// Operands are read in 16-byte pieces, the last of a row too, which may reach into the padding: the packed
// weight's is zero, which makes whatever x has there count for nothing. So K is told in whole pieces.
#include "cutlass/cutlass.h"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/default_gemm_universal_with_visitor.h"

// After the gemm headers: it uses names that it does not include.
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"

#include "kernels/common/tile_schedule.h"
#include "kernels/int8_linear/int8_linear_epilogue.cuh"
#include "kernels/int8_linear/int8_linear_instances.h"

namespace tautorch::cuda {
namespace {

using cute::_0;
using cute::_1;
using cute::Stride;
namespace visitor = cutlass::epilogue::threadblock;
using cutlass::gemm::GemmCoord;

// Per-column vector. CUTLASS's VisitorRowBroadcast loads 16 bytes at a time, so it wants an aligned vector
// that is readable past n; a bias or a scale of the caller's is neither. This one loads single elements, once
// per tile.
template <class ThreadMap, class Element> struct ColumnVector {
    struct Arguments {
        const Element *ptr = nullptr; // null: zeros
    };
    using Params = Arguments;
    struct SharedStorage {};

    template <class ProblemShape>
    static constexpr Params to_underlying_arguments(const ProblemShape &, const Arguments &args, void *) {
        return args;
    }
    template <class ProblemShape> static size_t get_workspace_size(const ProblemShape &, const Arguments &) {
        return 0;
    }

    CUTLASS_HOST_DEVICE ColumnVector() {}
    CUTLASS_HOST_DEVICE ColumnVector(const Params &p, const SharedStorage &) : params(p) {}
    Params params;

    template <class GTensor, class RTensor, class CTensor>
    struct Callbacks : visitor::detail::EmptyCallbacks {
        CUTLASS_DEVICE Callbacks(GTensor g_, RTensor r_, CTensor c_, int n_, const Element *ptr_)
            : g(g_), r(r_), c(c_), n(n_), ptr(ptr_) {}
        GTensor g; // (VECTOR, FRAGMENT_COLUMN)
        RTensor r;
        CTensor c;
        int n;
        const Element *ptr;

        CUTLASS_DEVICE void begin_epilogue() {
            cute::clear(r);
            if (ptr == nullptr)
                return;
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < cute::size(r); ++i) {
                if (cute::get<1>(c(i)) < n)
                    r(i) = g(i);
            }
        }

        template <class Accumulator, int N>
        CUTLASS_DEVICE auto visit(int, int, int column, int, const cutlass::Array<Accumulator, N> &) {
            return cute::recast<cutlass::Array<Element, N>>(cute::coalesce(r))(column);
        }
    };

    template <class ProblemShape>
    CUTLASS_DEVICE auto get_callbacks(GemmCoord tile, int thread, ProblemShape problem) {
        const auto vector =
            cute::make_tensor(cute::make_gmem_ptr(params.ptr), problem, Stride<_0, _1, _0>{}); // (M, N, L)
        const auto at = [&](const auto &tensor) {
            return ThreadMap::partition(tensor, thread, tile)(cute::_, cute::_, _0{}, _0{}, _0{}, _0{});
        };
        auto g = at(vector);
        auto r = cute::make_tensor<Element>(cute::shape(g));
        auto c = at(cute::make_identity_tensor(vector.shape()));
        return Callbacks<decltype(g), decltype(r), decltype(c)>(g, r, c, cute::get<1>(problem), params.ptr);
    }
};

// The scalings, activation and conversion; its children give x_scale, w_scale, sums and bias.
template <class Out> struct FinishNode {
    using Arguments = FinishArguments;
    using Params = FinishArguments;
    struct SharedStorage {};

    template <class ProblemShape>
    static constexpr Params to_underlying_arguments(const ProblemShape &, const Arguments &args, void *) {
        return args;
    }
    template <class ProblemShape> static size_t get_workspace_size(const ProblemShape &, const Arguments &) {
        return 0;
    }

    CUTLASS_HOST_DEVICE FinishNode() {}
    CUTLASS_HOST_DEVICE FinishNode(const Params &p, const SharedStorage &) : params(p) {}
    Params params;

    struct Callbacks : visitor::detail::EmptyCallbacks {
        CUTLASS_DEVICE explicit Callbacks(const Params &p) : finish(p) {}
        FinishArray<Out> finish;

        template <int N>
        CUTLASS_DEVICE cutlass::Array<Out, N>
        visit(int, int, int, int, const cutlass::Array<int32_t, N> &acc,
              const cutlass::Array<float, N> &x_scale, const cutlass::Array<float, N> &w_scale,
              const cutlass::Array<int32_t, N> &sums, const cutlass::Array<float, N> &bias) {
            return finish(acc, x_scale, w_scale, sums, bias);
        }
    };

    template <class ProblemShape> CUTLASS_DEVICE auto get_callbacks(GemmCoord, int, ProblemShape) {
        return Callbacks(params);
    }
};

template <class Out, class Tile, class Warp, int kStages> struct Gemm {
    // Four adjacent columns per thread and step: 16 bytes of accumulators.
    static constexpr int kWidth = 4;
    using ThreadMap = visitor::OutputTileThreadLayout<Tile, Warp, float, kWidth, 1>;
    // A run-time stride of 0 or 1: x_scale is one value or one per row.
    using XScale = visitor::VisitorColBroadcast<ThreadMap, float, Stride<int, _0, _0>>;
    using WScale = ColumnVector<ThreadMap, float>;
    using Sums = ColumnVector<ThreadMap, int32_t>;
    using Bias = ColumnVector<ThreadMap, float>;
    using Values = visitor::Sm80EVT<FinishNode<Out>, XScale, WScale, Sums, Bias>;
    using Store = visitor::VisitorAuxStore<ThreadMap, Out, cutlass::FloatRoundStyle::round_to_nearest,
                                           Stride<int64_t, _1, _0>>;
    using Tree = visitor::Sm80EVT<Store, Values>;

    using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
        int8_t, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 16, int8_t,
        cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 16, float, cutlass::layout::RowMajor,
        kWidth, int32_t, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp,
        cutlass::gemm::GemmShape<16, 8, 32>, Tree,
        cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages,
        cutlass::arch::OpMultiplyAddSaturate, 1>::GemmKernel;
    using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    static_assert(sizeof(typename Kernel::SharedStorage) <= 99 * 1024,
                  "compute capability 8.6 and 8.9 have no more");
};

template <class G, class Out> int launch(const Int8Linear &a, cudaStream_t stream) {
    using Device = typename G::Device;
    const typename G::Values::Arguments values{
        typename G::XScale::Arguments{a.x_scale, 0.f, {a.x_scale_per_row ? 1 : 0, _0{}, _0{}}},
        typename G::WScale::Arguments{a.w_scale},
        typename G::Sums::Arguments{a.x_zero_point ? a.sums : nullptr}, typename G::Bias::Arguments{a.bias},
        FinishArguments{a.x_zero_point, a.out_scale, a.out_zero_point, a.activation, a.out_dtype}};
    const typename G::Tree::Arguments tree{
        values, typename G::Store::Arguments{static_cast<Out *>(a.y), {a.ldy, _1{}, _0{}}}};

    const GemmCoord problem(static_cast<int>(a.m), static_cast<int>(a.n), static_cast<int>(k_in_pieces(a.k)));
    const typename Device::Arguments args(cutlass::gemm::GemmUniversalMode::kGemm, problem, 1, tree,
                                          static_cast<const int8_t *>(a.x), a.weight, nullptr, nullptr, 0, 0,
                                          0, 0, a.ldx, a.ldw, 0, 0);
    Device gemm;
    if (gemm.initialize(args, nullptr, stream) != cutlass::Status::kSuccess)
        return kCutlassRefused;
    if (gemm.run(stream) != cutlass::Status::kSuccess) {
        const cudaError_t e = cudaGetLastError();
        return e != cudaSuccess ? static_cast<int>(e) : static_cast<int>(kCutlassRefused);
    }
    return kOk;
}

} // namespace

#define TAUTORCH_DEFINE(name, tm, tn, tk, wm, wn, wk, stages)                                                \
    int int8_linear_##name(const Int8Linear &a, void *stream) {                                              \
        using Tile = cutlass::gemm::GemmShape<tm, tn, tk>;                                                   \
        using Warp = cutlass::gemm::GemmShape<wm, wn, wk>;                                                   \
        const auto s = static_cast<cudaStream_t>(stream);                                                    \
        switch (size_of(a.out_dtype)) {                                                                      \
        case 4:                                                                                              \
            return launch<Gemm<int32_t, Tile, Warp, stages>, int32_t>(a, s);                                 \
        case 2:                                                                                              \
            return launch<Gemm<uint16_t, Tile, Warp, stages>, uint16_t>(a, s);                               \
        default:                                                                                             \
            return launch<Gemm<int8_t, Tile, Warp, stages>, int8_t>(a, s);                                   \
        }                                                                                                    \
    }
TAUTORCH_INT8_LINEAR_SM80(TAUTORCH_DEFINE)
#undef TAUTORCH_DEFINE

} // namespace tautorch::cuda
