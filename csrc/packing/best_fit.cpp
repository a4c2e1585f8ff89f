// Best-fit decreasing over groups of equal bins.
//
// Documents of one length are interchangeable, and so are bins with the same free space, so whole groups are
// filled at once: a group of B bins with free space r takes B * (r / length) documents in O(1). The work per
// document is then only the counting sort by length and writing the answer.
// Filling one bin to the end before touching the next *is* best fit: once a bin with the least sufficient space
// took a document, its smaller remainder is the new least, as long as it suffices.

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>

#include "packing.h"

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
std::vector<LengthClass> sort_by_length(const int64_t* lengths, int64_t n, int64_t capacity,
                                        std::vector<int64_t>& sorted) {
    std::vector<LengthClass> classes;
    sorted.resize(static_cast<size_t>(n));
    if (capacity < max_histogram_size) {
        std::vector<int64_t> next(static_cast<size_t>(capacity) + 1, 0);
        for (int64_t i = 0; i < n; ++i) {
            check_length(lengths[i], i, capacity);
            ++next[static_cast<size_t>(lengths[i])];
        }
        int64_t position = 0;
        for (int64_t length = capacity; length >= 0; --length) {
            const int64_t count = next[static_cast<size_t>(length)];
            if (count > 0) classes.push_back({length, count});
            next[static_cast<size_t>(length)] = position;
            position += count;
        }
        for (int64_t i = 0; i < n; ++i) sorted[static_cast<size_t>(next[static_cast<size_t>(lengths[i])]++)] = i;
        return classes;
    }
    for (int64_t i = 0; i < n; ++i) check_length(lengths[i], i, capacity);
    std::iota(sorted.begin(), sorted.end(), int64_t{0});
    std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    for (int64_t document : sorted) {
        if (classes.empty() || classes.back().length != lengths[document]) classes.push_back({lengths[document], 0});
        ++classes.back().count;
    }
    return classes;
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
            if (used < group.num_bins)
                open_[space].push_back({group.node, group.shift + used, group.num_bins - used});
        }
    }

    Bins bins(const std::vector<int64_t>& sorted, int64_t num_empty_documents) const {
        Bins result;
        result.order.reserve(sorted.size());
        result.bin_offsets.push_back(0);
        std::vector<Node> path;  // from the longest documents of the bin to the shortest; parent_shift: to the group's bin 0
        for (const auto& [space, groups] : open_) {
            for (const Group& group : groups) {
                path.clear();
                int64_t shift = group.shift;
                for (int64_t node = group.node; node >= 0; node = nodes_[static_cast<size_t>(node)].parent) {
                    Node step = nodes_[static_cast<size_t>(node)];
                    std::swap(step.parent_shift, shift);
                    shift += step.parent_shift;
                    path.push_back(step);
                }
                std::reverse(path.begin(), path.end());
                for (int64_t bin = 0; bin < group.num_bins; ++bin) {
                    for (const Node& step : path) {
                        const auto from = sorted.begin() + step.first_item + (bin + step.parent_shift) * step.items_per_bin;
                        result.order.insert(result.order.end(), from, from + step.items_per_bin);
                    }
                    result.bin_offsets.push_back(static_cast<int64_t>(result.order.size()));
                }
            }
        }
        if (num_empty_documents > 0) {  // they need no space: the last bin takes them
            result.order.insert(result.order.end(), sorted.end() - num_empty_documents, sorted.end());
            if (result.bin_offsets.size() == 1) result.bin_offsets.push_back(0);
            result.bin_offsets.back() = static_cast<int64_t>(result.order.size());
        }
        return result;
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

}  // namespace

Bins pack_best_fit(const int64_t* lengths, int64_t num_documents, int64_t capacity) {
    if (capacity < 1) throw std::invalid_argument("capacity must be at least 1, not " + std::to_string(capacity));
    std::vector<int64_t> sorted;
    const std::vector<LengthClass> classes = sort_by_length(lengths, num_documents, capacity, sorted);
    Packer packer(capacity);
    int64_t first = 0, num_empty = 0;
    for (const LengthClass& same : classes) {
        if (same.length > 0)
            packer.add(same.length, same.count, first);
        else
            num_empty = same.count;
        first += same.count;
    }
    return packer.bins(sorted, num_empty);
}

}  // namespace meditron
