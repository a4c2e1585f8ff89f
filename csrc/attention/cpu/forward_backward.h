// The forward and backward pass of one unit (AttentionUnit) in blocks that stay in the caches.
//
// Online softmax after Milakov and Gimelshein 2018, in blocks of keys after Dao et al. 2022 (FlashAttention, algorithms
// 1 and 4). Scores are in base 2: multiplied by softmax_scale * log2(e). Rows are queries of one head, columns are
// keys; "block" numbers are local to a block of keys.

#pragma once

#include "kernel_table.h"
#include "operands.h"

extern "C" float logf(float);

namespace meditron::MEDITRON_ISA {

constexpr int64_t query_block = 96,
                  key_block = 128;  // 2 * 128 * 128 floats of keys and values fit a quarter of 512 KiB of L2
constexpr float log2e = 1.44269504f, ln2 = 0.693147181f;
constexpr float minus_infinity = -__builtin_inff();

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Which keys a query of the document sees.
struct Document {
    int64_t first_query, first_key, num_queries, num_keys, window;

    Document(const AttentionProblem& p, int64_t document)
        : first_query(p.cu_queries[document]),
          first_key(p.cu_keys[document]),
          num_queries(p.cu_queries[document + 1] - first_query),
          num_keys(p.cu_keys[document + 1] - first_key),
          window(p.window) {}

    int64_t keys_end(int64_t query) const { return num_keys - num_queries + query + 1; }
    int64_t keys_begin(int64_t query) const { return window > 0 ? greater(0, keys_end(query) - window) : 0; }
    // The first query that sees this key, and the end of those that do.
    int64_t queries_begin(int64_t key) const { return greater(0, key - (num_keys - num_queries)); }
    int64_t queries_end(int64_t key) const {
        return window > 0 ? lesser(num_queries, key - (num_keys - num_queries) + window) : num_queries;
    }
};

// Columns begin .. end of a row of scores are visible; outside, scores become minus infinity.
template <bool masked>
MEDITRON_INLINE Vec visible(Vec score, int64_t column, int64_t begin, int64_t end) {
    if constexpr (!masked) return score;
    const VecI lane = lane_numbers() + static_cast<int32_t>(column);
    const Vec nothing = broadcast(minus_infinity);
    score = lane < VecI{} + static_cast<int32_t>(end) ? score : nothing;
    return lane >= VecI{} + static_cast<int32_t>(begin) ? score : nothing;
}

// ---------------------------------------------------------------------------------------------------- forward

// The running softmax of one row over blocks of keys.
struct RowState {
    float max;      // of the scores so far
    float rescale;  // what the row's output so far must be multiplied by
    Vec sums;       // of exponentials, lane by lane
};

// Products q k [columns] of one row become exponentials of the scores, relative to their running maximum.
template <bool masked>
MEDITRON_INLINE void softmax_row(float* scores, int64_t columns, int64_t begin, int64_t end, float scale,
                                 RowState& row) {
    Vec largest = broadcast(minus_infinity);
    for (int64_t c = 0; c < columns; c += VL) {
        const Vec score = visible<masked>(load(scores + c) * scale, c, begin, end);
        store(scores + c, score);
        largest = larger(score, largest);
    }
    const float before = row.max, block_max = largest_lane(largest);
    row.max = block_max > before ? block_max : before;
    // Nothing seen yet (the block lies before the window): any finite number keeps the exponentials at 0.
    const float offset = row.max == minus_infinity ? 0.0f : row.max;
    row.rescale = exp2_of(broadcast(before - offset))[0];
    Vec sums = row.sums * row.rescale;
    for (int64_t c = 0; c < columns; c += VL) {
        const Vec weight = exp2_of(load(scores + c) - offset);
        store(scores + c, weight);
        sums += weight;
    }
    row.sums = sums;
}

MEDITRON_INLINE void scale_row(float* row, int64_t size, float factor) {
    for (int64_t c = 0; c < size; c += VL) store(row + c, load(row + c) * factor);
}

template <class Math, class Type>
struct Forward {
    using Operand = Operands<Math, Type>;

