#include "gather.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

// One build serves every processor: the copy exists for several instruction sets, chosen when it runs.
#if defined(__x86_64__) && defined(__GNUC__)
#define MEDITRON_X86_VARIANTS 1
#endif

namespace meditron {
namespace {

template <class T>
T load(const uint8_t* from) {  // ids may lie at any byte
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}

// Copies `count` >= 1 ids and everything that follows from them but the last label. Returns the largest id, where a
// negative one counts as 2^63 or more.
template <class T>
[[gnu::always_inline]] inline uint64_t copy_loop(const uint8_t* __restrict__ from, int64_t count,
                                                 int32_t* __restrict__ tokens, int32_t* __restrict__ labels,
                                                 int32_t* __restrict__ positions, uint8_t* __restrict__ loss_mask) {
    using Unsigned = std::make_unsigned_t<T>;
    const uint8_t* __restrict__ next = from + sizeof(T);
    Unsigned largest = 0;
    for (int64_t i = 0; i < count - 1; ++i) {
        const T token = load<T>(from + i * static_cast<int64_t>(sizeof(T)));
        largest = std::max(largest, static_cast<Unsigned>(token));
        tokens[i] = static_cast<int32_t>(token);
        labels[i] = static_cast<int32_t>(load<T>(next + i * static_cast<int64_t>(sizeof(T))));
        positions[i] = static_cast<int32_t>(i);
        loss_mask[i] = 1;
    }
    const T token = load<T>(from + (count - 1) * static_cast<int64_t>(sizeof(T)));
    tokens[count - 1] = static_cast<int32_t>(token);
    positions[count - 1] = static_cast<int32_t>(count - 1);
    // Through T again, so that a negative value stays negative in 64 bits.
    return static_cast<uint64_t>(static_cast<T>(std::max(largest, static_cast<Unsigned>(token))));
}

using Copy = uint64_t (*)(const uint8_t*, int64_t, int32_t*, int32_t*, int32_t*, uint8_t*);

template <class T>
uint64_t copy_portable(const uint8_t* from, int64_t count, int32_t* tokens, int32_t* labels, int32_t* positions,
                       uint8_t* loss_mask) {
    return copy_loop<T>(from, count, tokens, labels, positions, loss_mask);
}

#ifdef MEDITRON_X86_VARIANTS
template <class T>
[[gnu::target("avx2")]] uint64_t copy_avx2(const uint8_t* from, int64_t count, int32_t* tokens, int32_t* labels,
                                           int32_t* positions, uint8_t* loss_mask) {
    return copy_loop<T>(from, count, tokens, labels, positions, loss_mask);
}

template <class T>
[[gnu::target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")]] uint64_t copy_avx512(
    const uint8_t* from, int64_t count, int32_t* tokens, int32_t* labels, int32_t* positions, uint8_t* loss_mask) {
    return copy_loop<T>(from, count, tokens, labels, positions, loss_mask);
}
#endif

template <class T>
Copy copy_of_type() {
#ifdef MEDITRON_X86_VARIANTS
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return copy_avx512<T>;
    if (__builtin_cpu_supports("avx2")) return copy_avx2<T>;
#endif
    return copy_portable<T>;
}

Copy copy_for(int dtype_code) {
    switch (dtype_code) {
        case 1: return copy_of_type<uint8_t>();
        case 2: return copy_of_type<int8_t>();
        case 3: return copy_of_type<int16_t>();
        case 4: return copy_of_type<int32_t>();
        case 5: return copy_of_type<int64_t>();
        default: return copy_of_type<uint16_t>();
    }
}

int64_t read_id(int dtype_code, const uint8_t* from) {
    switch (dtype_code) {
        case 1: return load<uint8_t>(from);
        case 2: return load<int8_t>(from);
        case 3: return load<int16_t>(from);
        case 4: return load<int32_t>(from);
        case 5: return load<int64_t>(from);
        default: return load<uint16_t>(from);
    }
}

void fetch_ahead(const Segment& segment, int64_t item_size) {
    constexpr int64_t line = 64, most = 16 * line;  // beyond it the hardware prefetcher sees the pattern
    const int64_t bytes = std::min(most, segment.length * item_size);
    for (int64_t i = 0; i < bytes; i += line) __builtin_prefetch(segment.from + i);
}

// One sample after the other into the arrays of a micro-batch.
class Writer {
public:
    Writer(const BatchArrays& out, int64_t vocab_size) : out_(out), limit_(uint64_t{1} << 31), cu_seqlens_{0} {
        if (vocab_size > 0) limit_ = std::min(limit_, static_cast<uint64_t>(vocab_size));
    }

    // `next` are the segments of the sample after this one, in a file of items of next_item_size bytes.
    void write(const std::vector<Segment>& segments, const TokenFile& file, int64_t sample, int64_t sample_end,
               const std::vector<Segment>& next, int64_t next_item_size) {
        const Copy copy = copy_for(file.dtype_code());
        for (size_t i = 0; i < segments.size(); ++i) {
            if (i < next.size()) fetch_ahead(next[i], next_item_size);
            const Segment& segment = segments[i];
            if (segment.length > sample_end - at_) throw std::out_of_range("the segments are longer than their sample");
            int64_t last = at_ + segment.length - 1;
            uint64_t largest = copy(segment.from, segment.length, out_.tokens + at_, out_.labels + at_,
                                    out_.positions + at_, out_.loss_mask + at_);
            int64_t label = 0;
            if (!segment.ends_document) {
                label = read_id(file.dtype_code(), segment.from + segment.length * file.item_size());
                largest = std::max(largest, static_cast<uint64_t>(label));
            }
            if (largest >= limit_) refuse(segment, file, sample);
            out_.labels[last] = static_cast<int32_t>(label);
            out_.loss_mask[last] = !segment.ends_document;
            close_segment(segment.length);
        }
        for (size_t i = segments.size(); i < next.size(); ++i) fetch_ahead(next[i], next_item_size);
        if (const int64_t padding = sample_end - at_; padding > 0) {
            const size_t bytes = static_cast<size_t>(padding) * sizeof(int32_t);
            std::memset(out_.tokens + at_, 0, bytes);
            std::memset(out_.labels + at_, 0, bytes);
            std::memset(out_.loss_mask + at_, 0, static_cast<size_t>(padding));
            for (int64_t i = 0; i < padding; ++i) out_.positions[at_ + i] = static_cast<int32_t>(i);
            close_segment(padding);
        }
    }

    std::vector<int32_t> cu_seqlens() && { return std::move(cu_seqlens_); }

private:
    void close_segment(int64_t length) {
        at_ += length;
        cu_seqlens_.push_back(static_cast<int32_t>(at_));
    }

    [[noreturn]] void refuse(const Segment& segment, const TokenFile& file, int64_t sample) const {
        const int64_t count = segment.length + !segment.ends_document;  // the last label counts too
        int64_t i = 0, token = 0;
        for (; i < count; ++i) {
            token = read_id(file.dtype_code(), segment.from + i * file.item_size());
            if (static_cast<uint64_t>(token) >= limit_) break;
        }
        throw BadToken(sample, segment.document, token);
    }

    BatchArrays out_;
    uint64_t limit_;
    int64_t at_ = 0;  // next place in the arrays
    std::vector<int32_t> cu_seqlens_;
};

}  // namespace

std::vector<int32_t> gather(const SampleRef* samples, int64_t num_samples, int64_t seq_len, int64_t vocab_size,
                            const BatchArrays& out) {
    if (num_samples < 0 || seq_len < 1 ||
        (num_samples > 0 && seq_len > std::numeric_limits<int32_t>::max() / num_samples))
        throw std::invalid_argument("a micro-batch needs seq_len >= 1 and fewer than 2^31 tokens");
    // The data of a sample is scattered in memory: while one sample is copied, the next ones are prefetched.
    Writer writer(out, vocab_size);
    std::vector<Segment> segments, next;
    const auto sample_at = [&](int64_t i) -> const SampleRef& { return samples[std::min(i, num_samples - 1)]; };
    for (int64_t i = -4; i < num_samples; ++i) {
        if (i + 4 < num_samples) samples[i + 4].index->fetch_boundaries(samples[i + 4].number);
        if (i + 3 >= 0 && i + 3 < num_samples) samples[i + 3].index->fetch_pieces(samples[i + 3].number);
        if (i + 2 >= 0 && i + 2 < num_samples) samples[i + 2].index->fetch_documents(samples[i + 2].number);
        next.clear();
        if (i + 1 >= 0 && i + 1 < num_samples) samples[i + 1].index->append_segments(samples[i + 1].number, next);
        if (i == -1)
            for (const Segment& segment : next) fetch_ahead(segment, samples[0].index->file().item_size());
        if (i >= 0)
            writer.write(segments, samples[i].index->file(), i, (i + 1) * seq_len, next,
                         sample_at(i + 1).index->file().item_size());
        std::swap(segments, next);
    }
    return std::move(writer).cu_seqlens();
}

}  // namespace meditron
