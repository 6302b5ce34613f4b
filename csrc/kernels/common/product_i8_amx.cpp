// int8 panels by AMX: tiles of 16 rows of 64 bytes, 16 x 16 sums of 64 products each in 16 cycles.
//
// A step of 64 inputs loads two tiles of rows and two of weights for four products. On Granite Rapids tiles
// in registers multiply at 6.4 TOPS, with a load for each product at 5.1. Sums leave through memory, L1:
// there is no way from tiles to vectors.
#include "kernels/common/finish_avx512vnni.h"

namespace tautorch {
namespace {

constexpr int kRows = 16;         // of a tile
constexpr int64_t kInputs = 64;   // of a step
constexpr int kChunk = 4;         // rows that leave together
constexpr int64_t kMostLines = 8; // fetched beside a step
// Panels one after another (few inputs): from so many on, rows that take all of them before the next ones
// begin (1.35 times as fast at 128 x 4096, 0.9 times at 128 x 512), as rows a multiple of 4 KB apart share
// few sets of L1, and stores have few pages. A single step of inputs is left to vectors sooner (1.3 times as
// fast at 64 x 1024, and at 64 x 256 with 3136 rows; 0.85 times with 1024).
constexpr int64_t kManyPanels = 8, kManyPanelsOfStep = 4;
constexpr int kTogether = 32; // such rows

// asm, because the intrinsics take nothing but literal numbers of tiles.
template <int Tile> inline void load_tile(const void *from, int64_t step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(step), "n"(Tile) : "memory");
}
template <int Tile> inline void store_tile(void *to, int64_t step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(step), "n"(Tile) : "memory");
}
// Rows, signed or not, by signed weights.
template <bool Signed, int Sums, int X, int W> inline void multiply() {
    if (Signed)
        asm volatile("tdpbssd %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "n"(W), "n"(X), "n"(Sums));
    else
        asm volatile("tdpbusd %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "n"(W), "n"(X), "n"(Sums));
}

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
    explicit TileConfig(int n) { // rows of all tiles but those of weights
        for (int i = 0; i < 8; ++i)
            rows[i] = static_cast<uint8_t>(i < 6 ? n : kRows);
    }
};
// Reading the configuration takes 5 ns, writing it 50, and what runs does not overlap it. So it stays when a
// call ends: whoever uses tiles besides configures them anew, as we do.
void configure(int rows) {
    const TileConfig want(rows);
    TileConfig is(0);
    asm volatile("sttilecfg %0" : "=m"(is));
    if (std::memcmp(&is, &want, sizeof is) != 0)
        asm volatile("ldtilecfg %0" : : "m"(want));
}

struct PanelRun;

// Sums of a tile, [rows][columns], that are on their way out.
struct Leaving {
    void (*some)(PanelRun &) = nullptr; // kChunk rows more, or all
    const int32_t *sums = nullptr;
    int column = 0;
    int first[2] = {}; // row of p, of each 16
    int row = 0, rows = 0;
};

struct PanelRun {
    ProductI8 p;
    const char *x;
    int64_t steps;  // whole ones
    int tail;       // groups of 4 inputs beyond
    int64_t lines;  // to fetch with every step
    bool meanwhile; // sums leave while the next tile's products run
    bool straight;  // sums are the output
    const int8_t *next, *next_end;
    Leaving leaving;
    int turn = 0;
    alignas(64) int32_t from[64]; // what the sums of a row start from
    alignas(64) float scale[64], bias[64];
    alignas(64) int8_t tail_weights[kRows * 256];
    alignas(64) int32_t sums[2][2 * kRows * 64];

    // Rows at raw are multiplied as they are.
    explicit PanelRun(const ProductI8 &given)
        : p(given), x(given.raw ? given.raw : static_cast<const char *>(given.rows[0])) {
        steps = p.kq / 16;
        tail = static_cast<int>(p.kq % 16);
        // 20 % of the time for floats and 1024 and 1536 inputs. Where there are fewer, the core looks far
        // enough ahead by itself, and calls between the steps cost 10 %, as they do for int8 output.
        straight = p.epilogue->out_dtype == DType::i32 && p.cols == p.width && !p.out_row;
        meanwhile = !straight && steps >= 16 && size_of(p.epilogue->out_dtype) > 1;
    }
    void prepare() {
        const Epilogue &e = *p.epilogue;
        for (int i = 0; i < p.width; i += 16) {
            __m512i sum = start(p, i);
            if (p.raw) // the correction is for x + 128
                sum = _mm512_add_epi32(
                    sum,
                    _mm512_slli_epi32(_mm512_maskz_loadu_epi32(first(p.cols - i), e.colsum + p.n0 + i), 7));
            _mm512_store_si512(from + i, sum);
            _mm512_store_ps(scale + i, load_or(e.w_scale, p.n0 + i, p.cols - i, 1.0f));
            _mm512_store_ps(bias + i, load_or(e.bias, p.n0 + i, p.cols - i, 0.0f));
        }
        if (tail) {
            const size_t there = static_cast<size_t>(tail * 4 * p.width);
            std::memcpy(tail_weights, p.panel + steps * kInputs * p.width, there);
            std::memset(tail_weights + there, 0, static_cast<size_t>(kRows * 4 * p.width) - there);
        }
    }
    void all_leave() {
        while (leaving.row < leaving.rows)
            leaving.some(*this);
    }
    // Columns [i, i + 16 * Columns) of 16 rows from each of first[0 .. Rows) on, of which `rows` are there.
    template <int Rows, int Columns> void tile(int i, int first0, int first1, int rows);
};

// Rows [l.row, end), whole in their columns: by the arithmetic of epilogue.h, as
// finish().
template <int Columns, DType To> void rows_leave(PanelRun &run, int end) {
    Leaving &l = run.leaving;
    const ProductI8 &p = run.p;
    const Epilogue &e = *p.epilogue;
    __m512 w[Columns], b[Columns];
    for (int v = 0; v < Columns; ++v) {
        w[v] = _mm512_load_ps(run.scale + l.column + 16 * v);
        b[v] = _mm512_load_ps(run.bias + l.column + 16 * v);
    }
    // max gives back its second operand where either is NaN: a row of NaN stays one.
    const __m512 least =
        e.activation == Activation::relu ? _mm512_setzero_ps() : _mm512_set1_ps(-__builtin_inff());
    const Requantize q(e);
    const int32_t *sums = l.sums + l.row * 16 * Columns;
    char *const out = p.out + l.column * size_of(To);
    const float *const addend = e.addend ? e.addend + l.column : nullptr;
    for (; l.row < end; ++l.row, sums += 16 * Columns) {
        const int r = l.first[l.row / kRows] + l.row % kRows;
        char *const to = out + (p.out_row ? p.out_row[r] : r) * p.row_bytes;
        const __m512 scale = _mm512_set1_ps(p.row_scale[r]);
        __m512 y[Columns + 1]; // one more, so that all go by twos
        y[Columns] = _mm512_setzero_ps();
        for (int v = 0; v < Columns; ++v) {
            y[v] = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * v));
            y[v] = _mm512_mul_ps(_mm512_mul_ps(y[v], scale), w[v]);
            if (addend)
                y[v] = quiet(_mm512_add_ps(y[v], _mm512_loadu_ps(addend + r * e.addend_stride + 16 * v)));
            y[v] = _mm512_add_ps(y[v], b[v]);
            if (To != DType::i8)
                y[v] = _mm512_max_ps(least, y[v]);
            if (To == DType::f32)
                _mm512_storeu_ps(to + 64 * v, y[v]);
            else if (To == DType::f16)
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + 32 * v),
                                    _mm512_cvtps_ph(y[v], _MM_FROUND_TO_NEAREST_INT));
        }
        for (int v = 0; v < Columns && To != DType::f32 && To != DType::f16; v += 2) {
            const bool two = v + 1 < Columns;
            if (To == DType::bf16) {
                const __m512i c = bf16_of(y[v], y[v + 1]);
                if (two)
                    _mm512_storeu_si512(to + 32 * v, c);
                else
                    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + 32 * v), _mm512_castsi512_si256(c));
            } else {
                const __m256i c = q(y[v], y[v + 1]);
                if (two)
                    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + 16 * v), c);
                else
                    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + 16 * v), _mm256_castsi256_si128(c));
            }
        }
    }
}
template <int Columns, DType To> void some_leave(PanelRun &run) {
    const Leaving &l = run.leaving;
    rows_leave<Columns, To>(run, !run.meanwhile || l.row + kChunk > l.rows ? l.rows : l.row + kChunk);
}
// Int32, and columns that are not all there.
template <int Columns> void any_leave(PanelRun &run) {
    Leaving &l = run.leaving;
    for (; l.row < l.rows; ++l.row) {
        __m512i c[1][Columns];
#pragma GCC unroll 4
        for (int v = 0; v < Columns; ++v)
            c[0][v] = _mm512_load_si512(l.sums + l.row * 16 * Columns + 16 * v);
        finish<1, Columns>(run.p, l.column, l.first[l.row / kRows] + l.row % kRows, c);
    }
}
template <int Columns> auto leave(const ProductI8 &p, int i) -> void (*)(PanelRun &) {
    const Epilogue &e = *p.epilogue;
    if (p.cols - i < 16 * Columns)
        return any_leave<Columns>;
    switch (e.out_dtype) {
    case DType::f32:
        return some_leave<Columns, DType::f32>;
    case DType::bf16:
        return some_leave<Columns, DType::bf16>;
    case DType::f16:
        return some_leave<Columns, DType::f16>;
    case DType::i8:
        return some_leave<Columns, DType::i8>;
    default:
        return any_leave<Columns>;
    }
}