    const AttentionForward& f;
    const AttentionProblem& p;
    const AttentionUnit& unit;
    const Document document;
    const int64_t D, width, keys_begin, keys_end;  // width: elements of a row; keys_begin is a multiple of key_block
    const float scale;
    float *values, *keys_T, *rows, *q, *o, *scores;  // scratch

    Forward(const AttentionForward& forward, const AttentionUnit& u, float* scratch)
        : f(forward),
          p(forward.problem),
          unit(u),
          document(p, u.document),
          D(p.head_dim),
          width(D / Math::per_element),
          keys_begin(document.keys_begin(u.begin) / key_block * key_block),
          keys_end(document.keys_end(u.end - 1)),
          scale(p.softmax_scale * log2e) {
        const int64_t size = round_up(keys_end - keys_begin, key_block) * width;
        values = scratch;
        keys_T = values + size;
        rows = keys_T + size;
        q = rows + key_block * D;
        o = q + query_block * D;
        scores = o + query_block * D;
    }

    static int64_t scratch_size(const AttentionProblem& p, int64_t max_keys) {
        return 2 * round_up(max_keys + key_block, key_block) * (p.head_dim / Math::per_element) +
               (key_block + 2 * query_block) * p.head_dim + MR * key_block;
    }

    // Each block of the unit's keys: [width, key_block] in keys_T, its values as paired rows; width * key_block
    // elements.
    void read_keys() {
        const HeadRows k(p, f.k, unit.kv_head, document.first_key, p.k_positions, true);
        const HeadRows v(p, f.v, unit.kv_head, document.first_key, nullptr, false);
        for (int64_t block = keys_begin; block < keys_end; block += key_block) {
            const int64_t count = lesser(key_block, keys_end - block), at = (block - keys_begin) * width;
            Operand::read(k, block, count, D, rows);
            transpose_rows(rows, count, width, keys_T + at, key_block);
            // fp32: paired rows are the rows themselves, so they are read into place.
            float* const value_rows = Math::per_element == 1 ? values + at : rows;
            Operand::read(v, block, count, D, value_rows);
            Operand::pair_rows(value_rows, count, D, values + at);
        }
    }

    void run() {
        read_keys();
        const int64_t group = p.num_heads / p.num_kv_heads;
        for (int64_t head = unit.kv_head * group; head < (unit.kv_head + 1) * group; ++head)
            for (int64_t begin = unit.begin; begin < unit.end; begin += query_block)
                queries(head, begin, lesser(query_block, unit.end - begin));
    }

    void queries(int64_t head, int64_t begin, int64_t count) {
        Operand::read(HeadRows(p, f.q, head, document.first_query, p.q_positions, true), begin, count, D, q);
        RowState state[query_block];
        for (int64_t r = 0; r < count; ++r) state[r] = {minus_infinity, 0.0f, Vec{}};
        const int64_t first = document.keys_begin(begin) / key_block * key_block;
        const int64_t end = document.keys_end(begin + count - 1);
        const RowTiles tiles(count);
        for (int64_t block = first; block < end; block += key_block)
            for (int64_t tile = 0; tile < tiles.num_tiles; ++tile)
                attend(begin, tiles.begin(tile), tiles.size(tile), block, block == first, state);
        write(head, begin, count, state);
    }

    // Rows begin + row .. + size against one block of keys.
    void attend(int64_t begin, int64_t row, int size, int64_t block, bool first, RowState* state) {
        const int64_t at = (block - keys_begin) * width;
        const int64_t end = lesser(key_block, document.keys_end(begin + row + size - 1) - block);
        if (end <= 0) return;
        const int64_t columns = round_up(end, VL);
        const bool whole =
            columns <= document.keys_end(begin + row) - block && document.keys_begin(begin + row + size - 1) <= block;
        multiply_rows<Math, false>(size, columns, width, {q + row * width, width, 1}, keys_T + at, key_block, scores,
                                   key_block);
        for (int r = 0; r < size; ++r) {
            RowState& s = state[row + r];
            const int64_t query = begin + row + r;
            float* x = scores + r * key_block;
            if (whole)
                softmax_row<false>(x, columns, 0, 0, scale, s);
            else
                softmax_row<true>(x, columns, document.keys_begin(query) - block, document.keys_end(query) - block,
                                  scale, s);
            Operand::pack(x, columns);
            if (!first && s.rescale != 1.0f) scale_row(o + (row + r) * D, D, s.rescale);
        }
        const Left weights{scores, key_block, 1};
        const int64_t elements = (end + Math::per_element - 1) / Math::per_element;
        if (first)
            multiply_rows<Math, false>(size, D, elements, weights, values + at, D, o + row * D, D);
        else
            multiply_rows<Math, true>(size, D, elements, weights, values + at, D, o + row * D, D);
    }

