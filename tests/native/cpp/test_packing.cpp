// Packing, shuffles, cuts and blends on random inputs, against the plainest way to compute each.

#include <algorithm>
#include <functional>
#include <set>
#include <stdexcept>

#include "check.h"
#include "packing.h"
#include "parallel.h"

using namespace meditron;

namespace {

int64_t naive_best_fit(std::vector<int64_t> lengths, int64_t capacity) {
    std::sort(lengths.begin(), lengths.end(), std::greater<>());
    std::multiset<int64_t> space;
    for (const int64_t length : lengths) {
        if (length == 0) continue;
        const auto fullest = space.lower_bound(length);
        const int64_t left = fullest == space.end() ? capacity : *fullest;
        if (fullest != space.end()) space.erase(fullest);
        space.insert(left - length);
    }
    return static_cast<int64_t>(space.size());
}

void best_fit(Random& random, int64_t n, int64_t capacity) {
    std::vector<int64_t> lengths(static_cast<size_t>(n));
    for (int64_t& length : lengths) length = uniform(random, 0, std::min<int64_t>(capacity, 1 << 20));
    const int64_t threads = uniform(random, 1, 4);
    const Bins bins = pack_best_fit(lengths.data(), n, capacity, threads);
    std::vector<bool> seen(lengths.size(), false);
    CHECK(bins.order.size() == n && bins.bin_offsets[0] == 0 && bins.bin_offsets[bins.bin_offsets.size() - 1] == n);
    for (int64_t bin = 0; bin + 1 < bins.bin_offsets.size(); ++bin) {
        int64_t sum = 0;
        for (int64_t i = bins.bin_offsets[bin]; i < bins.bin_offsets[bin + 1]; ++i) {
            const size_t document = static_cast<size_t>(bins.order[i]);
            CHECK(!seen[document]);
            seen[document] = true;
            sum += lengths[document];
        }
        CHECK(sum <= capacity);
    }
    const int64_t expected = naive_best_fit(lengths, capacity);
    CHECK(bins.bin_offsets.size() - 1 == std::max<int64_t>(expected, n > 0 ? 1 : 0));
}

void concat(Random& random, int64_t n, int64_t seq_len) {
    std::vector<int64_t> lengths(static_cast<size_t>(n)), documents(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
        lengths[static_cast<size_t>(i)] = uniform(random, 0, 40);
        documents[static_cast<size_t>(i)] = i;
    }
    CHECK(fits_32_bits(lengths.data(), n, documents.data(), n));
    const auto stream = shuffle_documents_32(lengths.data(), documents.data(), n, 5);
    const auto wide = shuffle_documents_64(lengths.data(), documents.data(), n, 5);
    const Array<int64_t> order = permutation(n, 5);
    int64_t tokens = 0;
    std::vector<int64_t> expected;
    for (int64_t i = 0; i < n; ++i) {
        CHECK(stream.documents[i] == order[i] && wide.documents[i] == order[i]);
        CHECK(stream.lengths[i] == lengths[static_cast<size_t>(order[i])] && wide.lengths[i] == stream.lengths[i]);
        for (int64_t offset = 0; offset < stream.lengths[i]; ++offset, ++tokens)
            if (tokens % seq_len == 0) expected.insert(expected.end(), {i, offset});
    }
    expected.insert(expected.end(), {n, 0});
    for (const int64_t threads : {1, 3}) {
        const Array<int64_t> cuts = concat_index(stream.lengths.data(), n, seq_len, threads);
        CHECK(std::equal(expected.begin(), expected.end(), cuts.data(), cuts.data() + cuts.size()));
    }
    const Array<int64_t> cuts = concat_index(wide.lengths.data(), n, seq_len, 2);
    CHECK(std::equal(expected.begin(), expected.end(), cuts.data(), cuts.data() + cuts.size()));
}

void blends(Random& random) {
    std::vector<int64_t> weights(static_cast<size_t>(uniform(random, 1, 6)));
    int64_t total = 0;
    for (int64_t& weight : weights) total += weight = uniform(random, 1, 1000);
    std::vector<int64_t> taken(weights.size(), 0), counts(weights.size(), 0);
    const Blend drawn = blend(weights.data(), taken.data(), static_cast<int64_t>(weights.size()), 200);
    for (size_t i = 0; i < drawn.sources.size(); ++i) {
        const size_t source = static_cast<size_t>(drawn.sources[i]);
        CHECK(drawn.indices[i] == counts[source]++);
        for (size_t s = 0; s < weights.size(); ++s)
            CHECK(std::abs(counts[s] * total - static_cast<int64_t>(i + 1) * weights[s]) < total);
    }
    CHECK(taken == counts);
}

void exceptions_of_threads() {
    for (int repetition = 0; repetition < 20; ++repetition) {
        try {
            parallel_for(100, 4, [](int64_t i) {
                if (i % 10 == 7) throw std::out_of_range(std::to_string(i));
            });
            CHECK(false);
        } catch (const std::out_of_range& error) {
            CHECK(std::string(error.what()) == "7");  // the first, whichever thread was faster
        }
    }
}

}  // namespace

int main() {
    Random random(1);
    for (int i = 0; i < 400; ++i) best_fit(random, uniform(random, 0, 60), uniform(random, 1, 40));
    best_fit(random, 400'000, 500);                   // several threads
    best_fit(random, 3'000, int64_t{1} << 40);        // sorted by comparison
    best_fit(random, 3'000, (int64_t{1} << 22) - 1);  // the largest histogram
    for (int i = 0; i < 200; ++i) concat(random, uniform(random, 0, 60), uniform(random, 1, 50));
    concat(random, 400'000, 37);
    for (int i = 0; i < 100; ++i) blends(random);
    exceptions_of_threads();
    std::puts("ok");
}
