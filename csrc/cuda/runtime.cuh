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

// The current device: the first number of its compute capability, and its multiprocessors. 0 where there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}
// The most shared memory that a block can have.
inline int64_t max_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline int compute_capability() { return device_attribute(cudaDevAttrComputeCapabilityMajor); }
inline int num_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Host memory may be reused as soon as this returns. The runtime takes up to 64 KiB of pageable memory without waiting
// for the stream, so more goes in pieces.
inline const char* copy_to_device(void* device, const void* host, size_t num_bytes, void* stream) {
    constexpr size_t piece = 64 << 10;
    for (size_t done = 0; done < num_bytes; done += piece) {
        const cudaError_t error = cudaMemcpyAsync(
            static_cast<char*>(device) + done, static_cast<const char*>(host) + done, std::min(piece, num_bytes - done),
            cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream));
        if (error != cudaSuccess) return message_of(error);
    }
    return nullptr;
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), unsigned num_blocks, unsigned num_threads, size_t shared_bytes,
                   void* stream, const Arguments& arguments) {
    if (num_blocks == 0) return nullptr;
    cudaGetLastError();  // what failed before is not ours to report
    cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return message_of(error);
    kernel<<<num_blocks, num_threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
    return message_of(cudaGetLastError());
}

#else

inline int compute_capability() { return emu::machine.settings.capability; }
inline int64_t max_shared_bytes() { return (compute_capability() == 9 ? 227 : 163) << 10; }  // of H100 and A100
inline int num_multiprocessors() { return 3; }

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
