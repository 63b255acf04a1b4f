"""Hand-written kernels: C for CPUs, built by the machine's own compiler on first use; Triton for CUDA."""
