"""Hand-written kernels: C for CPUs, Triton for CUDA."""
