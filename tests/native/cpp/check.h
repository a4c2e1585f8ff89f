// What the C++ tests need: checks that end the program, random numbers, and datasets in memory.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (0)

using Random = std::mt19937_64;

inline int64_t uniform(Random& random, int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// Bytes in an allocation of exactly their size: AddressSanitizer sees the first byte read beyond.
struct Bytes {
    explicit Bytes(const std::vector<uint8_t>& bytes) : data(new uint8_t[bytes.size()]), size(bytes.size()) {
        if (!bytes.empty()) std::memcpy(data.get(), bytes.data(), bytes.size());
    }
    std::unique_ptr<uint8_t[]> data;
    size_t size;
};

template <class T>
void put(std::vector<uint8_t>& bytes, T value) {
    const auto* begin = reinterpret_cast<const uint8_t*>(&value);
    bytes.insert(bytes.end(), begin, begin + sizeof(T));
}

// A Megatron .idx of documents of one sequence each, or of all sequences in one document.
inline std::vector<uint8_t> index_bytes(const std::vector<int64_t>& lengths, int dtype_code, int64_t item_size,
                                        bool one_document = false) {
    std::vector<uint8_t> bytes;
    for (const char letter : {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'})
        bytes.push_back(static_cast<uint8_t>(letter));
    const int64_t n = static_cast<int64_t>(lengths.size());
    put<uint64_t>(bytes, 1);
    put<uint8_t>(bytes, static_cast<uint8_t>(dtype_code));
    put<int64_t>(bytes, n);
    put<int64_t>(bytes, one_document ? 2 : n + 1);
    for (const int64_t length : lengths) put<int32_t>(bytes, static_cast<int32_t>(length));
    int64_t at = 0;
    for (const int64_t length : lengths) {
        put<int64_t>(bytes, at);
        at += length * item_size;
    }
    if (one_document) {
        put<int64_t>(bytes, 0);
        put<int64_t>(bytes, n);
    } else {
        for (int64_t i = 0; i <= n; ++i) put<int64_t>(bytes, i);
    }
    return bytes;
}
