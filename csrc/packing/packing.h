// The integer side of data loading: which tokens of which document go where in a packed sample.
// Plain C++17 without Python or torch; every function checks what it is given and throws, none reads outside its input.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace meditron {

// Documents order[bin_offsets[i] .. bin_offsets[i + 1]) go into bin i.
struct Bins {
    std::vector<int64_t> order;
    std::vector<int64_t> bin_offsets;
};

// Best-fit decreasing: documents by falling length, each into the fullest bin that still holds it.
// Throws std::invalid_argument for a length outside [0, capacity]. Deterministic; ties keep the given order.
Bins pack_best_fit(const int64_t* lengths, int64_t num_documents, int64_t capacity);

// A uniform random order of 0 .. n-1 (Fisher-Yates on SplitMix64), a function of n and seed alone.
std::vector<int64_t> permutation(int64_t n, uint64_t seed);

// Cuts the stream of documents lengths[order[0]], lengths[order[1]], ... every seq_len tokens.
// Returns pairs (position in order, token offset in that document): sample i runs from pair i to pair i + 1.
std::vector<int64_t> concat_index(const int64_t* lengths, int64_t num_documents, const int64_t* order,
                                  int64_t order_size, int64_t seq_len);

// Rows of (document, start, length), and where the rows of each asked sample begin (one entry more than samples).
struct Segments {
    std::vector<int64_t> rows;
    std::vector<int64_t> sample_offsets;
};
Segments concat_segments(const int64_t* lengths, int64_t num_documents, const int64_t* order, int64_t order_size,
                         const int64_t* boundaries, int64_t num_boundaries, const int64_t* samples,
                         int64_t num_samples);

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

// Megatron's indexed dataset in memory: the bytes of an .idx and of its .bin, not owned.
// The constructor proves every pointer of the index lies inside the .bin, or throws std::invalid_argument.
class TokenFile {
public:
    TokenFile(const uint8_t* idx, int64_t idx_bytes, const uint8_t* bin, int64_t bin_bytes);

    int dtype_code() const { return dtype_code_; }
    int64_t item_size() const { return item_size_; }
    int64_t num_sequences() const { return num_sequences_; }
    int64_t num_documents() const { return num_documents_; }
    int64_t num_tokens() const { return num_tokens_; }
    // First byte in the .bin and number of tokens; throws std::out_of_range.
    std::pair<int64_t, int64_t> document(int64_t index) const;
    std::vector<int64_t> document_lengths() const;
    const uint8_t* bin() const { return bin_; }

private:
    int64_t size(int64_t sequence) const;
    int64_t pointer(int64_t sequence) const;
    int64_t first_sequence(int64_t document) const;
    void check_sequences(int64_t bin_bytes);
    void check_documents();

    const uint8_t* sizes_;
    const uint8_t* pointers_;
    const uint8_t* document_indices_;
    const uint8_t* bin_;
    int dtype_code_;
    int64_t item_size_, num_sequences_, num_documents_, num_tokens_;
};

// One micro-batch: `num_samples` samples of seq_len tokens each, written one after the other.
struct GatherOutput {
    int64_t* tokens;
    int64_t* labels;
    float* loss_mask;
    int64_t* positions;
};
struct GatherResult {
    std::vector<int32_t> cu_seqlens;
    int64_t bad_segment = -1;  // the first segment that holds a token id outside [0, vocab_size), else -1
    int64_t bad_token = 0;
};
// segments: rows of (source, document, start, length); sample i has rows sample_offsets[i] .. sample_offsets[i + 1].
// What segments leave free of a sample becomes one padding segment: token 0, label 0, mask 0.
GatherResult gather(const std::vector<const TokenFile*>& files, const int64_t* segments, int64_t num_segments,
                    const int64_t* sample_offsets, int64_t num_samples, int64_t seq_len, int64_t vocab_size,
                    const GatherOutput& out);

}  // namespace meditron
