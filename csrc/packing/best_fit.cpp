// Best-fit decreasing over groups of equal bins.
//
// Documents of one length are interchangeable, and so are bins with the same free space, so whole groups are
// filled at once: a group of B bins with free space r takes B * (r / length) documents in O(1). The work per
// document is then only the counting sort by length and writing the answer.
// Filling one bin to the end before touching the next *is* best fit: once a bin with the least sufficient space
// took a document, its smaller remainder is the new least, as long as it suffices.

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>

#include "packing.h"
#include "parallel.h"

namespace meditron {
namespace {

// Bin j of a group holds documents sorted[first_item + j * items_per_bin ..) and all that bin j + parent_shift
// of the parent node holds.
struct Node {
    int64_t parent, parent_shift, items_per_bin, first_item;
};

// Bins shift .. shift + num_bins - 1 of a node.
struct Group {
    int64_t node, shift, num_bins;
};

struct LengthClass {
    int64_t length, count;
};

constexpr int64_t max_histogram_size = int64_t{1} << 22;  // 32 MiB of counters; longer samples sort by comparison

void check_length(int64_t length, int64_t document, int64_t capacity) {
    if (length < 0 || length > capacity)
        throw std::invalid_argument("length " + std::to_string(length) + " of document " + std::to_string(document) +
                                    " is outside 0.." + std::to_string(capacity) + " (the capacity)");
}

// Document numbers by falling length, equal lengths in the given order, and the runs of equal length.
// Index is 32 bits wide where that suffices: half the memory traffic of a step that does little else.
template <class Index>
struct Sorted {
    Array<Index> documents;
    std::vector<LengthClass> classes;
};

// How many documents of each length lengths[begin .. end) holds. Four tables take turns: documents of one length
// often follow each other, and a counter just written is not ready to be read again.
template <class Index>
std::vector<Index> count_lengths(const int64_t* lengths, int64_t begin, int64_t end, int64_t capacity) {
    const size_t num_lengths = static_cast<size_t>(capacity) + 1;
    const size_t num_tables = end - begin > 4 * capacity ? 4 : 1;
    std::vector<Index> counts(num_tables * num_lengths, 0);
    for (int64_t i = begin; i < end; ++i) {
        if (static_cast<uint64_t>(lengths[i]) > static_cast<uint64_t>(capacity)) check_length(lengths[i], i, capacity);
        const size_t table = static_cast<size_t>(i) & (num_tables - 1);
        ++counts[table * num_lengths + static_cast<size_t>(lengths[i])];
    }
    for (size_t table = 1; table < num_tables; ++table)
        for (size_t length = 0; length < num_lengths; ++length) counts[length] += counts[table * num_lengths + length];
    counts.resize(num_lengths);
    return counts;
}

template <class Index>
Sorted<Index> counting_sort(const int64_t* lengths, int64_t n, int64_t capacity, int64_t num_threads) {
    // Every block has counters of its own: not more of them than there are documents to count.
    const Blocks blocks = blocks_for_threads(n, std::clamp<int64_t>(n / (capacity + 1), 1, num_threads));
    std::vector<std::vector<Index>> next(static_cast<size_t>(blocks.count));
    parallel_for(blocks.count, num_threads, [&](int64_t block) {
        next[static_cast<size_t>(block)] =
            count_lengths<Index>(lengths, blocks.begin(block), blocks.begin(block + 1), capacity);
    });

    Sorted<Index> sorted{Array<Index>(n), {}};
    Index position = 0;
    for (int64_t length = capacity; length >= 0; --length) {  // the counters become the first place of their documents
        const Index first = position;
        for (std::vector<Index>& of_block : next) {
            const Index count = of_block[static_cast<size_t>(length)];
            of_block[static_cast<size_t>(length)] = position;
            position = static_cast<Index>(position + count);
        }
        if (position != first) sorted.classes.push_back({length, static_cast<int64_t>(position - first)});
    }
    Index* const documents = sorted.documents.data();
    parallel_for(blocks.count, num_threads, [&](int64_t block) {
        constexpr Index line = 64 / sizeof(Index);
        Index* const next_place = next[static_cast<size_t>(block)].data();
        const int64_t end = blocks.begin(block + 1);
        for (int64_t i = blocks.begin(block); i < end; ++i) {
            const Index place = next_place[lengths[i]]++;
            documents[place] = static_cast<Index>(i);
            __builtin_prefetch(documents + place + line, 1);  // thousands of places are written to in turn
        }
    });
    return sorted;
}

template <class Index>
Sorted<Index> comparison_sort(const int64_t* lengths, int64_t n, int64_t capacity) {
    for (int64_t i = 0; i < n; ++i) check_length(lengths[i], i, capacity);
    Sorted<Index> sorted{Array<Index>(n), {}};
    Index* const documents = sorted.documents.data();
    std::iota(documents, documents + n, Index{0});
    std::stable_sort(documents, documents + n, [&](Index a, Index b) { return lengths[a] > lengths[b]; });
    for (int64_t i = 0; i < n; ++i) {
        const int64_t length = lengths[documents[i]];
        if (sorted.classes.empty() || sorted.classes.back().length != length) sorted.classes.push_back({length, 0});
        ++sorted.classes.back().count;
    }
    return sorted;
}

class Packer {
public:
    explicit Packer(int64_t capacity) : capacity_(capacity) {}

