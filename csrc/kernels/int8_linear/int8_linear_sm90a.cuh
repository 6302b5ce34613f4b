// int8 products on Hopper: CUTLASS 3's warp-specialised mainloop (TMA into shared memory, wgmma s8 x s8 ->
// s32 into registers) with our epilogue as a visitor tree, stored by TMA. Persistent: one block per
// multiprocessor.
//
// TMA clips boxes at the tensor's edge, so any m, n, k works: reads outside are zeros, writes outside do not
// happen. CUTLASS's own can_implement() would refuse n or k off 16 bytes; it is not asked, only strides and
// addresses need that and int8_linear_run() checks them.
//
// Rows of x are the A operand, or, swapped, the weights are: then tiles of few rows cost no more than they
// have, and the weights may be sparse. What CUTLASS calls m, n and a row of D is then n, m and a column of y.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/kernel_hardware_info.hpp"
#include "kernels/common/tile_schedule.h"
#include "kernels/int8_linear/int8_linear_epilogue.cuh"
#include "kernels/int8_linear/int8_linear_instances.h"

namespace tautorch::cuda {
namespace {

using cute::_0;
using cute::_1;
using cute::Int;
using cute::Shape;
using cute::Stride;
namespace fusion = cutlass::epilogue::fusion;

// Visitor node at the tree's root. Its children give x_scale, w_scale, sums and bias; the accumulators come
// with the visit itself, as the integers they are.
template <class Out> struct FinishNode {
    struct SharedStorage {};
    using Arguments = FinishArguments;
    using Params = FinishArguments;

    template <class ProblemShape>
    static constexpr Params to_underlying_arguments(const ProblemShape &, const Arguments &args, void *) {
        return args;
    }
    template <class ProblemShape> static bool can_implement(const ProblemShape &, const Arguments &) {
        return true;
    }
    template <class ProblemShape> static size_t get_workspace_size(const ProblemShape &, const Arguments &) {
        return 0;
    }
    template <class ProblemShape>
    static cutlass::Status initialize_workspace(const ProblemShape &, const Arguments &, void *, cudaStream_t,
                                                cutlass::CudaHostAdapter * = nullptr) {
        return cutlass::Status::kSuccess;
    }

    CUTLASS_HOST_DEVICE FinishNode() {}
    CUTLASS_HOST_DEVICE FinishNode(const Params &p, const SharedStorage &) : params(p) {}

    Params params;

    CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
    CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

    template <class... Args>
    CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::detail::ProducerLoadArgs<Args...> &) {
        return fusion::detail::EmptyProducerLoadCallbacks{};
    }

    struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
        CUTLASS_DEVICE explicit ConsumerStoreCallbacks(const Params &p) : finish(p) {}
        FinishArray<Out> finish;

        template <int N>
        CUTLASS_DEVICE cutlass::Array<Out, N>
        visit(const cutlass::Array<int32_t, N> &acc, int, int, int, const cutlass::Array<float, N> &x_scale,
              const cutlass::Array<float, N> &w_scale, const cutlass::Array<int32_t, N> &sums,
              const cutlass::Array<float, N> &bias) {
            return finish(acc, x_scale, w_scale, sums, bias);
        }
    };

    template <bool ReferenceSrc, class... Args>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...> &) {
        return ConsumerStoreCallbacks(params);
    }
};

// The tree over our node, for tiles of y or, swapped, of y transposed. A run-time stride of 0 or 1: x_scale
// is one value or one per row. Vectors may have any alignment, so elements are read one by one.
template <class Out, class Tile, bool kSwapped> struct FinishTree {
    template <class T, class Stride_> using Along = fusion::Sm90ColBroadcast<0, Tile, T, T, Stride_, 1>;
    template <class T, class Stride_> using Across = fusion::Sm90RowBroadcast<0, Tile, T, T, Stride_>;
    template <class T>
    using OfOutput =
        std::conditional_t<kSwapped, Along<T, Stride<_1, _0, _0>>, Across<T, Stride<_0, _1, _0>>>;
    using XScale =
        std::conditional_t<kSwapped, Across<float, Stride<_0, bool, _0>>, Along<float, Stride<bool, _0, _0>>>;
    using WScale = OfOutput<float>;
    using Sums = OfOutput<int32_t>;
    using Bias = OfOutput<float>;
    using Tree = fusion::Sm90EVT<FinishNode<Out>, XScale, WScale, Sums, Bias>;

    static typename Tree::Arguments arguments(const Int8Linear &a) {
        typename XScale::Arguments x_scale{a.x_scale, 0.f, {}};
        cute::get<kSwapped ? 1 : 0>(stride_of(x_scale)) = a.x_scale_per_row;
        return {x_scale, typename WScale::Arguments{a.w_scale, 0.f, {}},
                typename Sums::Arguments{a.x_zero_point ? a.sums : nullptr, 0, {}},
                typename Bias::Arguments{a.bias, 0.f, {}},
                FinishArguments{a.x_zero_point, a.out_scale, a.out_zero_point, a.activation, a.out_dtype}};
    }

  private:
    static auto &stride_of(typename XScale::Arguments &x) {
        if constexpr (kSwapped)
            return x.dRow;
        else
            return x.dCol;
    }
};

