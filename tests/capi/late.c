/* tt_run after the thread's destructors, as a handler of exit() calls it: its output, and others' memory. */
#include "tautorch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 512, K = 512, M = 64, BLOCKS = 64 };

static tt_plan plan;
static float x[M * K], y[M * N], late_y[M * N];
static int8_t w[N * K];

static void late(void) {
    unsigned char *blocks[BLOCKS];
    size_t sizes[BLOCKS];
    int spoiled = 0;
    for (int i = 0; i < BLOCKS; ++i) { /* some of them where the buffers have been */
        sizes[i] = 200 + (size_t)i * 1777 % 120000;
        blocks[i] = malloc(sizes[i]);
        memset(blocks[i], 0xAA, sizes[i]);
    }
    const tt_status status = tt_run(&plan, x, M, late_y);
    for (int i = 0; i < BLOCKS; ++i)
        for (size_t j = 0; j < sizes[i]; ++j)
            if (blocks[i][j] != 0xAA) {
                ++spoiled;
                break;
            }
    printf("status %d, same %d, spoiled %d\n", (int)status, !memcmp(y, late_y, sizeof y), spoiled);
    fflush(stdout);
}

int main(void) {
    size_t bytes;
    tt_layer layer = {0};
    for (int i = 0; i < N * K; ++i)
        w[i] = (int8_t)(i * 7919 % 255 - 127);
    for (int i = 0; i < M * K; ++i)
        x[i] = (float)(i * 31 % 101) / 50.0f - 1.0f;
    if (tt_dense_pack_size(NULL, TT_WEIGHTS_INT8, N, K, &bytes))
        return 1;
    void *packed = aligned_alloc(64, (bytes + 63) / 64 * 64);
    layer.packed = packed;
    layer.packed_bytes = bytes;
    layer.inputs = K;
    layer.outputs = N;
    if (tt_dense_pack(NULL, TT_WEIGHTS_INT8, N, K, w, packed, bytes) || tt_linear_plan(&layer, &plan))
        return 1;
    atexit(late); /* before the first run, whose destructors so come first */
    return (int)tt_run(&plan, x, M, y);
}
