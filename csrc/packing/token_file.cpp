// Megatron's .idx/.bin, read from memory that may hold anything.
//
// .idx: "MMIDIDX\0\0", uint64 version 1, uint8 dtype code, uint64 number of sequences, uint64 number of document
// indices, int32 sizes, int64 byte pointers, int64 document indices (0, ..., number of sequences), and in
// multimodal files one int8 per sequence. Nothing is aligned (the header has 34 bytes): all loads go by memcpy.

#include "token_file.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace meditron {
namespace {

__extension__ typedef __int128 int128;

constexpr char magic[] = "MMIDIDX\0";  // 9 bytes with the terminator
constexpr int64_t header_bytes = 34;

template <class T>
T load(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

int64_t item_size_of(int dtype_code) {
    switch (dtype_code) {
        case 1:
        case 2: return 1;  // uint8, int8
        case 3:
        case 8: return 2;  // int16, uint16
        case 4: return 4;  // int32
        case 5: return 8;  // int64
        case 6:
        case 7: refuse("the .idx says floating-point data: these are not token ids");
        default: refuse("the .idx has the unknown dtype code " + std::to_string(dtype_code));
    }
}

}  // namespace

TokenFile::TokenFile(const uint8_t* idx, int64_t idx_bytes, const uint8_t* bin, int64_t bin_bytes)
    : bin_(bin), bin_bytes_(bin_bytes) {
    if (idx_bytes < header_bytes)
        refuse("the .idx has only " + std::to_string(idx_bytes) + " bytes; its header alone needs 34");
    if (std::memcmp(idx, magic, 9) != 0) refuse("the .idx does not begin with MMIDIDX: it is not a Megatron index");
    const uint64_t version = load<uint64_t>(idx + 9);
    if (version != 1) refuse("the .idx has version " + std::to_string(version) + "; only version 1 is known");
    dtype_code_ = idx[17];
    item_size_ = item_size_of(dtype_code_);
    const uint64_t sequences = load<uint64_t>(idx + 18), document_indices = load<uint64_t>(idx + 26);
    const uint64_t room = static_cast<uint64_t>(idx_bytes);
    if (sequences > room || document_indices > room)
        refuse("the .idx announces " + std::to_string(sequences) + " sequences and " +
               std::to_string(document_indices) + " document indices but has only " + std::to_string(idx_bytes) +
               " bytes");
    num_sequences_ = static_cast<int64_t>(sequences);
    const int128 expected =
        int128{header_bytes} + int128{12} * num_sequences_ + int128{8} * static_cast<int64_t>(document_indices);
    if (expected != idx_bytes && expected + num_sequences_ != idx_bytes)  // the latter: with multimodal modes
        refuse("the .idx announces " + std::to_string(sequences) + " sequences and " +
               std::to_string(document_indices) + " document indices, which take " +
               std::to_string(static_cast<int64_t>(expected)) + " bytes, but has " + std::to_string(idx_bytes));
    if (document_indices < 1) refuse("the .idx has no document indices; even without documents there is one (0)");
    num_documents_ = static_cast<int64_t>(document_indices) - 1;
    sizes_ = idx + header_bytes;
    pointers_ = sizes_ + 4 * num_sequences_;
    document_indices_ = pointers_ + 8 * num_sequences_;
    check_sequences();
    check_documents();
}

int64_t TokenFile::size(int64_t sequence) const { return load<int32_t>(sizes_ + 4 * sequence); }
int64_t TokenFile::pointer(int64_t sequence) const { return load<int64_t>(pointers_ + 8 * sequence); }
int64_t TokenFile::first_sequence(int64_t document) const { return load<int64_t>(document_indices_ + 8 * document); }

void TokenFile::check_sequences() {
    int128 end = 0;
    for (int64_t i = 0; i < num_sequences_; ++i) {
        const int64_t at = pointer(i), tokens = size(i);
        if (tokens < 0 || at < 0)
            refuse("sequence " + std::to_string(i) + " of the .idx has size " + std::to_string(tokens) + " at byte " +
                   std::to_string(at));
        const int128 sequence_end = int128{at} + int128{tokens} * item_size_;
        if (sequence_end > end) end = sequence_end;
    }
    if (end != bin_bytes_) {
        const std::string wanted =
            end > (int128{1} << 62) ? "more than 2^62" : std::to_string(static_cast<int64_t>(end));
        refuse("the .idx describes " + wanted + " bytes of tokens but the .bin has " + std::to_string(bin_bytes_));
    }
}

void TokenFile::check_documents() {
    if (first_sequence(0) != 0 || first_sequence(num_documents_) != num_sequences_)
        refuse("the document indices of the .idx run from " + std::to_string(first_sequence(0)) + " to " +
               std::to_string(first_sequence(num_documents_)) + " instead of from 0 to " +
               std::to_string(num_sequences_) + ", the number of sequences");
    num_tokens_ = 0;
    lies_in_order_ = num_documents_ == num_sequences_;
    int64_t end = 0;  // of the documents so far, in the .bin
    for (int64_t d = 0; d < num_documents_; ++d) {
        const int64_t first = first_sequence(d), last = first_sequence(d + 1);
        lies_in_order_ = lies_in_order_ && first == d && last == d + 1 && pointer(d) == end;
        if (lies_in_order_) end += size(d) * item_size_;
        if (last < first || last > num_sequences_ || first < 0)
            refuse("document " + std::to_string(d) + " of the .idx has sequences " + std::to_string(first) + " to " +
                   std::to_string(last));
        for (int64_t s = first; s < last; ++s) {
            if (s > first && pointer(s) != pointer(s - 1) + size(s - 1) * item_size_)
                refuse("the sequences of document " + std::to_string(d) +
                       " do not lie one after the other in the .bin");
            if (__builtin_add_overflow(num_tokens_, size(s), &num_tokens_))
                refuse("the .idx describes more than 2^63 tokens");
        }
    }
}

TokenFile::Place TokenFile::document(int64_t index) const {
    if (!has(index))
        throw std::out_of_range("document " + std::to_string(index) + " does not exist: there are " +
                                std::to_string(num_documents_));
    if (lies_in_order_) {
        const int64_t begin = pointer(index), end = index + 1 < num_documents_ ? pointer(index + 1) : bin_bytes_;
        return {begin, (end - begin) / item_size_};
    }
    const int64_t first = first_sequence(index), last = first_sequence(index + 1);
    if (first == last) return {0, 0};
    const int64_t begin = pointer(first);
    return {begin, (pointer(last - 1) - begin) / item_size_ + size(last - 1)};
}

std::vector<int64_t> TokenFile::document_lengths() const {
    std::vector<int64_t> lengths(static_cast<size_t>(num_documents_));
    for (int64_t d = 0; d < num_documents_; ++d) lengths[static_cast<size_t>(d)] = document(d).num_tokens;
    return lengths;
}

void TokenFile::fetch_ahead(int64_t index) const {
    if (has(index)) __builtin_prefetch((lies_in_order_ ? pointers_ : document_indices_) + 8 * index);
}

void TokenFile::fetch_further_ahead(int64_t index) const {
    if (lies_in_order_ || !has(index)) return;
    const int64_t sequence = first_sequence(index);
    __builtin_prefetch(sizes_ + 4 * sequence);
    __builtin_prefetch(pointers_ + 8 * sequence);
}

}  // namespace meditron