    void write(int64_t head, int64_t begin, int64_t count, const RowState* state) {
        for (int64_t r = 0; r < count; ++r) {
            const float sum = sum_of_lanes(state[r].sums);
            f.lse[head * p.num_queries + document.first_query + begin + r] = (state[r].max + log2e * logf(sum)) * ln2;
            scale_row(o + r * D, D, 1.0f / sum);
        }
        const HeadRows out(p, f.out, head, document.first_query, nullptr, false);
        write_rows<Type>(out, begin, count, D, 1.0f, o);
    }
};

// --------------------------------------------------------------------------------------------------- backward

// Products q k of one row become weights P and, in grad_weights, dS = P * (dP - delta).
template <bool masked>
MEDITRON_INLINE void softmax_row_backward(float* scores, float* grad_weights, int64_t columns, int64_t begin,
                                          int64_t end, float scale, float lse2, float delta) {
    for (int64_t c = 0; c < columns; c += VL) {
        const Vec weight = exp2_of(visible<masked>(load(scores + c) * scale, c, begin, end) - lse2);
        store(scores + c, weight);
        store(grad_weights + c, weight * (load(grad_weights + c) - delta));
    }
}

template <class Math, class Type>
struct Backward {
    using Operand = Operands<Math, Type>;

    const AttentionBackward& f;
    const AttentionProblem& p;
    const AttentionUnit& unit;
    const Document document;
    const int64_t D, width, group;  // width: elements of a row
    const float scale;
    float *keys, *keys_T, *values_T, *dk, *dv;                            // one block of keys
    float *q, *q_pairs, *grad_out, *grad_pairs, *weights, *grad_weights;  // one block of queries
    float *tile, *delta, *dq;                                             // a tile; all queries of the group's heads

    Backward(const AttentionBackward& backward, const AttentionUnit& u, float* scratch)
        : f(backward),
          p(backward.problem),
          unit(u),
          document(p, u.document),
          D(p.head_dim),
          width(D / Math::per_element),
          group(p.num_heads / p.num_kv_heads),
          scale(p.softmax_scale * log2e) {
        float** const per_key_block[] = {&keys, &keys_T, &values_T, &dk, &dv};
        for (float** buffer : per_key_block) *buffer = scratch, scratch += key_block * D;
        float** const per_query_block[] = {&q, &q_pairs, &grad_out, &grad_pairs};
        for (float** buffer : per_query_block) *buffer = scratch, scratch += query_block * D;
        weights = scratch;
        grad_weights = weights + query_block * key_block;
        tile = grad_weights + query_block * key_block;
        delta = tile + MR * key_block;
        dq = delta + round_up(group * document.num_queries, VL);
    }

    static int64_t scratch_size(const AttentionProblem& p, int64_t max_queries) {
        const int64_t group = p.num_heads / p.num_kv_heads;
        return (5 * key_block + 4 * query_block) * p.head_dim + (2 * query_block + MR) * key_block +
               round_up(group * max_queries, VL) + group * max_queries * p.head_dim;
    }

    int64_t head(int64_t g) const { return unit.kv_head * group + g; }

    void run() {
        compute_delta();
        for (int64_t block = 0; block < document.num_keys; block += key_block)
            key_gradients(block, lesser(key_block, document.num_keys - block));
        for (int64_t g = 0; g < group; ++g) {
            const HeadRows rows(p, f.dq, head(g), document.first_query, p.q_positions, true);
            write_rows<Type>(rows, 0, document.num_queries, D, p.softmax_scale, dq + g * document.num_queries * D);
        }
    }

