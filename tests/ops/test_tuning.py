"""Searching launch configs, on functions that say how long they take."""

import threading
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import visattn
from tests.ops.launches import CONFIGS, CPU, DEFAULT, FAST, FASTEST, SHAPE, Kernel, chosen, entries, write
from visattn.ops.fused import tuning_search
from visattn.ops.fused.tuning import run_tuned

pytestmark = pytest.mark.usefixtures("tuning_file")


def test_search_takes_the_fastest_and_does_not_search_again(tuning_file, monkeypatch):
    kernel = Kernel()
    assert chosen(kernel) == FASTEST
    searched = len(kernel.launched)
    assert {kernel.launched.count(c) for c in CONFIGS[:2]} == {1 + tuning_search.WARM_UP + tuning_search.ROUNDS}
    for mode in ("search", "cached", ""):
        monkeypatch.setenv("VISATTN_TUNE", mode)
        assert chosen(kernel) == FASTEST
    assert len(kernel.launched) == searched + 3
    monkeypatch.setenv("VISATTN_TUNE", "off")
    assert chosen(kernel) == DEFAULT


def test_other_shape_classes_and_kernels_are_searched_for_themselves():
    assert chosen(Kernel()) == FASTEST
    assert chosen(Kernel((3, 1, 2)), "other") == FAST
    kernel = Kernel((1, 2, 3))
    run_tuned("kernel", (28, 7, "float32"), CPU, CONFIGS, kernel)
    assert kernel.launched[-1] == DEFAULT
    assert chosen(Kernel()) == FASTEST


def test_cached_never_searches(tuning_file, monkeypatch):
    monkeypatch.delenv("VISATTN_TUNE")
    kernel = Kernel()
    assert chosen(kernel) == chosen(kernel) == DEFAULT
    assert len(kernel.launched) == 2
    assert not tuning_file.exists()
    monkeypatch.setenv("VISATTN_TUNE", "search")
    assert chosen(kernel) == FASTEST, "a search later in the same process"


def test_an_unknown_mode_names_the_choices(monkeypatch):
    monkeypatch.setenv("VISATTN_TUNE", "always")
    with pytest.raises(ValueError, match="'off', 'cached', 'search', got 'always'"):
        chosen(Kernel())


def spoil(index, value):
    def change(out):
        out[index] = value
        return out

    return change


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: out * 1.001,
        spoil(17, float("nan")),
        spoil(17, float("inf")),
        spoil(500, 0.002),
        lambda out: out[:-1],
        lambda out: out.double(),
    ],
    ids=["scaled", "NaN", "inf", "one value", "shape", "dtype"],
)
def test_a_wrong_result_is_never_taken(wrong):
    kernel = Kernel(results={FASTEST: wrong})
    with visattn.ops.tune() as report:
        assert chosen(kernel) == FAST
    assert kernel.launched.count(FASTEST) == 1
    assert list(report[0].dropped) == [FASTEST]
    assert "default's" in report[0].dropped[FASTEST]


def test_a_single_value_shows_where_the_norm_does_not():
    expected = torch.ones(10**6)
    got = expected.clone()
    got[7] = 1.001
    assert (got - expected).norm() / expected.norm() < tuning_search.TOLERANCE["float32"]
    assert tuning_search._difference([got], [expected], tuning_search.TOLERANCE["float32"])


def test_integers_must_be_equal():
    assert tuning_search._difference([torch.tensor([1, 2])], [torch.tensor([1, 3])], 1.0)
    assert tuning_search._difference([torch.tensor([1, 2])], [torch.tensor([1, 2])], 0.0) is None


def test_infinities_must_be_the_same():
    expected = torch.tensor([1.0, float("-inf")])
    assert tuning_search._difference([expected.clone()], [expected], 0.0) is None
    for value in (float("inf"), float("nan"), 0.0):
        assert tuning_search._difference([torch.tensor([1.0, value])], [expected], 1.0)


def test_rounding_equal_infinities_and_empty_outputs_pass():
    def rounded(out):
        return spoil(3, float("-inf"))(out * (1 + 1e-6))

    kernel = Kernel(results={DEFAULT: spoil(3, float("-inf")), FASTEST: rounded})
    assert chosen(kernel) == FASTEST
    assert tuning_search._difference([torch.empty(0)], [torch.empty(0)], 0.0) is None


def test_the_tolerance_is_that_of_the_coarsest_dtype(monkeypatch):
    results = {FASTEST: lambda out: out * 1.001}
    run_tuned("half", (56, "bfloat16"), CPU, CONFIGS, kernel := Kernel(results=results))
    assert kernel.launched[-1] == FASTEST
    run_tuned("full", (56, "float32"), CPU, CONFIGS, kernel := Kernel(results=results))
    assert kernel.launched[-1] == FAST
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    run_tuned("tf32", (56, "float32"), CPU, CONFIGS, kernel := Kernel(results=results))
    assert kernel.launched[-1] == FASTEST


def test_a_default_with_nan_tells_nothing(tuning_file):
    assert chosen(Kernel(results={DEFAULT: spoil(0, float("nan"))})) == DEFAULT
    assert not tuning_file.exists()
    assert chosen(Kernel()) == FASTEST, "searched when there is something to compare"


def fail(error):
    def raise_it(out):
        raise error

    return raise_it


