// A plain array of numbers without initial values, for results of gigabytes: nothing is written twice, and large ones
// ask for huge pages, as first touching memory in pages of 4 KiB costs more than all the work on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace meditron {

template <class T>
class Array {
    static_assert(std::is_trivially_copyable<T>::value, "elements are never constructed");

public:
    Array() = default;
    explicit Array(int64_t size) : size_(size) {
        constexpr size_t huge_page = size_t{2} << 20, line = 64;
        if (size < 0 || static_cast<uint64_t>(size) > (uint64_t{1} << 62) / sizeof(T)) throw std::bad_alloc();
        const size_t bytes = static_cast<size_t>(size) * sizeof(T);
        const size_t alignment = bytes >= 2 * huge_page ? huge_page : line;
        const size_t rounded = (bytes / alignment + 1) * alignment;
        data_.reset(static_cast<T*>(std::aligned_alloc(alignment, rounded)));
        if (!data_) throw std::bad_alloc();
#if defined(__linux__)
        if (alignment == huge_page) madvise(data_.get(), rounded, MADV_HUGEPAGE);  // a hint; the kernel may refuse it
#endif
    }

    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    int64_t size() const { return size_; }
    T& operator[](int64_t i) { return data_.get()[i]; }
    const T& operator[](int64_t i) const { return data_.get()[i]; }

private:
    struct Free {
        void operator()(T* pointer) const { std::free(pointer); }
    };
    std::unique_ptr<T, Free> data_;
    int64_t size_ = 0;
};

}  // namespace meditron
