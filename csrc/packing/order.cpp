// The order of documents and samples: seeded shuffles, the concatenated stream, the blend of sources.

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "packing.h"
#include "parallel.h"

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

void check_seq_len(int64_t seq_len) {
    if (seq_len < 1) throw std::invalid_argument("seq_len must be at least 1, not " + std::to_string(seq_len));
}

void check_document(int64_t document, int64_t num_documents) {
    if (document < 0 || document >= num_documents)
        throw std::out_of_range("document " + std::to_string(document) + " does not exist: there are " +
                                std::to_string(num_documents));
}

void check_length(int64_t length, int64_t document) {
    if (length < 0)
        throw std::invalid_argument("document " + std::to_string(document) + " has the negative length " +
                                    std::to_string(length));
}

void add_tokens(int64_t& sum, int64_t tokens) {
    if (__builtin_add_overflow(sum, tokens, &sum))
        throw std::invalid_argument("the documents have more than 2^63 tokens");
}

// tokens / seq_len, rounded up.
int64_t rounded_up(int64_t tokens, int64_t seq_len) { return tokens / seq_len + (tokens % seq_len != 0); }

// Fisher-Yates from the end. Which items trade places does not depend on the items: a block of places is drawn first,
// so that their fetches from memory overlap.
template <class Item>
void shuffle(Item* items, int64_t n, uint64_t seed) {
    constexpr int64_t block_size = 256;
    int64_t places[block_size];
    SplitMix64 random(seed);
    for (int64_t left = n; left > 1;) {
        const int64_t count = std::min(block_size, left - 1);
        for (int64_t i = 0; i < count; ++i) {
            places[i] = static_cast<int64_t>(random.below(static_cast<uint64_t>(left - i)));
            __builtin_prefetch(items + places[i], 1);
        }
        for (int64_t i = 0; i < count; ++i) std::swap(items[left - 1 - i], items[places[i]]);
        left -= count;
    }
}

// The lengths travel with their documents: fetching them afterwards would cost as much as the shuffle.
template <class Number>
Stream<Number> shuffle_documents(const int64_t* lengths, const int64_t* documents, int64_t count, uint64_t seed) {
    struct Item {
        Number document, length;
    };
    Array<Item> items(count);
    for (int64_t i = 0; i < count; ++i)
        items[i] = {static_cast<Number>(documents[i]), static_cast<Number>(lengths[documents[i]])};
    shuffle(items.data(), count, seed);
    Stream<Number> stream{Array<Number>(count), Array<Number>(count)};
    for (int64_t i = 0; i < count; ++i) {
        stream.documents[i] = items[i].document;
        stream.lengths[i] = items[i].length;
    }
    return stream;
}

// Cuts the documents begin .. end of the stream, which begin at token `tokens_before`.
template <class Number>
void cut_block(const Number* lengths, int64_t begin, int64_t end, int64_t tokens_before, int64_t seq_len,
               int64_t* boundaries) {
    // Unsigned, as the place after the last sample may lie beyond 2^63.
    const uint64_t step = static_cast<uint64_t>(seq_len);
    uint64_t document_begin = static_cast<uint64_t>(tokens_before);
    int64_t* row = boundaries + 2 * rounded_up(tokens_before, seq_len);  // of the next sample to begin
    uint64_t cut = static_cast<uint64_t>(rounded_up(tokens_before, seq_len)) * step;
    for (int64_t position = begin; position < end; ++position) {
        const uint64_t document_end = document_begin + static_cast<uint64_t>(lengths[position]);
        for (; cut < document_end; cut += step, row += 2) {
            row[0] = position;
            row[1] = static_cast<int64_t>(cut - document_begin);
        }
        document_begin = document_end;
    }
}

template <class Number>
Array<int64_t> cut_stream(const Number* lengths, int64_t count, int64_t seq_len, int64_t num_threads) {
    check_seq_len(seq_len);
    const int64_t threads = threads_to_use(num_threads);
    const Blocks blocks = blocks_for_threads(count, threads);
    std::vector<int64_t> tokens_before(static_cast<size_t>(blocks.count) + 1, 0);
    parallel_for(blocks.count, threads, [&](int64_t block) {
        int64_t tokens = 0;
        const int64_t end = blocks.begin(block + 1);
        for (int64_t position = blocks.begin(block); position < end; ++position) {
            check_length(static_cast<int64_t>(lengths[position]), position);
            add_tokens(tokens, static_cast<int64_t>(lengths[position]));
        }
        tokens_before[static_cast<size_t>(block) + 1] = tokens;
    });
    for (size_t block = 1; block < tokens_before.size(); ++block)
        add_tokens(tokens_before[block], tokens_before[block - 1]);

    const int64_t num_samples = rounded_up(tokens_before.back(), seq_len);
    if (num_samples > std::numeric_limits<int64_t>::max() / 4)
        throw std::invalid_argument("the documents give " + std::to_string(num_samples) +
                                    " samples, more than any memory holds");
    Array<int64_t> boundaries(2 * (num_samples + 1));
    parallel_for(blocks.count, threads, [&](int64_t block) {
        cut_block(lengths, blocks.begin(block), blocks.begin(block + 1), tokens_before[static_cast<size_t>(block)],
                  seq_len, boundaries.data());
    });
    boundaries[2 * num_samples] = count;
    boundaries[2 * num_samples + 1] = 0;
    return boundaries;
}

}  // namespace

Array<int64_t> permutation(int64_t n, uint64_t seed) {
    if (n < 0) throw std::invalid_argument("cannot order " + std::to_string(n) + " items");
    Array<int64_t> order(n);
    std::iota(order.data(), order.data() + n, int64_t{0});
    shuffle(order.data(), n, seed);
    return order;
}

bool fits_32_bits(const int64_t* lengths, int64_t num_documents, const int64_t* documents, int64_t count) {
    constexpr int64_t largest = std::numeric_limits<uint32_t>::max();
    bool fits = num_documents <= largest;
    for (int64_t i = 0; i < count; ++i) {
        check_document(documents[i], num_documents);
        check_length(lengths[documents[i]], documents[i]);
        fits = fits && lengths[documents[i]] <= largest;
    }
    return fits;
}

Stream<uint32_t> shuffle_documents_32(const int64_t* lengths, const int64_t* documents, int64_t count, uint64_t seed) {
    return shuffle_documents<uint32_t>(lengths, documents, count, seed);
}
Stream<int64_t> shuffle_documents_64(const int64_t* lengths, const int64_t* documents, int64_t count, uint64_t seed) {
    return shuffle_documents<int64_t>(lengths, documents, count, seed);
}

Array<int64_t> concat_index(const uint32_t* lengths, int64_t count, int64_t seq_len, int64_t num_threads) {
    return cut_stream(lengths, count, seq_len, num_threads);
}
Array<int64_t> concat_index(const int64_t* lengths, int64_t count, int64_t seq_len, int64_t num_threads) {
    return cut_stream(lengths, count, seq_len, num_threads);
}

Pieces cut_documents(const int64_t* lengths, int64_t num_documents, const int64_t* documents, int64_t count,
                     int64_t seq_len) {
    check_seq_len(seq_len);
    Pieces pieces;
    for (int64_t i = 0; i < count; ++i) {
        check_document(documents[i], num_documents);
        const int64_t length = lengths[documents[i]];
        check_length(length, documents[i]);
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
            throw std::invalid_argument("source " + std::to_string(s) +
                                        " needs a weight of at least 1 and a count of at least 0");
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
