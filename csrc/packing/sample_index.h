// Which tokens of which documents each sample of one epoch of one source holds. The arrays are not owned and may be
// memory-mapped files that hold anything: every number is checked where it is used.
#pragma once

#include <cstdint>
#include <vector>

#include "token_file.h"

namespace meditron {

// An array of uint32 or int64, not owned.
struct Numbers {
    const void* data;
    int64_t size;
    bool wide;  // int64

    void fetch_ahead(int64_t i) const { __builtin_prefetch(static_cast<const char*>(data) + i * (wide ? 8 : 4)); }
    int64_t operator[](int64_t i) const {
        return wide ? static_cast<const int64_t*>(data)[i] : int64_t{static_cast<const uint32_t*>(data)[i]};
    }
};

// Tokens start .. start + length - 1 of a document; `from` is where they lie.
struct Segment {
    int64_t document, start, length;
    const uint8_t* from;
    bool ends_document;
};

class SampleIndex {
public:
    // Sample i is number samples[i] of the cut stream, or of the bins.
    // concat: `documents` is the stream; boundaries is what concat_index gives, and starts is empty.
    // best_fit: `documents` and `starts` are the pieces in the order of their bins; boundaries are bin_offsets.
    // Throws std::invalid_argument when the sizes of the arrays do not fit together.
    SampleIndex(const TokenFile& file, Numbers documents, Numbers starts, Numbers boundaries, Numbers samples,
                int64_t seq_len, bool is_concat);

    const TokenFile& file() const { return *file_; }
    int64_t seq_len() const { return seq_len_; }
    int64_t num_samples() const { return samples_.size; }

    // Appends the segments of a sample: at least one token each, at most seq_len together.
    // Throws std::out_of_range for a sample that does not exist, and for an index that does not fit the file.
    void append_segments(int64_t sample, std::vector<Segment>& segments) const;

    // Three hints, in this order and some time apart, that the segments of a sample will be asked for: each fetches
    // what the next one reads. Any number may be given.
    void fetch_boundaries(int64_t sample) const;
    void fetch_pieces(int64_t sample) const;
    void fetch_documents(int64_t sample) const;

private:
    struct Range {
        int64_t first, last;   // positions in `documents`, the last one excluded
        int64_t first_offset;  // where the first document begins (concat)
    };
    bool find(int64_t sample, Range& found) const;

    const TokenFile* file_;
    Numbers documents_, starts_, boundaries_, samples_;
    int64_t seq_len_;
    bool is_concat_;
};

}  // namespace meditron
