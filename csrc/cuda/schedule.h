// Which tiles of work an attention problem has, made on the host: only those with something to do, the longest first,
// so that the last ones to start are short and all multiprocessors end together.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../attention/attention.h"

namespace meditron {

// Consecutive queries of a document and the blocks of keys they meet, or keys and the blocks of queries.
// Rows and blocks are counted from the document's start.
struct Tile {
    int32_t query_start, num_queries, key_start, num_keys;  // of the document
    int32_t row;                                            // the tile's first
    int32_t begin, end;                                     // blocks begin .. end - 1; none if equal
};

// Without a window, one that no document can fill. Positions and windows add up in 32 bits.
inline int32_t window_or_all(const AttentionProblem& problem) {
    constexpr int64_t all = int64_t{1} << 30;
    return static_cast<int32_t>(problem.window > 0 ? std::min(problem.window, all) : all);
}

inline int64_t max_num_tiles(int64_t num_tokens, int64_t num_documents, int64_t tile_rows) {
    return num_tokens / tile_rows + num_documents;
}

namespace schedule_detail {

inline Tile document_of(const AttentionProblem& problem, int64_t document) {
    const int64_t *queries = problem.cu_queries + document, *keys = problem.cu_keys + document;
    Tile tile{};
    tile.query_start = static_cast<int32_t>(queries[0]);
    tile.num_queries = static_cast<int32_t>(queries[1] - queries[0]);
    tile.key_start = static_cast<int32_t>(keys[0]);
    tile.num_keys = static_cast<int32_t>(keys[1] - keys[0]);
    return tile;
}

inline void longest_first(std::vector<Tile>& tiles) {
    std::stable_sort(tiles.begin(), tiles.end(),
                     [](const Tile& a, const Tile& b) { return a.end - a.begin > b.end - b.begin; });
}

}  // namespace schedule_detail

// Tiles of `tile_rows` queries that cover every query once, with the blocks of `block_rows` keys that hold what they
// see.
inline std::vector<Tile> query_tiles(const AttentionProblem& problem, int32_t tile_rows, int32_t block_rows) {
    const int32_t window = window_or_all(problem);
    std::vector<Tile> tiles;
    for (int64_t document = 0; document < problem.num_documents; ++document) {
        Tile tile = schedule_detail::document_of(problem, document);
        const int32_t ahead = tile.num_keys - tile.num_queries;  // query j stands at position ahead + j
        for (; tile.row < tile.num_queries; tile.row += tile_rows) {
            const int32_t last = std::min(tile.row + tile_rows, tile.num_queries) - 1;
            tile.begin = std::max(0, ahead + tile.row - window + 1) / block_rows;
            tile.end = (ahead + last) / block_rows + 1;
            tiles.push_back(tile);
        }
    }
    schedule_detail::longest_first(tiles);
    return tiles;
}

// Tiles of `tile_rows` keys that cover every key once, with the blocks of `block_rows` queries that see some of them.
inline std::vector<Tile> key_tiles(const AttentionProblem& problem, int32_t tile_rows, int32_t block_rows) {
    const int32_t window = window_or_all(problem);
    std::vector<Tile> tiles;
    for (int64_t document = 0; document < problem.num_documents; ++document) {
        Tile tile = schedule_detail::document_of(problem, document);
        const int32_t ahead = tile.num_keys - tile.num_queries;
        for (; tile.row < tile.num_keys; tile.row += tile_rows) {
            const int32_t last = std::min(tile.row + tile_rows, tile.num_keys) - 1;
            const int32_t first_query = std::max(0, tile.row - ahead);
            const int32_t end_query = std::min(tile.num_queries, last - ahead + window);
            tile.begin = first_query / block_rows;
            tile.end = end_query > first_query ? (end_query - 1) / block_rows + 1 : tile.begin;
            tiles.push_back(tile);
        }
    }
    schedule_detail::longest_first(tiles);
    return tiles;
}

}  // namespace meditron
