/* tautorch in C: compressed linear layers on a CPU, without Python or torch.
 *
 * Three steps. Pack a layer's weights once, for a kernel that this CPU runs; make a plan of the layer once,
 * which checks everything there is to check; run the plan on rows of input, as often as you like:
 *
 *     size_t bytes;
 *     tt_dense_pack_size(NULL, TT_WEIGHTS_INT8, outputs, inputs, &bytes);
 *     void *packed = aligned_alloc(64, bytes);                     // bytes is a multiple of 64
 *     tt_dense_pack(NULL, TT_WEIGHTS_INT8, outputs, inputs, weight, packed, bytes);
 *
 *     tt_layer layer = {0};
 *     layer.packed = packed;   layer.packed_bytes = bytes;
 *     layer.inputs = inputs;   layer.outputs = outputs;
 *     layer.weight_scale = weight_scale;   layer.bias = bias;      // float [outputs]
 *     layer.activation = TT_RELU;
 *     tt_plan plan;
 *     tt_linear_plan(&layer, &plan);
 *
 *     tt_run(&plan, x, rows, y);                                   // float [rows][inputs] -> [rows][outputs]
 *
 * Every function that can fail returns a tt_status, and then tt_last_error() says what was expected and got.
 * A bad size, code, scale, list or pack, and a plan that is not as it was made, is an error and nothing else;
 * buffers must be as large as they are said to be.
 *
 * Memory. Nothing is allocated but (a) a thread-local workspace of each thread that runs plans, which grows
 * to what the largest call needed, is made smaller (if over 16 MB) after a thousand calls that needed little
 * of it, and is freed when the thread ends, (b) messages, (c) the threads of tt_set_threads and (d) lists
 * while tt_sparse_pack runs. Plans hold addresses: packed weights, scales and biases must stay where and as
 * they are for as long as a plan is run; no call looks at them again.
 *
 * Threads. Everything runs on the calling thread until tt_set_threads or tt_set_thread_pool. Any number of
 * threads may pack, plan and run at once, the same plan too; while one runs on the pool, others run on
 * themselves alone.
 *
 * Numbers. Integers are the same on every kernel and device as those of tautorch in Python; docs/c.md has the
 * contract.
 */
#ifndef TAUTORCH_H
#define TAUTORCH_H

#include <stddef.h>
#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#if defined(TAUTORCH_BUILD)
#define TT_API __attribute__((visibility("default")))
#else
#define TT_API
#endif

/* Changes when a caller must be compiled again; the shared library's SONAME has it. */
#define TT_ABI_VERSION 1
TT_API int32_t tt_abi_version(void);
/* The library's version, "0.1.0". */
TT_API const char *tt_version(void);

typedef enum tt_status {
    TT_OK = 0,
    TT_INVALID = 1,       /* an argument, weight, pack or plan is wrong */
    TT_OUT_OF_MEMORY = 2, /* of the workspace, or of threads */
    TT_FAILED = 3         /* the thread pool that was set reported an error */
} tt_status;

/* What went wrong in the last call on this thread that did not return TT_OK; "" where none has. Valid until
 * the next such call on this thread. */
TT_API const char *tt_last_error(void);

/* ---- kernels ---- */

/* The i-th kernel of this build, best first; NULL from the last one on. "avx512vnni", "avxvnni", "avx2",
 * "neon_i8mm", "neon_dotprod", "neon", "scalar", as far as the architecture has them. */
TT_API const char *tt_kernel_name(int32_t i);
/* 1 if this CPU runs the kernel of that name, else 0. */
TT_API int32_t tt_kernel_runs(const char *name);

/* ---- threads ---- */

/* Runs plans on n threads: the caller's and n - 1 of the library's own; 1 ends these. Not while a plan runs.
 * In a forked child everything runs on the calling thread. */
TT_API tt_status tt_set_threads(int32_t n);

typedef void (*tt_range_fn)(int64_t begin, int64_t end, void *context);
/* Calls fn(b, e, context) on disjoint ranges that make up [begin, end), from any threads, and returns 0 when
 * all are done; `grain` is the least length of a range that is worth a thread. A thread that waits in it may
 * run other ranges and other plans meanwhile: these have a workspace of their own, freed when they end. */
typedef int32_t (*tt_parallel_for_fn)(int64_t begin, int64_t end, int64_t grain, tt_range_fn fn,
                                      void *context);
/* Writes how many threads that uses; returns 0. */
typedef int32_t (*tt_num_threads_fn)(uint32_t *count);
/* Runs plans in the caller's pool; NULL, NULL for none. Not while a plan runs. */
TT_API tt_status tt_set_thread_pool(tt_parallel_for_fn parallel_for, tt_num_threads_fn num_threads);

/* ---- packing ---- */

