// The CUDA library. It names the version of the CUDA runtime it was compiled with; kernels register beside it.
#include <cuda_runtime_api.h>

extern "C" __attribute__((visibility("default"))) int cmlm_fast_cuda_version() {
  return CUDART_VERSION;
}