    void add(int64_t length, int64_t count, int64_t first) {
        while (count > 0) {
            const auto fullest = open_.lower_bound(length);
            if (fullest == open_.end()) return open_bins(length, count, first);
            const int64_t space = fullest->first;
            const int64_t per_bin = space / length;
            const Group group = fullest->second.back();
            fullest->second.pop_back();
            if (fullest->second.empty()) open_.erase(fullest);

            int64_t used = std::min(group.num_bins, count / per_bin);
            if (used > 0) place(group, 0, used, per_bin, first, space - per_bin * length);
            first += used * per_bin;
            count -= used * per_bin;
            if (used < group.num_bins && count > 0) {  // fewer than per_bin documents are left: one bin takes them
                place(group, used, 1, count, first, space - count * length);
                ++used;
                count = 0;
            }
            if (used < group.num_bins) open_[space].push_back({group.node, group.shift + used, group.num_bins - used});
        }
    }

    // All groups, the fullest bins first.
    std::vector<Group> groups() const {
        std::vector<Group> all;
        for (const auto& [space, groups] : open_) all.insert(all.end(), groups.begin(), groups.end());
        return all;
    }

    // What each bin of the group holds, from its longest documents to its shortest; parent_shift becomes the shift
    // of the group's first bin within the step.
    std::vector<Node> path(const Group& group) const {
        std::vector<Node> steps;
        int64_t shift = group.shift;
        for (int64_t node = group.node; node >= 0; node = nodes_[static_cast<size_t>(node)].parent) {
            Node step = nodes_[static_cast<size_t>(node)];
            std::swap(step.parent_shift, shift);
            shift += step.parent_shift;
            steps.push_back(step);
        }
        std::reverse(steps.begin(), steps.end());
        return steps;
    }

private:
    void open_bins(int64_t length, int64_t count, int64_t first) {
        const int64_t per_bin = capacity_ / length;
        const int64_t full = count / per_bin;
        const Group none{-1, 0, 0};
        if (full > 0) place(none, 0, full, per_bin, first, capacity_ - per_bin * length);
        const int64_t rest = count - full * per_bin;
        if (rest > 0) place(none, 0, 1, rest, first + full * per_bin, capacity_ - rest * length);
    }

    void place(const Group& group, int64_t first_bin, int64_t num_bins, int64_t items_per_bin, int64_t first_item,
               int64_t space_left) {
        nodes_.push_back({group.node, group.shift + first_bin, items_per_bin, first_item});
        open_[space_left].push_back({static_cast<int64_t>(nodes_.size()) - 1, 0, num_bins});
    }

