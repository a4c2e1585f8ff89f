// Megatron's indexed dataset in memory: the bytes of an .idx and of its .bin, not owned.
#pragma once

#include <cstdint>
#include <vector>

namespace meditron {

class TokenFile {
public:
    // Tokens of a document: where they begin in the .bin, in bytes, and how many they are.
    struct Place {
        int64_t first_byte, num_tokens;
    };

    // Proves that every pointer of the index lies inside the .bin, or throws std::invalid_argument.
    TokenFile(const uint8_t* idx, int64_t idx_bytes, const uint8_t* bin, int64_t bin_bytes);

    int dtype_code() const { return dtype_code_; }
    int64_t item_size() const { return item_size_; }
    int64_t num_sequences() const { return num_sequences_; }
    int64_t num_documents() const { return num_documents_; }
    int64_t num_tokens() const { return num_tokens_; }
    const uint8_t* bin() const { return bin_; }

    // Throws std::out_of_range.
    Place document(int64_t index) const;
    std::vector<int64_t> document_lengths() const;

    // Two hints, in this order and some time apart, that document(index) will be asked for. Any number may be given.
    void fetch_ahead(int64_t index) const;
    void fetch_further_ahead(int64_t index) const;

private:
    int64_t size(int64_t sequence) const;
    int64_t pointer(int64_t sequence) const;
    int64_t first_sequence(int64_t document) const;
    bool has(int64_t document) const { return document >= 0 && document < num_documents_; }
    void check_sequences();
    void check_documents();

    const uint8_t* sizes_;
    const uint8_t* pointers_;
    const uint8_t* document_indices_;
    const uint8_t* bin_;
    int64_t bin_bytes_;
    int dtype_code_;
    int64_t item_size_, num_sequences_, num_documents_, num_tokens_;
    // As most tools write them: document i is sequence i, and they follow each other from the .bin's first byte to its
    // last. Two neighboring pointers then say all about a document.
    bool lies_in_order_;
};

}  // namespace meditron
