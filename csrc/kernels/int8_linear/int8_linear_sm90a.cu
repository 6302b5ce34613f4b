// int8_linear on Hopper: CUTLASS 3's warp-specialised mainloop (TMA into shared memory, wgmma s8 x s8 -> s32
// into registers) with our epilogue as a visitor tree, stored by TMA. Persistent: one block per
// multiprocessor.
//
// TMA clips boxes at the tensor's edge, so any m, n, k works: reads outside are zeros, writes outside do not
// happen. CUTLASS's own can_implement() would refuse n or k off 16 bytes; it is not asked, only strides and
// addresses need that and int8_linear_run() checks them.
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/kernel_hardware_info.hpp"
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

template <class Out, class Tile, class Cluster, class MainSchedule, class EpilogueSchedule> struct Gemm {
    // A run-time stride of 0 or 1: x_scale is one value or one per row.
    using XScale = fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<bool, _0, _0>>;
    using WScale = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, _1, _0>>;
    using Sums = fusion::Sm90RowBroadcast<0, Tile, int32_t, int32_t, Stride<_0, _1, _0>>;
    using Bias = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, _1, _0>>;
    using Tree = fusion::Sm90EVT<FinishNode<Out>, XScale, WScale, Sums, Bias>;

    static constexpr int kOutAlignment = 16 / sizeof(Out);
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, cutlass::layout::RowMajor,
        kOutAlignment, Out, cutlass::layout::RowMajor, kOutAlignment, EpilogueSchedule, Tree>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
        cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
            sizeof(typename Epilogue::SharedStorage))>,
        MainSchedule>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                        cutlass::gemm::PersistentScheduler>;
    using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
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

template <class G, class Out> int launch(const Int8Linear &a, cudaStream_t stream) {
    using Device = typename G::Device;
    if (!has_tensor_maps())
        return kNoTensorMap;
    int device = 0;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess)
        return static_cast<int>(e);
    cutlass::KernelHardwareInfo hardware;
    hardware.device_id = device;
    hardware.sm_count = multiprocessors(device);

    const typename G::Tree::Arguments tree{
        typename G::XScale::Arguments{a.x_scale, 0.f, {a.x_scale_per_row, _0{}, _0{}}},
        typename G::WScale::Arguments{a.w_scale, 0.f, {}},
        typename G::Sums::Arguments{a.x_zero_point ? a.sums : nullptr, 0, {}},
        typename G::Bias::Arguments{a.bias, 0.f, {}},
        FinishArguments{a.x_zero_point, a.out_scale, a.out_zero_point, a.activation, a.out_dtype}};

    typename Device::Arguments args{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(a.m), static_cast<int>(a.n), static_cast<int>(a.k), 1},
        {static_cast<const int8_t *>(a.x), {a.ldx, _1{}, 0}, a.weight, {a.ldw, _1{}, 0}},
        {tree, nullptr, {}, static_cast<Out *>(a.y), {a.ldy, _1{}, 0}},
        hardware};
    // Neighbouring tiles share rows of w and x in L2.
    args.scheduler.max_swizzle_size = 8;

    Device gemm;
    if (Device::get_workspace_size(args) != 0 ||
        gemm.initialize(args, nullptr, stream) != cutlass::Status::kSuccess)
        return kCutlassRefused;
    if (gemm.run(stream) != cutlass::Status::kSuccess) {
        const cudaError_t e = cudaGetLastError();
        return e != cudaSuccess ? static_cast<int>(e) : static_cast<int>(kCutlassRefused);
    }
    return kOk;
}

} // namespace

#define TAUTORCH_DEFINE(name, tm, tn, tk, cm, cn, main_schedule, epilogue_schedule)                          \
    int int8_linear_##name(const Int8Linear &a, void *stream) {                                              \
        using Tile = Shape<Int<tm>, Int<tn>, Int<tk>>;                                                       \
        using Cluster = Shape<Int<cm>, Int<cn>, _1>;                                                         \
        using Main = cutlass::gemm::main_schedule;                                                           \
        using Epilogue = cutlass::epilogue::epilogue_schedule;                                               \
        const auto s = static_cast<cudaStream_t>(stream);                                                    \
        switch (size_of(a.out_dtype)) {                                                                      \
        case 4:                                                                                              \
            return launch<Gemm<int32_t, Tile, Cluster, Main, Epilogue>, int32_t>(a, s);                      \
        case 2:                                                                                              \
            return launch<Gemm<uint16_t, Tile, Cluster, Main, Epilogue>, uint16_t>(a, s);                    \
        default:                                                                                             \
            return launch<Gemm<int8_t, Tile, Cluster, Main, Epilogue>, int8_t>(a, s);                        \
        }                                                                                                    \
    }
TAUTORCH_INT8_LINEAR_SM90A(TAUTORCH_DEFINE)
#undef TAUTORCH_DEFINE

} // namespace tautorch::cuda