// A step of 64 inputs: rows from x0 and from x1 on (Rows = 2), `step` bytes apart.
template <bool Signed, int Rows, int Columns>
inline void products(const char *x0, const char *x1, int64_t step, const int8_t *w, int64_t w_step) {
    load_tile<4>(x0, step);
    load_tile<6>(w, w_step);
    multiply<Signed, 0, 4, 6>();
    if constexpr (Columns > 1) {
        load_tile<7>(w + 64, w_step);
        multiply<Signed, 1, 4, 7>();
    }
    if constexpr (Rows > 1) {
        load_tile<5>(x1, step);
        multiply<Signed, 2, 5, 6>();
        if constexpr (Columns > 1)
            multiply<Signed, 3, 5, 7>();
    } else {
        if constexpr (Columns > 2) {
            load_tile<6>(w + 128, w_step);
            multiply<Signed, 2, 4, 6>();
        }
        if constexpr (Columns > 3) {
            load_tile<7>(w + 192, w_step);
            multiply<Signed, 3, 4, 7>();
        }
    }
}

template <int Rows, int Columns> void PanelRun::tile(int i, int first0, int first1, int rows) {
    const int64_t w_step = 4 * p.width, x_step = p.row_step;
    const auto each = [&](auto &&f0, auto &&f1, auto &&f2, auto &&f3) __attribute__((always_inline)) {
        f0();
        if constexpr (Columns > 1)
            f1();
        if constexpr (Rows > 1 || Columns > 2)
            f2();
        if constexpr ((Rows > 1 && Columns > 1) || Columns > 3)
            f3();
    };
    // Sums 0 and 1 are of the first rows; 2 and 3 of the second ones, or further columns of the first.
    constexpr int kThird = Rows > 1 ? 0 : 32, kFourth = Rows > 1 ? 16 : 48;
    each([&] { load_tile<0>(from + i, 0); }, [&] { load_tile<1>(from + i + 16, 0); },
         [&] { load_tile<2>(from + i + kThird, 0); }, [&] { load_tile<3>(from + i + kFourth, 0); });
    const char *x0 = x + first0 * x_step, *x1 = x + first1 * x_step;
    const int8_t *w = p.panel + 4 * i;
    const int64_t chunks = (leaving.rows - leaving.row + kChunk - 1) / kChunk,
                  each_step = meanwhile ? (chunks + steps - 1) / steps : 0;
    for (int64_t s = 0; s < steps; ++s) {
        if (p.raw)
            products<true, Rows, Columns>(x0, x1, x_step, w, w_step);
        else
            products<false, Rows, Columns>(x0, x1, x_step, w, w_step);
        x0 += kInputs;
        x1 += kInputs;
        w += kInputs * p.width;
        if (next < next_end) {
            for (int64_t l = 0; l < lines; ++l)
                _mm_prefetch(reinterpret_cast<const char *>(next + 64 * l), _MM_HINT_T1);
            next += 64 * lines;
        }
        for (int64_t c = 0; c < each_step && leaving.row < leaving.rows; ++c)
            leaving.some(*this);
    }
    if (tail) {
        alignas(64) char rest[2 * kRows * kInputs];
        const __mmask64 there = (uint64_t{1} << 4 * tail) - 1;
        for (int h = 0; h < Rows; ++h)
            for (int r = 0; r < (Rows > 1 ? kRows : rows); ++r)
                _mm512_store_si512(rest + (h * kRows + r) * kInputs,
                                   _mm512_maskz_loadu_epi8(there, (h ? x1 : x0) + r * x_step));
        const auto run = p.raw ? products<true, Rows, Columns> : products<false, Rows, Columns>;
        run(rest, rest + kRows * kInputs, kInputs, tail_weights + 4 * i, w_step);
    }
    all_leave();
    if (straight) {
        char *const to = p.out + first0 * p.row_bytes + 4 * i;
        char *const third = Rows > 1 ? p.out + first1 * p.row_bytes + 4 * i : to + 128;
        each([&] { store_tile<0>(to, p.row_bytes); }, [&] { store_tile<1>(to + 64, p.row_bytes); },
             [&] { store_tile<2>(third, p.row_bytes); }, [&] { store_tile<3>(third + 64, p.row_bytes); });
        return;
    }
    // Rows leave as wide as they are: each goes to a page of its own. While products run, a tile at a time:
    // what they read had better stay in L1.
    const int64_t step = meanwhile ? 16 * Columns : p.width;
    int32_t *const to = sums[turn] + (meanwhile ? 0 : i);
    const int64_t third = Rows > 1 ? kRows * step : 32;
    each([&] { store_tile<0>(to, 4 * step); }, [&] { store_tile<1>(to + 16, 4 * step); },
         [&] { store_tile<2>(to + third, 4 * step); }, [&] { store_tile<3>(to + third + 16, 4 * step); });
    if (!meanwhile && i + 16 * Columns < p.width)
        return;
    leaving.sums = sums[turn];
    leaving.first[0] = first0;
    leaving.first[1] = first1;
    leaving.row = 0;
    leaving.rows = Rows > 1 ? 2 * kRows : rows;
    turn ^= 1;
    if (meanwhile) {
        leaving.some = leave<Columns>(p, i);
        leaving.column = i;
    } else {
        all_leave();
    }
}

