// Stands in for libtorch_cuda.so at link time, so that _C_cuda depends on that name: it can be built against a PyTorch without
// CUDA, and finds these functions in the library that a PyTorch with CUDA has loaded. Never installed.
extern "C" {
__attribute__((visibility("default"))) void aoti_torch_get_current_cuda_stream() {}
__attribute__((visibility("default"))) void torch_get_current_cuda_blas_handle() {}
}
