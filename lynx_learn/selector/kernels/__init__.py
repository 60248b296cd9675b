"""A decode batch's decision in compiled code: for CUDA devices and for CPUs."""
