"""The Triton kernels that the ops' `triton` backends map onto. See README.md in this folder."""
