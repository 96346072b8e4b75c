"""Launches under a stub driver take Triton's whole host path, with or without a kernel in the cache."""

from tests import stub_gpu

CODE = """
q = k = v = torch.zeros(2, 14, 14, 2, 16, dtype=torch.bfloat16)
for _ in range(2):
    ops.window_attention(q, k, v, 7, backend="triton")
for x in gpu.launched:
    print(x.kernel, *x.programs, x.num_warps, len(x.arguments))
"""


def test_launches_are_recorded_and_compiled_once(tmp_path):
    lines = stub_gpu.run(CODE, tmp_path).splitlines()
    kernels = stub_gpu.compiled(tmp_path)
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith("forward_kernel 4 2 2 ")
    assert len(kernels) == 1
    assert stub_gpu.run(CODE, tmp_path).splitlines() == lines
    assert stub_gpu.compiled(tmp_path) == kernels