def test_candidates_that_fail_are_dropped(monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors")
    with visattn.ops.tune() as report:
        for i, error in enumerate((errors.OutOfResources(300, 200, "shared memory"), RuntimeError("PassManager"))):
            assert chosen(Kernel(results={FASTEST: fail(error)}), str(i)) == FAST
    assert ["shared memory" in report[0].dropped[FASTEST], "PassManager" in report[1].dropped[FASTEST]] == [True, True]
    with pytest.raises(TypeError, match="a mistake in the launcher"):
        chosen(Kernel(results={FASTEST: fail(TypeError("a mistake in the launcher"))}), "mistake")
    assert chosen(Kernel()) == FASTEST, "an error does not block later searches"


def test_lack_of_memory_puts_the_search_off(tuning_file):
    assert chosen(Kernel(results={FAST: fail(torch.OutOfMemoryError("no room"))})) == DEFAULT
    assert not tuning_file.exists()
    assert chosen(Kernel()) == FASTEST


def test_tune_searches_in_its_body_and_reports(tuning_file, monkeypatch):
    monkeypatch.setenv("VISATTN_TUNE", "off")
    write(tuning_file, FAST, kernel="known")
    with visattn.ops.tune() as report:
        assert chosen(Kernel()) == FASTEST
        assert chosen(Kernel(), "known") == chosen(Kernel(), "known") == FAST
    assert [(c.kernel, c.config, c.source, c.median_ms, c.default_ms, c.times_faster) for c in report] == [
        ("kernel", FASTEST, "search", 1.0, 3.0, 3.0),
        ("known", FAST, "cache", 1.0, 4.0, 4.0),
    ]
    assert (report[0].shape_class, report[0].device, report[0].default) == (SHAPE, "cpu", DEFAULT)
    assert set(entries(tuning_file)) == {"kernel", "known"}
    assert chosen(kernel := Kernel(), "new") == DEFAULT
    assert len(kernel.launched) == 1


def test_tune_again_measures_what_is_known_once(tuning_file):
    write(tuning_file, FAST)
    kernel = Kernel()
    with visattn.ops.tune(again=True) as report:
        assert chosen(kernel) == FASTEST
        searched = len(kernel.launched)
        assert chosen(kernel) == FASTEST
        assert len(kernel.launched) == searched + 1
    assert [c.source for c in report] == ["search"]


def test_tune_closes_after_an_error(monkeypatch):
    monkeypatch.delenv("VISATTN_TUNE")
    with pytest.raises(KeyError), visattn.ops.tune():
        raise KeyError
    assert chosen(Kernel()) == DEFAULT


def test_tune_holds_for_the_threads_of_the_backward_pass(monkeypatch):
    monkeypatch.delenv("VISATTN_TUNE")
    with visattn.ops.tune() as report:
        thread = threading.Thread(target=chosen, args=(kernel := Kernel(),))
        thread.start()
        thread.join()
    assert kernel.launched[-1] == FASTEST
    assert len(report) == 1


def test_a_second_thread_does_not_wait_for_a_search():
    other, alive = Kernel(), []

    def run(config):
        if not other.launched:
            thread = threading.Thread(target=chosen, args=(other, "other"), daemon=True)
            thread.start()
            thread.join(timeout=60)
            alive.append(thread.is_alive())
        return kernel(config)

    kernel = Kernel()
    run_tuned("kernel", SHAPE, CPU, CONFIGS, run)
    assert (alive, other.launched, kernel.launched[-1]) == ([False], [DEFAULT], FASTEST)
    assert chosen(other, "other") == FASTEST


@pytest.mark.parametrize(
    "where", ["torch.cuda.is_current_stream_capturing", "torch.compiler.is_compiling", "torch.jit.is_tracing"]
)
def test_no_search_while_a_graph_is_made(tuning_file, monkeypatch, where):
    kernel = Kernel()
    with monkeypatch.context() as patch, visattn.ops.tune() as report:
        patch.setattr("torch.cuda.is_initialized", lambda: True)
        patch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
        patch.setattr(where, lambda: True)
        assert chosen(kernel) == DEFAULT
    assert (len(kernel.launched), report, tuning_file.exists()) == (1, [], False)
    assert chosen(kernel) == FASTEST, "searched afterwards"


def test_no_search_in_vain(tuning_file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(kernel := Kernel(), candidates=[FAST]) == FAST
    assert len(kernel.launched) == 1
    assert not tuning_file.exists()


class Device:
    """A GPU's queue: what is enqueued starts when the host has done so and what was enqueued before has ended."""

    def __init__(self):
        self.host = self.free = 0.0
        self.costs = {"slow": 4e-3, "fast": 1e-3}

    def enqueue(self, seconds):
        self.free = max(self.free, self.host) + seconds

    def run(self, name):
        self.host += 7e-3  # far more than the kernel takes
        self.enqueue(self.costs[name])

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.device.enqueue(0)
        self.at = self.device.free

    def synchronize(self):
        self.device.host = max(self.device.host, self.device.free)

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def test_times_are_those_of_the_device_however_long_the_host_takes(monkeypatch):
    device = Device()
    monkeypatch.setattr(tuning_search, "_clock", lambda: device.host)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.enqueue(cycles / 2e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=64))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    runs = [partial(device.run, name) for name in ("slow", "fast")]
    assert tuning_search._medians(runs, torch.device("cuda")) == pytest.approx([4.0, 1.0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times of a CUDA device")
def test_times_and_capture_on_a_cuda_device():
    x = torch.eye(512, device="cuda")

    def run(config):
        launched.append(config)
        out = x
        for _ in range({DEFAULT: 200, FAST: 1, FASTEST: 200}[config]):
            out = out @ x
        return (out,)

    launched = []
    with visattn.ops.tune() as report:
        run(DEFAULT)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            run_tuned("products", SHAPE, x.device, CONFIGS, run)
        assert launched == [DEFAULT] * 2
        run_tuned("products", SHAPE, x.device, CONFIGS, run)
    assert launched[-1] == FAST
    assert 0 < report[0].median_ms < report[0].default_ms
    assert report[0].device == torch.cuda.get_device_name()