    // delta = sum over channels of out * grad_out, which is the sum over keys of P * dP. Also clears dq.
    void compute_delta() {
        using Element = const typename Type::Element;
        for (int64_t g = 0; g < group; ++g) {
            const HeadRows out(p, f.out, head(g), document.first_query, nullptr, false);
            const HeadRows grad(p, f.grad_out, head(g), document.first_query, nullptr, false);
            for (int64_t r = 0; r < document.num_queries; ++r) {
                Element* o = static_cast<Element*>(out.data) + r * out.stride;
                Element* d = static_cast<Element*>(grad.data) + r * grad.stride;
                if (r + rows_ahead < document.num_queries) {
                    prefetch_row(o + rows_ahead * out.stride, D * static_cast<int64_t>(sizeof(*o)));
                    prefetch_row(d + rows_ahead * grad.stride, D * static_cast<int64_t>(sizeof(*d)));
                }
                Vec sum{};
                for (int64_t c = 0; c < D; c += VL) sum += Type::load(o + c) * Type::load(d + c);
                delta[g * document.num_queries + r] = sum_of_lanes(sum);
            }
        }
        for (int64_t i = 0; i < group * document.num_queries * D; i += VL) store(dq + i, Vec{});
    }

    void key_gradients(int64_t block, int64_t count) {
        const HeadRows k(p, f.k, unit.kv_head, document.first_key, p.k_positions, true);
        const HeadRows v(p, f.v, unit.kv_head, document.first_key, nullptr, false);
        float* const rows = Math::per_element == 1 ? keys : dk;  // pairs: dk is not in use yet
        Operand::read(v, block, count, D, rows);
        transpose_rows(rows, count, width, values_T, key_block);
        Operand::read(k, block, count, D, rows);
        transpose_rows(rows, count, width, keys_T, key_block);
        Operand::pair_rows(rows, count, D, keys);
        for (int64_t i = 0; i < count * D; i += VL) store(dk + i, Vec{}), store(dv + i, Vec{});
        const int64_t begin = document.queries_begin(block), end = document.queries_end(block + count - 1);
        for (int64_t g = 0; g < group; ++g)
            for (int64_t query = begin; query < end; query += query_block)
                accumulate(g, query, lesser(query_block, end - query), block, count);
        const HeadRows dk_rows(p, f.dk, unit.kv_head, document.first_key, p.k_positions, true);
        const HeadRows dv_rows(p, f.dv, unit.kv_head, document.first_key, nullptr, false);
        write_rows<Type>(dk_rows, block, count, D, p.softmax_scale, dk);
        write_rows<Type>(dv_rows, block, count, D, 1.0f, dv);
    }

    // What `count` queries of head g give to dk, dv of the block and take from it for dq.
    void accumulate(int64_t g, int64_t begin, int64_t count, int64_t block, int64_t num_keys) {
        const HeadRows q_rows(p, f.q, head(g), document.first_query, p.q_positions, true);
        const HeadRows grad_rows(p, f.grad_out, head(g), document.first_query, nullptr, false);
        Operand::read(q_rows, begin, count, D, q);
        Operand::read(grad_rows, begin, count, D, grad_out);
        const RowTiles tiles(count);
        for (int64_t t = 0; t < tiles.num_tiles; ++t)
            query_tile(g, begin, tiles.begin(t), tiles.size(t), block, num_keys);
        const float* const q_right = Operand::pair_rows(q, count, D, q_pairs);
        const float* const grad_right = Operand::pair_rows(grad_out, count, D, grad_pairs);
        Operand::pair(weights, count, round_up(num_keys, VL), key_block);
        Operand::pair(grad_weights, count, round_up(num_keys, VL), key_block);
        const RowTiles key_tiles(num_keys);
        for (int64_t t = 0; t < key_tiles.num_tiles; ++t) {
            const int64_t key = key_tiles.begin(t);
            const int size = key_tiles.size(t);
            // Queries before the first that sees one of these keys have weight 0: a pair may begin with one.
            constexpr int64_t step = Math::per_element;
            const int64_t first = greater(0, document.queries_begin(block + key) - begin) / step;
            const int64_t last =
                (lesser(count, document.queries_end(block + key + size - 1) - begin) + step - 1) / step;
            if (first >= last) continue;
            const int64_t at = first * key_block + key;
            multiply_rows<Math, true>(size, D, last - first, {weights + at, 1, key_block}, grad_right + first * D, D,
                                      dv + key * D, D);
            multiply_rows<Math, true>(size, D, last - first, {grad_weights + at, 1, key_block}, q_right + first * D, D,
                                      dk + key * D, D);
        }
    }