    int64_t capacity_;
    std::vector<Node> nodes_;
    std::map<int64_t, std::vector<Group>> open_;  // by free space
};

// Some bins of one group, and where they go in the answer.
struct Part {
    const std::vector<Node>* steps;
    int64_t first_bin, num_bins, documents_per_bin, at, bin_number;
};

// Writes the bins of a part. Step by step over a block of bins that stays in the cache: every step reads a run of
// `sorted` from end to end.
template <class Index>
void write_part(const Part& part, const Index* sorted, int64_t* order, int64_t* bin_offsets) {
    const int64_t width = part.documents_per_bin;
    const int64_t block_size = std::max<int64_t>(1, 2048 / width);
    for (int64_t first = 0; first < part.num_bins; first += block_size) {
        const int64_t last = std::min(part.num_bins, first + block_size);
        int64_t* column = order + part.at + first * width;
        for (const Node& step : *part.steps) {
            const int64_t items = step.items_per_bin;
            const Index* from = sorted + step.first_item + (part.first_bin + first + step.parent_shift) * items;
            int64_t* to = column;
            if (items == 1) {
                for (int64_t bin = first; bin < last; ++bin, to += width) *to = static_cast<int64_t>(*from++);
            } else {
                for (int64_t bin = first; bin < last; ++bin, to += width, from += items)
                    for (int64_t i = 0; i < items; ++i) to[i] = static_cast<int64_t>(from[i]);
            }
            column += items;
        }
    }
    for (int64_t bin = 0; bin < part.num_bins; ++bin)
        bin_offsets[part.bin_number + bin + 1] = part.at + (bin + 1) * width;
}

template <class Index>
Bins write_bins(const Packer& packer, const Sorted<Index>& sorted, int64_t num_empty, int64_t num_threads) {
    constexpr int64_t documents_per_part = int64_t{1} << 18;
    const std::vector<Group> groups = packer.groups();
    std::vector<std::vector<Node>> paths;
    paths.reserve(groups.size());
    std::vector<Part> parts;
    int64_t at = 0, num_bins = 0;
    for (const Group& group : groups) {
        paths.push_back(packer.path(group));
        int64_t width = 0;
        for (const Node& step : paths.back()) width += step.items_per_bin;
        const int64_t bins_per_part = std::max<int64_t>(1, documents_per_part / width);
        for (int64_t first = 0; first < group.num_bins; first += bins_per_part) {
            const int64_t count = std::min(bins_per_part, group.num_bins - first);
            parts.push_back({&paths.back(), first, count, width, at, num_bins});
            at += count * width;
            num_bins += count;
        }
    }
    const int64_t num_documents = sorted.documents.size();
    Bins result{Array<int64_t>(num_documents), Array<int64_t>(std::max<int64_t>(num_bins, num_empty > 0) + 1)};
    result.bin_offsets[0] = 0;
    // Neighboring parts go to one thread together, until they hold enough documents to be worth it.
    std::vector<size_t> starts{0};
    int64_t documents = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
        documents += parts[i].num_bins * parts[i].documents_per_bin;
        if (documents >= documents_per_part || i + 1 == parts.size()) {
            starts.push_back(i + 1);
            documents = 0;
        }
    }
    parallel_for(static_cast<int64_t>(starts.size()) - 1, num_threads, [&](int64_t run) {
        for (size_t i = starts[static_cast<size_t>(run)]; i < starts[static_cast<size_t>(run) + 1]; ++i)
            write_part(parts[i], sorted.documents.data(), result.order.data(), result.bin_offsets.data());
    });
    if (num_empty > 0) {  // they need no space: the last bin takes them
        std::copy(sorted.documents.data() + at, sorted.documents.data() + num_documents, result.order.data() + at);
        result.bin_offsets[result.bin_offsets.size() - 1] = num_documents;
    }
    return result;
}

template <class Index>
Bins pack(const int64_t* lengths, int64_t num_documents, int64_t capacity, int64_t num_threads) {
    const Sorted<Index> sorted = capacity < max_histogram_size
                                     ? counting_sort<Index>(lengths, num_documents, capacity, num_threads)
                                     : comparison_sort<Index>(lengths, num_documents, capacity);
    Packer packer(capacity);
    int64_t first = 0, num_empty = 0;
    for (const LengthClass& same : sorted.classes) {
        if (same.length > 0)
            packer.add(same.length, same.count, first);
        else
            num_empty = same.count;
        first += same.count;
    }
    return write_bins(packer, sorted, num_empty, num_threads);
}

}  // namespace

Bins pack_best_fit(const int64_t* lengths, int64_t num_documents, int64_t capacity, int64_t num_threads) {
    if (capacity < 1) throw std::invalid_argument("capacity must be at least 1, not " + std::to_string(capacity));
    const int64_t threads = threads_to_use(num_threads);
    if (num_documents <= int64_t{std::numeric_limits<uint32_t>::max()})
        return pack<uint32_t>(lengths, num_documents, capacity, threads);
    return pack<int64_t>(lengths, num_documents, capacity, threads);
}

}  // namespace meditron
