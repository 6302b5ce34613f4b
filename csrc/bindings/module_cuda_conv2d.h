// What the convolutions' CUDA bindings share: all of a call but how weights are packed.
#pragma once

#include "bindings/module_cuda.h"
#include "kernels/int8_conv2d/int8_conv2d_cuda.h"

#include <algorithm>
#include <iterator>

namespace tautorch::bindings {

// x quantised or copied, one scale a sample, 16 bytes of what lies around the image, one peak a sample.
struct ConvWorkspace {
    Workspace rows;
    int64_t outside_off, peaks_off, bytes;
};

// A sample is a row; its bytes follow the one before, because channels are a multiple of 16.
inline ConvWorkspace conv_workspace(int64_t batch, int64_t sample) {
    ConvWorkspace w{};
    w.rows = workspace_of(batch, sample, 1);
    w.outside_off = w.rows.bytes;
    w.peaks_off = w.outside_off + cuda::kLine;
    w.bytes = w.peaks_off + round_up(4 * batch, cuda::kLine);
    return w;
}

// plan, kernel index (-1: choose), x [batch, height, width, channels] on 16 bytes, x dtype, batch, height,
// width, y, ldy, y dtype, workspace, device, stream -> index of the kernel that was launched.
template <class Op> int64_t conv_run(Args &in) {
    const auto p = in.plan<CudaPlan<cuda::Int8Conv2d>>();
    cuda::Int8Conv2d a = p.args;
    const int64_t index = in.integer();
    const void *x = in.pointer<const void>();
    const auto x_dtype = static_cast<DType>(in.integer());
    a.batch = in.integer();
    a.height = in.integer();
    a.width = in.integer();
    a.y = in.pointer<void>();
    a.ldy = in.integer();
    a.out_dtype = static_cast<DType>(in.integer());
    auto *workspace = in.pointer<uint8_t>();
    const int device = static_cast<int>(in.integer());
    const auto stream = static_cast<cudaStream_t>(in.pointer<void>());
    in.done();

    const py::gil_scoped_release release;
    const DeviceGuard guard(device);
    const DeviceFacts facts = facts_of(device);
    if (Op::supports(facts.capability, 1, a.channels, a.outputs, a.taps_h * a.taps_w) != nullptr)
        fail(Op::kName, cuda::kNoKernel);
    int rows = 0;
    const cuda::Int8Conv2dKernel *table = Op::kernels(&rows);
    const int64_t pixels = a.batch * a.out_height() * a.out_width();
    const cuda::Int8Conv2dKernel *kernel =
        index >= 0 && index < rows ? table + index : Op::choose(facts.multiprocessors, pixels, a.outputs);
    if (a.batch == 0)
        return kernel - table;
    const int64_t sample = a.height * a.width * a.channels;
    const ConvWorkspace w = conv_workspace(a.batch, sample);
    const Operand operand =
        prepare_rows({x, x_dtype, a.batch, sample, sample, 1}, p.mode, a.x_scale, a.x_zero_point, workspace,
                     stream, reinterpret_cast<uint32_t *>(workspace + w.peaks_off));
    a.x = static_cast<const int8_t *>(operand.x);
    a.outside = reinterpret_cast<int8_t *>(workspace + w.outside_off);
    if (operand.scale != nullptr) {
        a.x_scale = operand.scale;
        a.x_scale_per_sample = true;
    }
    check(Op::kName, cuda::int8_conv2d_run(*kernel, a, stream));
    return kernel - table;
}

// Op: kName, kUnit (bytes of 64 outputs by 64 of K), kernels(int *), supports(...), choose(...).
template <class Op> void bind_conv(py::module_ &m) {
    static const std::string name = Op::kName;
    m.def((name + "_kernels").c_str(), [] { return names_of(Op::kernels); });
    m.def((name + "_supports").c_str(),
          [](int capability, int64_t groups, int64_t channels, int64_t outputs, int64_t taps) {
              const char *why = Op::supports(capability, groups, channels, outputs, taps);
              return why ? py::object(py::str(why)) : py::none();
          });
    m.def((name + "_choose").c_str(), [](int multiprocessors, int64_t pixels, int64_t outputs) {
        return Op::choose(std::max(multiprocessors, 1), pixels, outputs)->name;
    });
    m.def((name + "_layout").c_str(), [](int64_t outputs, int64_t k) {
        const cuda::GemmLayout l = cuda::gemm_layout(outputs, k, Op::kUnit);
        py::dict d;
        d["sums_off"] = l.sums_off;
        d["total"] = l.total;
        return d;
    });
    // geometry: channels, kh, kw, sh, sw, ph, pw, dh, dw
    m.def((name + "_plan").c_str(),
          [](int64_t packed, int64_t outputs, const py::tuple &geometry, const py::dict &tail) {
              CudaPlan<cuda::Int8Conv2d> p{};
              cuda::Int8Conv2d &a = p.args;
              int64_t *to[] = {&a.channels,  &a.taps_h,    &a.taps_w,     &a.stride_h,  &a.stride_w,
                               &a.padding_h, &a.padding_w, &a.dilation_h, &a.dilation_w};
              if (geometry.size() != std::size(to))
                  throw py::value_error(name + ": geometry must have 9 numbers");
              for (size_t i = 0; i < std::size(to); ++i)
                  *to[i] = geometry[i].cast<int64_t>();
              if (a.stride_h < 1 || a.stride_w < 1)
                  throw py::value_error(name + ": stride must be at least 1");
              a.outputs = outputs;
              a.units = at<const uint8_t>(packed);
              a.sums = at<const int32_t>(packed + cuda::gemm_layout(outputs, a.k(), Op::kUnit).sums_off);
              fill_plan(p, tail);
              a.x_scale_per_sample = tail["x_scales"].cast<int64_t>() > 1;
              if (p.mode == ActQuant::none)
                  throw py::value_error(
                      name + ": the CUDA kernels quantise x; weight-only products do not run there");
              return as_plan(p);
          });
    m.def((name + "_workspace").c_str(),
          [](int64_t batch, int64_t sample) -> int64_t { return conv_workspace(batch, sample).bytes; });
    static const std::string run = name + "_run";
    static PyMethodDef method = {
        run.c_str(), as_function(&launched<conv_run<Op>>), METH_FASTCALL,
        "(plan, kernel, x, x_dtype, batch, height, width, y, ldy, y_dtype, workspace, "
        "device, stream) -> kernel"};
    PyModule_AddObject(m.ptr(), method.ml_name, PyCFunction_New(&method, nullptr));
}

} // namespace tautorch::bindings
