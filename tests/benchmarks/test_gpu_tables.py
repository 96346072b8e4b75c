"""The GPU sections of the ops' READMEs are what the results say."""

import gpu_tables

RECORD = {
    "setting": {"GPU": "NVIDIA H200", "torch": "2", "triton": "3", "natten": "not installed", "copy": "4.20 TB/s"},
    "results": [
        {"case": "window_56", "mode": "forward", "provider": "visattn triton", "median_ms": 0.0614, "gb_per_s": 3347},
        {"case": "window_56", "mode": "forward", "provider": "other", "note": "not installed | here"},
        {"case": "halo_32", "mode": "forward", "provider": "visattn triton", "median_ms": 1.0},
    ],
}


def test_readmes_are_the_committed_results():
    assert gpu_tables.main(["--check"]) == 0


def test_section_of_an_op():
    text = gpu_tables.section("window", {"nvidia_h200": RECORD})
    assert "| window_56 | forward | visattn triton | 61.4 | 3347 |" in text
    assert "| window_56 | forward | other | not measured: not installed / here |" in text
    assert "halo_32" not in text
    assert "benchmarks/results/nvidia_h200/bench_ops.md" in text
    assert "Not measured" not in text
    assert "Not measured" in gpu_tables.section("agent", {"nvidia_h200": RECORD})


def test_section_takes_the_place_of_the_old_one():
    text = "# Op\n\ntext\n\n## Tracing\n\nmore\n"
    once = gpu_tables.with_section(text, gpu_tables.section("window", {}))
    assert once.index("text") < once.index("## On a GPU") < once.index("Not measured") < once.index("## Tracing")
    twice = gpu_tables.with_section(once, gpu_tables.section("window", {"nvidia_h200": RECORD}))
    assert "Not measured." not in twice
    assert twice.endswith("\n\n## Tracing\n\nmore\n")
    assert gpu_tables.with_section(twice, gpu_tables.section("window", {})) == once
