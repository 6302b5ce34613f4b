// 2:4 on Hopper: CUTLASS 3's sparse mainloop (wgmma.sp s8 x s8 -> s32). The sparse operand is A, so the
// weights are, and the epilogue is that of int8_linear's swapped tiles.
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
#include "kernels/int8_linear/int8_linear_sm90a.cuh"
#include "kernels/sparse_linear/sparse_linear_cuda.h"

namespace tautorch::cuda {
namespace {

template <class Out, class Tile, class Cluster> struct SparseGemm {
    using Finish = FinishTree<Out, Tile, true>;
    using Layout = cutlass::layout::ColumnMajor;
    static constexpr int kOutAlignment = 16 / sizeof(Out);
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, Layout, kOutAlignment, Out,
        Layout, kOutAlignment, cutlass::epilogue::TmaWarpSpecializedCooperative,
        typename Finish::Tree>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, int8_t, cutlass::layout::RowMajor, 32,
        int8_t, cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
            sizeof(typename Epilogue::SharedStorage))>,
        cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                        cutlass::gemm::PersistentScheduler>;
    using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    using Config = typename Mainloop::SparseConfig;
    // What wgmma_layout() lays out: places of a row and a step of K are 16 adjacent bytes, rows follow
    // each other, then steps.
    using Atom = typename Config::TensorEAtom;
    static_assert(cute::size<0>(Atom{}) == kWgmmaRows && cute::size<1>(Atom{}) == kWgmmaStep);
    static_assert(
        cute::is_same_v<cute::remove_cvref_t<decltype(cute::stride(Atom{}))>, Stride<Int<kWgmmaStep>, _1>>);

    static int run(const Int8Linear &a, cudaStream_t stream) {
        cutlass::KernelHardwareInfo hardware;
        if (const cudaError_t e = cudaGetDevice(&hardware.device_id); e != cudaSuccess)
            return static_cast<int>(e);
        hardware.sm_count = multiprocessors(hardware.device_id);
        const WgmmaLayout l = wgmma_layout(a.n, a.k);
        const int m = static_cast<int>(a.m), n = static_cast<int>(a.n), k = static_cast<int>(2 * l.ld);
        // x is not read past a.k, nor are there more steps; the weights have zeros to where their rows end.
        auto args = device_arguments<Device>(n, m, static_cast<int>(a.k), hardware);
        args.mainloop.ptr_A = a.weight;
        args.mainloop.layout_a = Config::fill_layoutA(cute::make_tuple(n, m, k, 1));
        args.mainloop.ptr_B = static_cast<const int8_t *>(a.x);
        args.mainloop.dB = {a.ldx, _1{}, 0};
        args.mainloop.ptr_E = reinterpret_cast<const typename Mainloop::ElementE *>(a.weight + l.places_off);
        args.mainloop.layout_e = Config::fill_layoutE(cute::make_tuple(n, m, k, 1));
        args.epilogue.thread = Finish::arguments(a);
        args.epilogue.ptr_D = static_cast<Out *>(a.y);
        args.epilogue.dD = {_1{}, a.ldy, 0};
        return launch_device<Device>(args, nullptr, 0, stream);
    }
};

} // namespace

#define TAUTORCH_DEFINE(name, tm, tn, tk, cm, cn)                                                            \
    int sparse_linear_##name(const Int8Linear &a, void *stream) {                                            \
        return by_size(a.out_dtype, [&](auto out) {                                                          \
            return SparseGemm<decltype(out), Shape<Int<tn>, Int<tm>, Int<tk>>,                               \
                              Shape<Int<cn>, Int<cm>, _1>>::run(a, static_cast<cudaStream_t>(stream));       \
        });                                                                                                  \
    }
TAUTORCH_SPARSE_LINEAR_24_SM90A(TAUTORCH_DEFINE)
#undef TAUTORCH_DEFINE

} // namespace tautorch::cuda
