// From segments to the tensors of a micro-batch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "sample_index.h"

namespace meditron {

// The arrays of a micro-batch of T tokens [T], 13 bytes a token: the loader is bound by memory, and the device widens
// them faster than the host writes them.
struct BatchArrays {
    int32_t* tokens;
    int32_t* labels;
    int32_t* positions;
    uint8_t* loss_mask;
};

// A sample of a micro-batch, by its number in an index.
struct SampleRef {
    const SampleIndex* index;
    int64_t number;
};

// A token id that is negative or too large.
struct BadToken : std::runtime_error {
    BadToken(int64_t sample_, int64_t document_, int64_t token_)
        : std::runtime_error("token id outside the vocabulary"), sample(sample_), document(document_), token(token_) {}
    int64_t sample;  // place among the given samples
    int64_t document, token;
};

// Writes num_samples samples of seq_len tokens one after the other and returns where their segments begin, with the
// total at the end. Labels are the next token of the same document, also beyond the segment's end; where the document
// ends, label and mask are 0. Positions count from 0 in each segment. Room that is left in a sample becomes one padding
// segment of zeros. Ids must be below vocab_size (0: no limit) and 2^31, else BadToken is thrown.
std::vector<int32_t> gather(const SampleRef* samples, int64_t num_samples, int64_t seq_len, int64_t vocab_size,
                            const BatchArrays& out);

}  // namespace meditron
