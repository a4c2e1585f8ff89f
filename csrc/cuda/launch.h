// The door to the CUDA kernels of packed attention, without CUDA headers.

#pragma once

#include "../attention/attention.h"

extern "C" {

// Why the kernels do not take this problem (valid forever); null if they do. Also looks at the current device.
const char* meditron_cuda_attention_unsupported(const meditron::AttentionProblem* problem);

// Bytes of device memory, 16-byte aligned, that the pass needs until it has ended.
int64_t meditron_cuda_attention_forward_workspace(const meditron::AttentionForward* given);
int64_t meditron_cuda_attention_backward_workspace(const meditron::AttentionBackward* given);

// Start the pass on the stream (a cudaStream_t) of the current device. Null, or what went wrong (valid until the
// calling thread's next call). Data and strides of all tensors must be multiples of 16 bytes.
const char* meditron_cuda_attention_forward(const meditron::AttentionForward* given, void* workspace, void* stream);
const char* meditron_cuda_attention_backward(const meditron::AttentionBackward* given, void* workspace, void* stream);

}  // extern "C"