// Per device and thread: a launch should not pay for a driver query.
int multiprocessors(int device) {
    thread_local int cached_device = -1;
    thread_local int cached = 0;
    if (device != cached_device) {
        if (cudaDeviceGetAttribute(&cached, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
            return 0;
        cached_device = device;
    }
    return cached;
}

// A driver older than CUDA 12 has no tensor maps. CUTLASS would print a message and launch with garbage.
bool has_tensor_maps() {
    static const bool found = [] {
        void *entry = nullptr;
        cudaDriverEntryPointQueryResult result;
        return cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                                &result) == cudaSuccess &&
               result == cudaDriverEntryPointSuccess;
    }();
    return found;
}

// f of a value of the container that outputs of this type have.
template <class F> auto by_size(DType out, F f) {
    const int64_t size = size_of(out);
    return size == 4 ? f(int32_t{}) : size == 2 ? f(uint16_t{}) : f(int8_t{});
}

// From sizes and operands to a launch: what every kernel of CUTLASS 3 here has in common.
template <class Device>
typename Device::Arguments device_arguments(int m, int n, int k,
                                            const cutlass::KernelHardwareInfo &hardware) {
    typename Device::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {m, n, k, 1};
    args.hw_info = hardware;
    // Neighbouring tiles share rows of w and x in L2.
    using Kernel = typename Device::GemmKernel;
    using Cluster = typename Kernel::DispatchPolicy::ClusterShape;
    args.scheduler.max_swizzle_size = swizzle_of({div_up(m, cute::size<0>(typename Kernel::TileShape{})),
                                                  div_up(n, cute::size<1>(typename Kernel::TileShape{})),
                                                  cute::size<0>(Cluster{}), cute::size<1>(Cluster{})});
    return args;
}

template <class Device>
int launch_device(const typename Device::Arguments &args, void *workspace, int64_t bytes,
                  cudaStream_t stream) {
    if (!has_tensor_maps())
        return kNoTensorMap;
    if (Device::get_workspace_size(args) > static_cast<size_t>(bytes))
        return kBadArgument;
    Device gemm;
    if (gemm.initialize(args, workspace, stream) != cutlass::Status::kSuccess)
        return kCutlassRefused;
    if (gemm.run(stream) != cutlass::Status::kSuccess) {
        const cudaError_t e = cudaGetLastError();
        return e != cudaSuccess ? static_cast<int>(e) : static_cast<int>(kCutlassRefused);
    }
    return kOk;
}

template <class Out, bool kSwapped, class Tile, class Cluster, class MainSchedule, class EpilogueSchedule,
          class Scheduler>
struct Gemm {
    using Layout = std::conditional_t<kSwapped, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
    using Finish = FinishTree<Out, Tile, kSwapped>;
    static constexpr int kOutAlignment = 16 / sizeof(Out);
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, Layout, kOutAlignment, Out,
        Layout, kOutAlignment, EpilogueSchedule, typename Finish::Tree>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
        cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
            sizeof(typename Epilogue::SharedStorage))>,
        MainSchedule>::CollectiveOp;
    using Kernel =
        cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
    using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    static typename Device::Arguments arguments(const Int8Linear &a,
                                                const cutlass::KernelHardwareInfo &hardware) {
        const int m = static_cast<int>(a.m), n = static_cast<int>(a.n), k = static_cast<int>(a.k);
        auto args = device_arguments<Device>(kSwapped ? n : m, kSwapped ? m : n, k, hardware);
        const auto *x = static_cast<const int8_t *>(a.x);
        args.mainloop.ptr_A = kSwapped ? a.weight : x;
        args.mainloop.dA = {kSwapped ? a.ldw : a.ldx, _1{}, 0};
        args.mainloop.ptr_B = kSwapped ? x : a.weight;
        args.mainloop.dB = {kSwapped ? a.ldx : a.ldw, _1{}, 0};
        args.epilogue.thread = Finish::arguments(a);
        args.epilogue.ptr_D = static_cast<Out *>(a.y);
        if constexpr (kSwapped)
            args.epilogue.dD = {_1{}, a.ldy, 0};
        else
            args.epilogue.dD = {a.ldy, _1{}, 0};
        return args;
    }
    static int run(const Int8Linear &a, cudaStream_t stream) {
        cutlass::KernelHardwareInfo hardware;
        if (const cudaError_t e = cudaGetDevice(&hardware.device_id); e != cudaSuccess)
            return static_cast<int>(e);
        hardware.sm_count = multiprocessors(hardware.device_id);
        return launch_device<Device>(arguments(a, hardware), a.workspace, a.workspace_bytes, stream);
    }
    static int64_t workspace(const Int8Linear &a, int multiprocessors) {
        cutlass::KernelHardwareInfo hardware;
        hardware.sm_count = multiprocessors;
        return static_cast<int64_t>(Device::get_workspace_size(arguments(a, hardware)));
    }
};

} // namespace

// The launcher of one line of int8_linear_instances.h, and what it needs of a workspace.
#define TAUTORCH_DEFINE_SM90A(name, swapped, tm, tn, tk, cm, cn, main_schedule, epilogue_schedule,           \
                              scheduler)                                                                     \
    namespace {                                                                                              \
    template <class Out>                                                                                     \
    using Gemm_##name = Gemm<Out, swapped, Shape<Int<swapped ? tn : tm>, Int<swapped ? tm : tn>, Int<tk>>,   \
                             Shape<Int<cm>, Int<cn>, _1>, cutlass::gemm::main_schedule,                      \
                             cutlass::epilogue::epilogue_schedule, cutlass::gemm::scheduler>;                \
    }                                                                                                        \
    int int8_linear_##name(const Int8Linear &a, void *stream) {                                              \
        return by_size(a.out_dtype, [&](auto out) {                                                          \
            return Gemm_##name<decltype(out)>::run(a, static_cast<cudaStream_t>(stream));                    \
        });                                                                                                  \
    }                                                                                                        \
    int64_t int8_linear_workspace_##name(const Int8Linear &a, int multiprocessors) {                         \
        return by_size(a.out_dtype,                                                                          \
                       [&](auto out) { return Gemm_##name<decltype(out)>::workspace(a, multiprocessors); }); \
    }

} // namespace tautorch::cuda
