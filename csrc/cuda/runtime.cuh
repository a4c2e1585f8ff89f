// Copying to the device and starting kernels, for CUDA and for its emulation. Each function returns null, or what went
// wrong.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ptx.cuh"

namespace meditron {

#ifdef __CUDACC__

inline const char* message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// The most shared memory that a block can have on the current device; 0 where there is none.
inline int64_t max_shared_bytes() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
    return bytes;
}

// Host memory may be reused as soon as this returns. The runtime takes up to 64 KiB of pageable memory without waiting
// for the stream, so more goes in pieces.
inline const char* copy_to_device(void* device, const void* host, size_t num_bytes, void* stream) {
    constexpr size_t piece = 64 << 10;
    for (size_t done = 0; done < num_bytes; done += piece) {
        const cudaError_t error =
            cudaMemcpyAsync(static_cast<char*>(device) + done, static_cast<const char*>(host) + done,
                            std::min(piece, num_bytes - done), cudaMemcpyHostToDevice,
                            static_cast<cudaStream_t>(stream));
        if (error != cudaSuccess) return message_of(error);
    }
    return nullptr;
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), unsigned num_blocks, unsigned num_threads, size_t shared_bytes,
                   void* stream, const Arguments& arguments) {
    if (num_blocks == 0) return nullptr;
    cudaGetLastError();  // what failed before is not ours to report
    cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return message_of(error);
    kernel<<<num_blocks, num_threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
    return message_of(cudaGetLastError());
}

#else

inline int64_t max_shared_bytes() { return 163 << 10; }  // of an A100

inline const char* copy_to_device(void* device, const void* host, size_t num_bytes, void*) {
    if (num_bytes > 0) memcpy(device, host, num_bytes);
    return nullptr;
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), unsigned num_blocks, unsigned num_threads, size_t shared_bytes, void*,
                   const Arguments& arguments) {
    return emu::launch([&] { kernel(arguments); }, {num_blocks, 1, 1}, {num_threads, 1, 1}, shared_bytes);
}

#endif

}  // namespace meditron