/* A pack is a block of bytes for one kernel, and says itself what it holds: it may be stored and mapped, and
 * is refused by a CPU or a build that cannot run it. It starts on 64 bytes for speed, on 8 at least. kernel:
 * a name; NULL for the best one. To force a kernel, pack for it. */

/* What weights are; `kind` below. */
typedef enum tt_weights {
    TT_WEIGHTS_INT8 = 0,  /* int8, symmetric: int8 activations, quantised by tt_run unless x is int8 */
    TT_WEIGHTS_FLOAT = 1, /* float: float activations */
    TT_WEIGHTS_INT8_FLOAT_X =
        2 /* int8 by float activations ("weight only"); not for sparse and low-rank layers */
} tt_weights;

/* weight: int8_t or float [outputs][inputs], row after row. */
TT_API tt_status tt_dense_pack_size(const char *kernel, int32_t kind, int64_t outputs, int64_t inputs,
                                    size_t *bytes);
TT_API tt_status tt_dense_pack(const char *kernel, int32_t kind, int64_t outputs, int64_t inputs,
                               const void *weight, void *packed, size_t bytes);

/* Weights most of which are zero. `group` outputs (1, or 4 for 4x1 blocks and larger ones) share a list of
 * the inputs that they keep: group g keeps index[start[g]] ... index[start[g + 1] - 1], ascending. */
typedef struct tt_sparse {
    int64_t outputs, inputs; /* inputs: at most 65536 */
    int32_t group;           /* 1 or 4 */
    int64_t entries;         /* of index */
    const uint32_t *start; /* [groups + 1], groups = outputs / group, rounded up; the last one is `entries` */
    const uint16_t *index; /* [entries] */
    const void *values;    /* int8_t or float [entries][group] */
} tt_sparse;
TT_API tt_status tt_sparse_pack_size(const char *kernel, int32_t kind, const tt_sparse *weight,
                                     size_t *bytes);
TT_API tt_status tt_sparse_pack(const char *kernel, int32_t kind, const tt_sparse *weight, void *packed,
                                size_t bytes);

/* ---- layers ---- */

typedef enum tt_dtype { TT_FLOAT32 = 0, TT_BFLOAT16 = 1, TT_FLOAT16 = 2, TT_INT8 = 3, TT_INT32 = 4 } tt_dtype;
typedef enum tt_activation {
    TT_NONE = 0,
    TT_RELU = 1,
    TT_GELU = 2,
    TT_GELU_TANH = 3,
    TT_SILU = 4
} tt_activation;

/* y = activation(x W^T * scales + bias). Start from {0}: every 0 is a sensible choice. */
typedef struct tt_layer {
    const void *packed;
    size_t packed_bytes;
    int64_t inputs, outputs;
    const float *weight_scale; /* [outputs], or NULL for 1 */
    const float *bias;         /* [outputs], or NULL */
    int32_t activation;        /* tt_activation */

    int32_t x_dtype;  /* tt_dtype: TT_FLOAT32, TT_BFLOAT16, TT_FLOAT16; TT_INT8 by TT_WEIGHTS_INT8 */
    int64_t x_stride; /* elements from a row of x to the next; 0: inputs */
    int32_t y_dtype;  /* tt_dtype: any; TT_INT8 needs y_scale; TT_INT32 are the accumulators alone */
    int64_t y_stride; /* elements from a row of y to the next; 0: outputs */

    float x_scale; /* static scale of x; 0: each row has its own, found by tt_run (TT_INT8 x needs one) */
    int32_t x_zero_point; /* with x_scale: x is x_scale * (q - x_zero_point) */
    float y_scale;        /* of TT_INT8 y */
    int32_t y_zero_point; /* of TT_INT8 y */
} tt_layer;

/* A layer, checked: opaque, and copyable. */
typedef struct tt_plan {
    uint64_t opaque[64];
} tt_plan;

/* Of dense or sparse weights. Reads sparse lists through once. */
TT_API tt_status tt_linear_plan(const tt_layer *layer, tt_plan *plan);

/* y = activation(up(down(x)) * scales + bias): layer->packed is down [rank][inputs], layer->weight_scale is
 * of up [outputs][rank]. Both are of the same kind, TT_WEIGHTS_INT8 or TT_WEIGHTS_FLOAT, and of the same
 * kernel. */
TT_API tt_status tt_lowrank_plan(const tt_layer *layer, const void *up, size_t up_bytes,
                                 const float *down_scale, tt_plan *plan);

/* Name of the kernel that the plan's weights are packed for; NULL for what is no plan. */
TT_API const char *tt_plan_kernel(const tt_plan *plan);

/* rows may be 0. x and y do not overlap. A row of x with NaN or Inf gives a row of NaN where x is quantised.
 */
TT_API tt_status tt_run(const tt_plan *plan, const void *x, int64_t rows, void *y);

#if defined(__cplusplus)
}
#endif

#endif
