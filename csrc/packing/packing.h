// The order of documents and samples: packing, shuffles, the concatenated stream, the blend of sources.
// Plain C++17 without Python or torch, like all files here but bindings.cpp; every function checks what it is given and
// throws, none reads outside its input.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "array.h"

namespace meditron {

// Documents order[bin_offsets[i] .. bin_offsets[i + 1]) go into bin i.
struct Bins {
    Array<int64_t> order;
    Array<int64_t> bin_offsets;
};

// Best-fit decreasing: documents by falling length, each into the fullest bin that still holds it.
// Throws std::invalid_argument for a length outside [0, capacity]. Deterministic, whatever the number of threads
// (0: all processors); ties keep the given order.
Bins pack_best_fit(const int64_t* lengths, int64_t num_documents, int64_t capacity, int64_t num_threads = 0);

// A uniform random order of 0 .. n-1 (Fisher-Yates on SplitMix64), a function of n and seed alone.
Array<int64_t> permutation(int64_t n, uint64_t seed);

// Documents and their lengths in the order of a stream. Number: uint32_t where all numbers fit, else int64_t.
template <class Number>
struct Stream {
    Array<Number> documents, lengths;
};
// Do the lengths of these documents, and the numbers of all, fit 32 bits? Throws std::out_of_range for a document that
// does not exist and std::invalid_argument for a negative length: asked before the two functions below.
bool fits_32_bits(const int64_t* lengths, int64_t num_documents, const int64_t* documents, int64_t count);
// documents[permutation(count, seed)] and their lengths.
Stream<uint32_t> shuffle_documents_32(const int64_t* lengths, const int64_t* documents, int64_t count, uint64_t seed);
Stream<int64_t> shuffle_documents_64(const int64_t* lengths, const int64_t* documents, int64_t count, uint64_t seed);

// Cuts a stream of `count` documents every seq_len tokens.
// Returns pairs (position in the stream, token offset in that document): sample i runs from pair i to pair i + 1.
// num_threads as above.
Array<int64_t> concat_index(const uint32_t* lengths, int64_t count, int64_t seq_len, int64_t num_threads = 0);
Array<int64_t> concat_index(const int64_t* lengths, int64_t count, int64_t seq_len, int64_t num_threads = 0);

// Pieces (document, start) of at most seq_len tokens for best-fit packing; empty documents give none.
struct Pieces {
    std::vector<int64_t> documents;
    std::vector<int64_t> starts;
    std::vector<int64_t> lengths;
};
Pieces cut_documents(const int64_t* lengths, int64_t num_documents, const int64_t* documents, int64_t count,
                     int64_t seq_len);

// Which source sample number n takes and the number of that sample within its source, for `count` samples
// from n = sum(taken). `taken` (samples already drawn from each source) is advanced.
// At every prefix of n samples |taken[s] - n * weights[s] / sum(weights)| < 1, exactly.
struct Blend {
    std::vector<int32_t> sources;
    std::vector<int64_t> indices;
};
Blend blend(const int64_t* weights, int64_t* taken, int64_t num_sources, int64_t count);

}  // namespace meditron
