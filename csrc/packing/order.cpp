// The order of documents and samples: seeded shuffles, the concatenated stream, the blend of sources.

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "packing.h"

namespace meditron {
namespace {

__extension__ typedef unsigned __int128 uint128;
__extension__ typedef __int128 int128;

// Steele, Lea, Flood: "Fast splittable pseudorandom number generators" (2014).
class SplitMix64 {
public:
    explicit SplitMix64(uint64_t seed) : state_(seed) {}

    uint64_t next() {
        state_ += 0x9e3779b97f4a7c15u;
        uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

    // Uniform in 0 .. range-1 without bias (Lemire, "Fast random integer generation in an interval", 2019).
    uint64_t below(uint64_t range) {
        uint128 product = static_cast<uint128>(next()) * range;
        if (static_cast<uint64_t>(product) < range) {
            const uint64_t threshold = (0 - range) % range;
            while (static_cast<uint64_t>(product) < threshold) product = static_cast<uint128>(next()) * range;
        }
        return static_cast<uint64_t>(product >> 64);
    }

private:
    uint64_t state_;
};

int64_t saturate(int128 value) {
    constexpr int64_t largest = std::numeric_limits<int64_t>::max();
    return value > largest ? largest : static_cast<int64_t>(value);
}

void check_document(int64_t document, int64_t num_documents) {
    if (document < 0 || document >= num_documents)
        throw std::out_of_range("document " + std::to_string(document) + " does not exist: there are " +
                                std::to_string(num_documents));
}

void check_seq_len(int64_t seq_len) {
    if (seq_len < 1) throw std::invalid_argument("seq_len must be at least 1, not " + std::to_string(seq_len));
}

int64_t checked_length(const int64_t* lengths, int64_t num_documents, int64_t document) {
    check_document(document, num_documents);
    if (lengths[document] < 0)
        throw std::invalid_argument("document " + std::to_string(document) + " has the negative length " +
                                    std::to_string(lengths[document]));
    return lengths[document];
}

}  // namespace

std::vector<int64_t> permutation(int64_t n, uint64_t seed) {
    if (n < 0) throw std::invalid_argument("cannot order " + std::to_string(n) + " items");
    std::vector<int64_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), int64_t{0});
    SplitMix64 random(seed);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    return order;
}

std::vector<int64_t> concat_index(const int64_t* lengths, int64_t num_documents, const int64_t* order,
                                  int64_t order_size, int64_t seq_len) {
    check_seq_len(seq_len);
    std::vector<int64_t> boundaries;
    int64_t until_cut = 0;  // tokens until the next sample begins
    for (int64_t position = 0; position < order_size; ++position) {
        const int64_t length = checked_length(lengths, num_documents, order[position]);
        int64_t offset = 0;
        while (length - offset > until_cut) {
            offset += until_cut;
            boundaries.push_back(position);
            boundaries.push_back(offset);
            until_cut = seq_len;
        }
        until_cut -= length - offset;
    }
    boundaries.push_back(order_size);
    boundaries.push_back(0);
    return boundaries;
}

Segments concat_segments(const int64_t* lengths, int64_t num_documents, const int64_t* order, int64_t order_size,
                         const int64_t* boundaries, int64_t num_boundaries, const int64_t* samples,
                         int64_t num_samples) {
    Segments result;
    result.sample_offsets.push_back(0);
    for (int64_t i = 0; i < num_samples; ++i) {
        const int64_t sample = samples[i];
        if (sample < 0 || sample >= num_boundaries - 1)
            throw std::out_of_range("sample " + std::to_string(sample) + " does not exist: there are " +
                                    std::to_string(num_boundaries - 1));
        const int64_t* from = boundaries + 2 * sample;
        if (from[0] < 0 || from[0] >= order_size || from[2] > order_size)
            throw std::out_of_range("the sample index does not belong to these documents");
        for (int64_t position = from[0]; position <= from[2] && position < order_size; ++position) {
            const int64_t document = order[position];
            const int64_t start = position == from[0] ? from[1] : 0;
            const int64_t end = position == from[2] ? from[3] : checked_length(lengths, num_documents, document);
            if (end > start) result.rows.insert(result.rows.end(), {document, start, end - start});
        }
        result.sample_offsets.push_back(static_cast<int64_t>(result.rows.size() / 3));
    }
    return result;
}

Pieces cut_documents(const int64_t* lengths, int64_t num_documents, const int64_t* documents, int64_t count,
                     int64_t seq_len) {
    check_seq_len(seq_len);
    Pieces pieces;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t length = checked_length(lengths, num_documents, documents[i]);
        for (int64_t start = 0; start < length; start += seq_len) {
            pieces.documents.push_back(documents[i]);
            pieces.starts.push_back(start);
            pieces.lengths.push_back(std::min(seq_len, length - start));
            if (length - start <= seq_len) break;  // start + seq_len may overflow
        }
    }
    return pieces;
}

// Sample k of source s may be drawn from slot floor(k * W / w) on and must be before slot ceil((k + 1) * W / w):
// these are the windows of proportionate-fair scheduling (Baruah et al., 1996), and drawing the earliest deadline
// first meets all of them, which is the same as an error below one sample at every prefix. Drawing the largest
// error first, the usual rule, does not keep that bound when there are many sources.
Blend blend(const int64_t* weights, int64_t* taken, int64_t num_sources, int64_t count) {
    if (num_sources < 1) throw std::invalid_argument("there is no source to draw from");
    if (count < 0) throw std::invalid_argument("cannot draw " + std::to_string(count) + " samples");
    int128 total = 0, drawn = 0;
    for (int64_t s = 0; s < num_sources; ++s) {
        if (weights[s] < 1 || taken[s] < 0)
            throw std::invalid_argument("source " + std::to_string(s) + " needs a weight of at least 1 and a count of at least 0");
        total += weights[s];
        drawn += taken[s];
    }
    if (total > (int128{1} << 62) || drawn + count > (int128{1} << 62))
        throw std::invalid_argument("the weights or the sample numbers add up to more than 2^62");

    const size_t num = static_cast<size_t>(num_sources);
    std::vector<int64_t> release(num), deadline(num);
    const auto update = [&](size_t s) {
        release[s] = saturate(static_cast<int128>(taken[s]) * total / weights[s]);
        deadline[s] = saturate((static_cast<int128>(taken[s] + 1) * total + weights[s] - 1) / weights[s]);
    };
    for (size_t s = 0; s < num; ++s) update(s);

    Blend result;
    result.sources.reserve(static_cast<size_t>(count));
    result.indices.reserve(static_cast<size_t>(count));
    int64_t slot = static_cast<int64_t>(drawn);
    for (int64_t i = 0; i < count; ++i, ++slot) {
        size_t chosen = num;
        for (size_t s = 0; s < num; ++s)
            if (release[s] <= slot && (chosen == num || deadline[s] < deadline[chosen])) chosen = s;
        if (chosen == num) throw std::invalid_argument("the counts were not drawn with these weights");
        result.sources.push_back(static_cast<int32_t>(chosen));
        result.indices.push_back(taken[chosen]++);
        update(chosen);
    }
    return result;
}

}  // namespace meditron
