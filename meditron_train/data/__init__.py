"""From text to packed micro-batches: tokenization, Megatron's indexed files, packing, sample order,
loading."""
