// Rows of heads between the caller's memory (any dtype, strided) and contiguous fp32 blocks, with rotary embedding on
// the way.

#pragma once

#include "../../cpu/simd.h"
#include "../attention.h"

namespace meditron::MEDITRON_ISA {

// One head of one side of the problem, and how its rows turn.
struct HeadRows {
    void* data;  // of row 0
    int64_t stride;
    const float *cos, *sin;  // null: no rotation
    const int64_t* positions;
    int64_t first_token;  // of row 0, in positions

    HeadRows(const AttentionProblem& p, const Heads& heads, int64_t head, int64_t token, const int64_t* row_positions,
             bool rotated)
        : data(static_cast<char*>(heads.data) +
               (token * heads.token_stride + head * heads.head_stride) * size_of(p.dtype)),
          stride(heads.token_stride),
          cos(rotated ? p.cos : nullptr),
          sin(p.sin),
          positions(row_positions),
          first_token(token) {}

    MEDITRON_INLINE int64_t table_row(int64_t row) const {
        return positions ? positions[first_token + row] : first_token + row;
    }
};

// Turns channel pairs (c, c + D/2) of one fp32 row by the row's angle, or back by it. D/2 is a multiple of 8.
MEDITRON_INLINE void rotate_row(float* x, const float* cos, const float* sin, int64_t half, float direction) {
    int64_t c = 0;
    for (; c + VL <= half; c += VL) {
        const Vec a = load(x + c), b = load(x + half + c), s = load(sin + c) * direction, t = load(cos + c);
        store(x + c, a * t - b * s);
        store(x + half + c, b * t + a * s);
    }
    for (; c < half; ++c) {
        const float a = x[c], b = x[half + c], s = sin[c] * direction, t = cos[c];
        x[c] = a * t - b * s;
        x[half + c] = b * t + a * s;
    }
}

// Rows of one head lie num_heads * D elements apart, which no hardware prefetcher follows: fetch some rows ahead.
constexpr int64_t rows_ahead = 6;
constexpr int64_t max_head_dim = 512;

MEDITRON_INLINE void prefetch_row(const void* row, int64_t num_bytes) {
    for (int64_t byte = 0; byte < num_bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(row) + byte);
}

// Rows begin .. begin + count as fp32 [count, D], rotated.
template <class Type>
void read_rows(const HeadRows& rows, int64_t begin, int64_t count, int64_t head_dim, float* to) {
    const auto* data = static_cast<const typename Type::Element*>(rows.data);
    for (int64_t r = 0; r < count; ++r) {
        const auto* from = data + (begin + r) * rows.stride;
        if (r + rows_ahead < count)
            prefetch_row(from + rows_ahead * rows.stride, head_dim * static_cast<int64_t>(sizeof(*from)));
        float* row = to + r * head_dim;
        for (int64_t c = 0; c < head_dim; c += VL) store(row + c, Type::load(from + c));
        if (rows.cos) {
            const int64_t at = rows.table_row(begin + r) * (head_dim / 2);
            rotate_row(row, rows.cos + at, rows.sin + at, head_dim / 2, 1.0f);
        }
    }
}

// The way back, for gradients: rows of fp32 times `scale`, turned back, to the caller's dtype. `from` is overwritten.
template <class Type>
void write_rows(const HeadRows& rows, int64_t begin, int64_t count, int64_t head_dim, float scale, float* from) {
    auto* data = static_cast<typename Type::Element*>(rows.data);
    for (int64_t r = 0; r < count; ++r) {
        float* row = from + r * head_dim;
        if (rows.cos) {
            const int64_t at = rows.table_row(begin + r) * (head_dim / 2);
            rotate_row(row, rows.cos + at, rows.sin + at, head_dim / 2, -1.0f);
        }
        auto* to = data + (begin + r) * rows.stride;
        for (int64_t c = 0; c < head_dim; c += VL) Type::store(to + c, load(row + c) * scale);
    }
}

// to[c, r] = from[r, c] for `count` rows of `width` elements; columns up to the next multiple of VL become zero. ld is
// the row length of `to`.
inline void transpose_rows(const float* from, int64_t count, int64_t width, float* to, int64_t ld) {
    for (int64_t r = 0; r < count; r += VL) {
        for (int64_t c = 0; c < width; c += VL) {
            Vec block[VL];
            for (int i = 0; i < VL; ++i) block[i] = r + i < count ? load(from + (r + i) * width + c) : Vec{};
            transpose(block);
            for (int i = 0; i < VL && c + i < width; ++i) store(to + (c + i) * ld + r, block[i]);
        }
    }
}

}  // namespace meditron::MEDITRON_ISA
