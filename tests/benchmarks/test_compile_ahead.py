"""Kernels that are compiled ahead are those that launches look for."""

from tests import stub_gpu

CALL = """
from compile_ahead import Compilers
from visattn.ops.fused import linear
from visattn.ops.fused.launch import record
from visattn.ops.fused.tuning import all_candidates

def call():
    q, k, v = torch.zeros(2, 14, 14, 3, 2, 16, dtype=torch.bfloat16).unbind(3)
    ops.window_attention(q, k, v, 7, backend="triton")
    with all_candidates():
        linear.outer(k.flatten(1, 2), v.flatten(1, 2))
"""
AHEAD = """
with record() as launches:
    call()
compilers = Compilers(90, 2)
compilers.add(launches[:1])
print(1 + compilers.add(launches), len(launches), *compilers.finish())
"""


def test_launches_compile_nothing_that_was_compiled_ahead(tmp_path):
    number, launches = map(int, stub_gpu.run(CALL + AHEAD, tmp_path).split())
    ahead = stub_gpu.compiled(tmp_path)
    assert len(ahead) == number > 4
    assert int(stub_gpu.run(CALL + "call(); print(len(gpu.launched))", tmp_path)) == launches
    assert stub_gpu.compiled(tmp_path) == ahead
