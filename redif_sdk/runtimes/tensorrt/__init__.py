"""TensorRT and TensorRT-RTX: the runtime, CUDA memory, and the cache of engines."""
