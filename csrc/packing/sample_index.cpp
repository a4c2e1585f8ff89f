#include "sample_index.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace meditron {
namespace {

constexpr int64_t fetched_ahead = 64;  // documents at most: those of most samples

[[noreturn]] void refuse_sample(int64_t sample) {
    throw std::out_of_range("the index of the samples does not fit its documents (sample " + std::to_string(sample) +
                            "): it is damaged, or of other data");
}

}  // namespace

SampleIndex::SampleIndex(const TokenFile& file, Numbers documents, Numbers starts, Numbers boundaries, Numbers samples,
                         int64_t seq_len, bool is_concat)
    : file_(&file),
      documents_(documents),
      starts_(starts),
      boundaries_(boundaries),
      samples_(samples),
      seq_len_(seq_len),
      is_concat_(is_concat) {
    if (seq_len < 1) throw std::invalid_argument("seq_len must be at least 1, not " + std::to_string(seq_len));
    const int64_t columns = is_concat ? 2 : 1;
    if (boundaries.size / columns - 1 != samples.size || boundaries.size % columns != 0)
        throw std::invalid_argument("an index of " + std::to_string(samples.size) + " samples needs " +
                                    std::to_string(columns * (samples.size + 1)) + " boundaries, not " +
                                    std::to_string(boundaries.size));
    if (starts.size != (is_concat ? 0 : documents.size))
        throw std::invalid_argument("there are " + std::to_string(starts.size) + " starts for " +
                                    std::to_string(documents.size) + " documents");
}

// False when there is no such sample or the index is damaged.
bool SampleIndex::find(int64_t sample, Range& found) const {
    if (sample < 0 || sample >= samples_.size) return false;
    const int64_t number = samples_[sample];
    if (number < 0 || number >= samples_.size) return false;
    if (is_concat_) {
        const bool ends_inside = boundaries_[2 * number + 3] > 0;  // its last document continues in the next sample
        found = {boundaries_[2 * number], boundaries_[2 * number + 2], boundaries_[2 * number + 1]};
        if (found.last > documents_.size - ends_inside) return false;
        found.last += ends_inside;
    } else {
        found = {boundaries_[number], boundaries_[number + 1], 0};
    }
    return found.first >= 0 && found.first <= found.last && found.last <= documents_.size && found.first_offset >= 0;
}

void SampleIndex::fetch_boundaries(int64_t sample) const {
    if (sample < 0 || sample >= samples_.size) return;
    const int64_t number = samples_[sample];
    if (number >= 0 && number < samples_.size) boundaries_.fetch_ahead(is_concat_ ? 2 * number : number);
}

void SampleIndex::fetch_pieces(int64_t sample) const {
    constexpr int64_t per_line = 64 / sizeof(uint32_t);
    Range pieces;
    if (!find(sample, pieces)) return;
    for (int64_t i = pieces.first; i < std::min(pieces.last, pieces.first + fetched_ahead); i += per_line) {
        documents_.fetch_ahead(i);
        if (!is_concat_) starts_.fetch_ahead(i);
    }
}

void SampleIndex::fetch_documents(int64_t sample) const {
    Range pieces;
    if (!find(sample, pieces)) return;
    for (int64_t i = pieces.first; i < std::min(pieces.last, pieces.first + fetched_ahead); ++i)
        file_->fetch_ahead(documents_[i]);
}

void SampleIndex::append_segments(int64_t sample, std::vector<Segment>& segments) const {
    if (sample < 0 || sample >= samples_.size)
        throw std::out_of_range("sample " + std::to_string(sample) + " does not exist: there are " +
                                std::to_string(samples_.size));
    Range pieces;
    if (!find(sample, pieces)) refuse_sample(sample);
    int64_t room = seq_len_;
    for (int64_t block = pieces.first; block < pieces.last; block += fetched_ahead) {
        const int64_t end = std::min(pieces.last, block + fetched_ahead);
        for (int64_t i = block; i < end; ++i) file_->fetch_further_ahead(documents_[i]);
        for (int64_t i = block; i < end; ++i) {
            const int64_t document = documents_[i];
            const TokenFile::Place place = file_->document(document);
            int64_t start = is_concat_ ? 0 : starts_[i];
            if (i == pieces.first) start += pieces.first_offset;
            if (start < 0 || start > place.num_tokens) refuse_sample(sample);
            const int64_t left = place.num_tokens - start, length = std::min(left, room);
            if (length == 0) {
                if (is_concat_) continue;  // an empty document
                refuse_sample(sample);
            }
            const uint8_t* from = file_->bin() + place.first_byte + start * file_->item_size();
            segments.push_back({document, start, length, from, length == left});
            room -= length;
        }
    }
}

}  // namespace meditron