// All columns of at most 16 rows.
void few_rows(PanelRun &run, int first, int rows) {
    switch (run.p.width / 16) {
    case 1:
        return run.tile<1, 1>(0, first, first, rows);
    case 2:
        return run.tile<1, 2>(0, first, first, rows);
    case 3:
        return run.tile<1, 3>(0, first, first, rows);
    default:
        return run.tile<1, 4>(0, first, first, rows);
    }
}

void one_panel(const ProductI8 &p) {
    PanelRun run(p);
    run.prepare();
    constexpr decltype(&leave<1>) kLeave[] = {leave<1>, leave<2>, leave<3>, leave<4>};
    run.leaving.some = kLeave[p.width / 16 - 1](p, 0);
    const int whole = p.count / (2 * kRows), rest = p.count % (2 * kRows);
    // What is left over ends with the last row: rows that two tiles have are written twice, the same.
    const int tiles = whole + (rest > 0 ? 1 : 0);
    const int64_t all = tiles * ((p.width + 31) / 32) * (run.steps > 0 ? run.steps : 1);
    run.next = p.next;
    run.next_end = p.next + p.next_bytes;
    run.lines = (p.next_bytes / 64 + all - 1) / all;
    if (run.lines > kMostLines)
        run.lines = kMostLines;
    for (int t = 0; t < tiles; ++t) {
        const int first = 2 * kRows * t, rows = p.count - first;
        if (rows <= kRows) {
            const int n = rows < p.count ? kRows : rows;
            few_rows(run, p.count - n, n);
            continue;
        }
        const int second = rows < 2 * kRows ? p.count - kRows : first + kRows;
        for (int i = 0; i < p.width; i += 32)
            if (i + 32 <= p.width)
                run.tile<2, 2>(i, first, second, 2 * kRows);
            else
                run.tile<2, 1>(i, first, second, 2 * kRows);
    }
    run.all_leave();
}

} // namespace