    void query_tile(int64_t g, int64_t begin, int64_t row, int size, int64_t block, int64_t num_keys) {
        const int64_t end = lesser(num_keys, document.keys_end(begin + row + size - 1) - block);
        const int64_t columns = round_up(end, VL), all_columns = round_up(num_keys, VL);
        const bool whole =
            columns <= document.keys_end(begin + row) - block && document.keys_begin(begin + row + size - 1) <= block;
        float *s = weights + row * key_block, *ds = grad_weights + row * key_block;
        multiply_rows<Math, false>(size, columns, width, {q + row * width, width, 1}, keys_T, key_block, s, key_block);
        multiply_rows<Math, false>(size, columns, width, {grad_out + row * width, width, 1}, values_T, key_block, ds,
                                   key_block);
        const float* left = ds;  // dS as the left side of the product that gives dq
        for (int r = 0; r < size; ++r) {
            const int64_t query = begin + row + r;
            const float lse2 = f.lse[head(g) * p.num_queries + document.first_query + query] * log2e;
            const float row_delta = delta[g * document.num_queries + query];
            float *x = s + r * key_block, *dx = ds + r * key_block;
            if (whole)
                softmax_row_backward<false>(x, dx, columns, 0, 0, scale, lse2, row_delta);
            else
                softmax_row_backward<true>(x, dx, columns, document.keys_begin(query) - block,
                                           document.keys_end(query) - block, scale, lse2, row_delta);
            // Tiles of keys do not end where tiles of queries do: the rest must count as 0.
            for (int64_t c = columns; c < all_columns; c += VL) store(x + c, Vec{}), store(dx + c, Vec{});
            const float* packed = Operand::pack_to(dx, columns, tile + r * key_block);
            if (r == 0) left = packed;
        }
        multiply_rows<Math, true>(size, D, (end + Math::per_element - 1) / Math::per_element, {left, key_block, 1},
                                  keys, D, dq + (g * document.num_queries + begin + row) * D, D);
    }
};

// ----------------------------------------------------------------------------------------- the table of kernels

#ifdef MEDITRON_BF16_PRODUCTS
using MathOfBFloat16 = Bf16Math;
#else
using MathOfBFloat16 = Fp32Math;
#endif

template <template <class, class> class Pass, class Arguments>
void run_unit(const Arguments& arguments, const AttentionUnit& unit, float* scratch) {
    switch (arguments.problem.dtype) {
        case DType::float32: return Pass<Fp32Math, Float32>(arguments, unit, scratch).run();
        case DType::bfloat16: return Pass<MathOfBFloat16, BFloat16>(arguments, unit, scratch).run();
        case DType::float16: return Pass<Fp32Math, Float16>(arguments, unit, scratch).run();
    }
}

inline int64_t forward_scratch(const AttentionProblem& p, int64_t, int64_t max_keys) {
    return p.dtype == DType::bfloat16 ? Forward<MathOfBFloat16, BFloat16>::scratch_size(p, max_keys)
                                      : Forward<Fp32Math, Float32>::scratch_size(p, max_keys);
}
inline int64_t backward_scratch(const AttentionProblem& p, int64_t max_queries, int64_t) {
    return Backward<Fp32Math, Float32>::scratch_size(p, max_queries);
}

constexpr CpuKernels make_kernels(const char* name) {
    return {name, forward_scratch, backward_scratch, run_unit<Forward, AttentionForward>,
            run_unit<Backward, AttentionBackward>};
}

}  // namespace meditron::MEDITRON_ISA