int64_t peak_i8_amx(int64_t rounds) {
    configure(kRows);
    asm volatile("tilezero %%tmm4\n\ttilezero %%tmm5\n\ttilezero %%tmm6\n\ttilezero %%tmm7" : :);
    for (int64_t i = 0; i < rounds; ++i) {
        multiply<false, 0, 4, 6>();
        multiply<false, 1, 4, 7>();
        multiply<false, 2, 5, 6>();
        multiply<false, 3, 5, 7>();
    }
    return rounds * 4 * kRows * 16 * kInputs;
}

void even_rows_amx(const void *const *rows, int64_t ld, int count, int64_t taps, int64_t bytes, char *out,
                   int64_t step) {
    const __mmask64 rest = (uint64_t{1} << bytes % 64) - 1;
    for (int r = 0; r < count; ++r, out += step) {
        char *to = out;
        for (int64_t t = 0; t < taps; ++t, to += bytes) {
            const char *const from = static_cast<const char *>(rows[t * ld + r]);
            int64_t i = 0;
            for (; i + 64 <= bytes; i += 64)
                _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
            if (rest)
                _mm512_mask_storeu_epi8(to + i, rest, _mm512_maskz_loadu_epi8(rest, from + i));
        }
    }
}

void product_i8_amx(const ProductI8 &given) {
    if (given.count < kLeastTileRows || !given.even() || given.gap != 0 ||
        (given.panels >= kManyPanelsOfStep && given.kq <= kInputs / 4))
        return product_i8_avx512vnni(given);
    ProductI8 p = given;
    if (p.raw && !p.epilogue->colsum) { // sums are corrected elsewhere
        turn_top_bits(p.raw, p.count * 4 * p.kq, p.operands);
        p.raw = nullptr;
    }
    configure(p.count < kRows ? p.count : kRows);
    const int64_t panels = p.panels > 1 ? p.panels : 1;
    const int most = panels > kManyPanels ? kTogether : p.count;
    const char *const x = static_cast<const char *>(p.rows[0]);
    ProductI8 part = p;
    part.panels = 1;
    for (int r0 = 0; r0 < p.count; r0 += part.count) {
        const void *const first = x + r0 * p.row_step;
        part.rows = &first;
        part.count = p.count - r0 < 2 * most ? p.count - r0 : most;
        part.raw = p.raw ? p.raw + r0 * p.row_step : nullptr;
        part.row_scale = p.row_scale + r0;
        for (int64_t i = 0; i < panels; ++i) {
            part.panel = p.panel + i * 4 * p.kq * p.width;
            part.n0 = p.n0 + i * p.width;
            part.out = p.out + r0 * p.row_bytes + i * p.width * size_of(p.epilogue->out_dtype);
            one_panel(part);
        }
    }
}

} // namespace tautorch
