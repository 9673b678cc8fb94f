"""Tests of batches on a device: order, overlap, lack of memory, precision."""

import copy
import itertools
import threading
import weakref
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from deepfeat._backbones.preprocessing import Preprocessing
from deepfeat._engine.batches import run_in_batches
from deepfeat._extraction.readers import TorchReader
from deepfeat._layers.index import ResolvedLayer
from deepfeat._layers.pooling import pool

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
PATIENCE = 20  # seconds that one thread waits for another before the test has failed
OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9 GB)"),
    "cpu": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    "linux": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9."),
    "python": MemoryError(),
}


def as_row(number):
    return torch.tensor([float(number), -float(number)])


def double(batch):
    return {"twice": 2 * batch}


def twice(numbers):
    """Say what `as_row` and `double` make of numbers."""
    return np.array([[2.0 * number, -2.0 * number] for number in numbers])


def run(
    samples,
    function=double,
    prepare=as_row,
    module=None,
    device=CPU,
    precision="float32",
    **options,
):
    """Run a function of a network over samples, which `prepare` turns into what it takes."""
    preprocessing = Preprocessing(prepare, prepare, lambda batch: batch, (2,), None)
    reader = TorchReader(module or nn.Identity(), function, preprocessing, device, precision)
    return run_in_batches(reader, samples, lambda sample: sample, **{"num_workers": 2} | options)


def rows_of(batches):
    return np.concatenate([rows for batch in batches for rows in batch.rows.values()])


def threads_of_ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("deepfeat")]


# Order and batches ------------------------------------------------------------------------------


def test_rows_keep_the_order_of_slow_and_fast_samples():
    """A sample that is ready before its forerunner still comes after it."""
    third_is_ready = threading.Event()

    def prepare(number):
        if number == 0:
            assert third_is_ready.wait(PATIENCE)
        if number == 3:
            third_is_ready.set()
        return as_row(number)

    batches = list(run(range(10), prepare=prepare, batch_size=4, num_workers=4))
    assert [batch.samples for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert_array_equal(rows_of(batches), twice(range(10)))
    assert not any(batch.failures for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 1, 4, "auto"])
@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(1, [1] * 10), (3, [3, 3, 3, 1]), (5, [5, 5]), (10, [10]), (32, [10])],
)
def test_batches_are_full_but_for_the_last(num_workers, batch_size, sizes):
    """Whatever their size and the number of threads, the rows are the same."""
    batches = list(run(range(10), batch_size=batch_size, num_workers=num_workers))
    assert [len(batch.samples) for batch in batches] == sizes
    assert_array_equal(rows_of(batches), twice(range(10)))
    assert rows_of(batches).dtype == np.float32


def test_no_sample_gives_no_batch():
    """Where there is nothing to run, nothing is run."""
    assert list(run([], function=pytest.fail)) == []


def test_several_outputs_keep_their_keys():
    """Each key has rows of its own, cut from the same batches."""
    batches = list(run(range(5), lambda batch: {"a": batch, "b": batch.repeat(1, 2)}, batch_size=2))
    assert_array_equal(np.concatenate([batch.rows["a"] for batch in batches])[:, 0], range(5))
    assert [batch.rows["b"].shape for batch in batches] == [(2, 4), (2, 4), (1, 4)]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 20, 64])
def test_the_batch_size_never_changes_rows(small_net, pictures, batch_size):
    """An image gives the same row alone, in a small batch and in a large one."""
    alone = np.concatenate([read(small_net)(picture[None])["row"] for picture in pictures])
    batches = run(pictures, read(small_net), torch.clone, batch_size=batch_size)
    assert_allclose(rows_of(batches), alone, rtol=1e-5, atol=1e-6)


def test_the_function_runs_in_inference_mode_and_nobody_else():
    """No graph is kept; and while the caller has the turn, its own modes hold."""
    modes = []

    def function(batch):
        modes.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return double(batch)

    for _ in run(range(4), function, batch_size=2, precision="bfloat16"):
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
    assert modes == [(True, True)] * 2


# Threads ----------------------------------------------------------------------------------------


def test_decoding_overlaps_computing():
    """While a batch runs, samples of the next one are prepared."""
    first_batch_runs, later_sample_is_ready = threading.Event(), threading.Event()

    def prepare(number):
        if number == 5:  # of the second batch
            assert first_batch_runs.wait(PATIENCE)
            later_sample_is_ready.set()
        return as_row(number)

    def function(batch):
        first_batch_runs.set()
        assert later_sample_is_ready.wait(PATIENCE)
        return double(batch)

    batches = list(run(range(8), function, prepare, batch_size=4, num_workers=1))
    assert not any(batch.failures for batch in batches)
    assert_array_equal(rows_of(batches), twice(range(8)))


@pytest.mark.parametrize("num_workers", [0, 4])
def test_the_number_of_samples_in_flight_is_bounded(num_workers):
    """Of any number of samples, three batches at most are taken that have not run yet."""
    drawn, computed, in_flight = 0, 0, []

    def draw():
        nonlocal drawn
        for number in range(200):
            drawn += 1
            yield number

    def function(batch):
        nonlocal computed
        in_flight.append(drawn - computed)
        computed += len(batch)
        return double(batch)

    assert_array_equal(
        rows_of(run(draw(), function, batch_size=4, num_workers=num_workers)), twice(range(200))
    )
    assert max(in_flight) <= 3 * 4


def test_an_endless_stream_of_samples_can_be_read():
    """Rows come before the samples end; the rest is left alone when the caller has enough."""
    with closing(run(itertools.count(), batch_size=4)) as batches:
        assert_array_equal(rows_of(itertools.islice(batches, 3)), twice(range(12)))
    assert threads_of_ours() == []


def test_a_batch_is_handed_out_before_the_next_one_runs():
    """On a CPU there is no reason to hold finished rows back."""
    sizes = []
    with closing(run(range(8), lambda b: sizes.append(len(b)) or double(b), batch_size=4)) as rows:
        next(rows)
        assert sizes == [4]


def test_on_a_cpu_large_images_run_in_parts():
    """Maps that stay in its caches are faster; the batch is handed out whole all the same."""
    sizes = {}

    def function(batch):
        sizes.setdefault(batch.shape[-1], []).append(len(batch))
        return {"row": batch[:, :, 0, 0]}

    for side in (32, 224):
        images = torch.arange(20.0).reshape(20, 1, 1, 1).expand(20, 3, side, side)
        batches = run(images, function, torch.clone, batch_size=20)
        assert_array_equal(rows_of(batches)[:, 0], range(20))
    assert sizes == {32: [20], 224: [8, 8, 4]}


def test_without_workers_everything_runs_in_the_thread_of_the_caller():
    """With num_workers=0 what is not safe in threads can be prepared."""
    callers = set()

    def prepare(number):
        callers.add(threading.current_thread())
        return as_row(number)

    assert_array_equal(rows_of(run(range(5), prepare=prepare, num_workers=0)), twice(range(5)))
    assert callers == {threading.current_thread()}


def test_no_thread_is_left_behind():
    """Neither at the end, nor after an error, nor when the caller stops half way."""

    def fail(batch):
        raise ValueError("planted")

    assert len(list(run(range(9), batch_size=4))) == 3
    assert threads_of_ours() == []

    with pytest.raises(ValueError, match="planted"):
        list(run(range(9), fail, batch_size=4))
    assert threads_of_ours() == []

    batches = run(range(100), batch_size=4)
    next(batches)
    assert threads_of_ours() != []
    batches.close()
    assert threads_of_ours() == []

    def break_off():
        yield from range(9)
        raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        list(run(break_off(), batch_size=4))
    assert threads_of_ours() == []


# Samples that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("bad", [{0}, {4}, {9}, {0, 1, 2, 3}, {3, 4, 9}], ids=str)
def test_a_failure_is_paired_with_its_sample(bad, num_workers):
    """The other samples have their own rows, in batches as full as ever."""

    def prepare(number):
        if number in bad:
            raise KeyError(number)
        return as_row(number)

    good = [number for number in range(10) if number not in bad]
    batches = list(run(range(10), prepare=prepare, batch_size=4, num_workers=num_workers))
    assert [number for batch in batches for number in batch.samples] == good
    assert [len(batch.samples) for batch in batches if batch.samples][:-1] == [4] * (len(good) // 4)
    assert_array_equal(rows_of(batches), twice(good))
    failures = [failure for batch in batches for failure in batch.failures]
    assert [(number, error.args) for number, error in failures] == [(n, (n,)) for n in sorted(bad)]


def test_samples_that_all_fail_run_nothing():
    """The failures are handed out, and the network is left alone."""

    def prepare(number):
        raise OSError(number)

    batches = list(run(range(9), pytest.fail, prepare, batch_size=4))
    assert [(batch.samples, batch.rows) for batch in batches] == [([], {})] * 3
    failures = [failure for batch in batches for failure in batch.failures]
    assert [number for number, _ in failures] == list(range(9))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_memory_does_not_suffice_for_fails_alone(num_workers):
    """One that is too large to be prepared does not end the run."""

    def prepare(number):
        if number == 4:
            raise MemoryError
        return as_row(number)

    (batch,) = run(range(9), prepare=prepare, num_workers=num_workers)
    ((number, error),) = batch.failures
    assert (number, type(error)) == (4, MemoryError)
    assert_array_equal(rows_of([batch]), twice([0, 1, 2, 3, 5, 6, 7, 8]))


def test_failures_are_handed_out_before_there_are_many():
    """Of a million samples that fail, no more are held than make a batch."""

    def prepare(number):
        raise OSError(number)

    with closing(run(itertools.count(), pytest.fail, prepare, batch_size=4)) as batches:
        for batch in itertools.islice(batches, 5):
            assert len(batch.failures) == 4


def test_samples_of_two_shapes_make_no_batch():
    """The error names one of each, and says how they came out."""
    expected = r"the same shape; got \(5,\) for 2, and \(2,\) for 0\."
    with pytest.raises(ValueError, match=expected):
        list(run(range(4), prepare=lambda number: torch.zeros(5 if number == 2 else 2)))


# Lack of memory ---------------------------------------------------------------------------------


def make_limited(limit, error=OUT_OF_MEMORY["cuda"]):
    """Make a function that runs out of memory on more than `limit` samples; it notes its sizes."""

    def function(batch):
        function.sizes.append(len(batch))
        if len(batch) > limit:
            raise error
        return double(batch)

    function.sizes = []
    return function


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_where_memory_runs_out_the_batch_is_halved(kind):
    """Every row is there, and warnings tell of the new sizes."""
    limited = make_limited(3, OUT_OF_MEMORY[kind])
    with pytest.warns(RuntimeWarning, match="cpu ran out of memory; continuing with") as caught:
        batches = list(run(range(12), limited, batch_size=8))
    assert [str(warning.message)[-2:] for warning in caught] == ["4.", "2."]
    assert limited.sizes == [8, 4, 2, 2, 2, 2, 2, 2]
    assert [len(batch.samples) for batch in batches] == [8, 4]
    assert_array_equal(rows_of(batches), twice(range(12)))


def test_the_size_that_fitted_is_remembered_for_the_module():
    """The next run starts with it, silently; another module or larger images start afresh."""
    module = nn.Linear(2, 2)
    with pytest.warns(RuntimeWarning):
        list(run(range(8), make_limited(3), module=module, batch_size=8))
    again, other, larger = make_limited(3), make_limited(8), make_limited(8)
    assert_array_equal(rows_of(run(range(8), again, module=module, batch_size=8)), twice(range(8)))
    list(run(range(8), other, module=nn.Linear(2, 2), batch_size=8))
    list(run(range(8), larger, lambda n: torch.zeros(3), module=module, batch_size=8))
    assert again.sizes == [2, 2, 2, 2]
    assert other.sizes == larger.sizes == [8]


def test_a_module_is_not_kept_alive_for_its_size():
    """What is remembered is forgotten with the module."""
    module = nn.Linear(2, 2)
    list(run(range(8), module=module))
    gone = weakref.ref(module)
    del module
    assert gone() is None


def test_only_what_did_not_fit_runs_again():
    """Parts of a batch that were done when memory ran out are kept."""
    runs = []

    def function(batch):
        runs.append(batch[:, 0].tolist())
        if len(runs) in (1, 3):
            raise OUT_OF_MEMORY["cuda"]
        return double(batch)

    with pytest.warns(RuntimeWarning, match="ran out of memory"):
        batches = list(run(range(16), function, batch_size=16))
    assert [len(part) for part in runs] == [16, 8, 8, 4, 4]
    assert runs[1] + runs[2] == runs[0]
    assert runs[3] + runs[4] == runs[2]
    assert_array_equal(rows_of(batches), twice(range(16)))


def test_the_tensors_of_the_failed_forward_are_freed_before_the_next():
    """Otherwise the smaller batch would not fit either."""
    held = []

    def function(batch):
        assert [tensor for reference in held if (tensor := reference()) is not None] == []
        tensor = torch.empty(8)
        held.append(weakref.ref(tensor))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return double(batch)

    with pytest.warns(RuntimeWarning):
        batches = list(run(range(8), function, batch_size=8))
    assert len(held) > 2
    assert_array_equal(rows_of(batches), twice(range(8)))


def test_a_single_image_that_does_not_fit_is_an_error():
    """There is nothing left to halve: the error says so, and what the device said."""
    with (
        pytest.warns(RuntimeWarning, match="ran out of memory"),
        pytest.raises(MemoryError, match=r"cpu has no memory for a single image: CUDA out of mem"),
    ):
        list(run(range(8), make_limited(0), batch_size=8))
    assert threads_of_ours() == []


def test_a_single_image_is_tried_again_once_memory_was_freed():
    """Memory may have been short because blocks of other sizes were kept."""
    sizes = []

    def function(batch):
        sizes.append(len(batch))
        if len(sizes) == 1:
            raise OUT_OF_MEMORY["cuda"]
        return double(batch)

    with pytest.warns(RuntimeWarning, match="continuing with batches of 1"):
        assert_array_equal(rows_of(run(range(1), function)), twice(range(1)))
    assert sizes == [1, 1]


def test_outputs_are_freed_before_the_next_batch_runs():
    """A device has room for the outputs of one batch, and needs none for those before."""
    alive = weakref.WeakSet()

    class Noting:
        device = CPU
        prepare = staticmethod(as_row)

        def read(self, batch):
            assert len(alive) == 0
            outputs = double(batch)
            alive.update(outputs.values())
            return outputs

    batches = run_in_batches(Noting(), range(8), lambda sample: sample, batch_size=2)
    assert_array_equal(rows_of(batches), twice(range(8)))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        NotImplementedError("no kernel"),
        ValueError("out of memory, says one who does not know"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_pass_through_untouched(error):
    """A fault in the network is not hidden behind smaller and smaller batches."""
    limited = make_limited(0, error)
    with pytest.raises(type(error)) as caught:
        list(run(range(8), limited, batch_size=8))
    assert caught.value is error
    assert limited.sizes == [8]


# CUDA, played by a CPU --------------------------------------------------------------------------


@pytest.fixture
def played_cuda(monkeypatch):
    """Let tensors on the CPU stand in for CUDA; return the log of what was asked of it."""
    log = []

    def note(*words):
        log.append(words)

    def pin_memory(tensor):
        note("pin", len(tensor))
        return tensor

    def to(tensor, device, non_blocking=False):
        note(f"copy to {torch.device(device).type}", len(tensor), non_blocking)
        return tensor.clone()

    def record_event():
        number = sum(words[0] == "record" for words in log)
        note("record", number)
        return SimpleNamespace(synchronize=lambda: note("wait", number))

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=record_event)
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: note("empty cache"))
    return log


def test_on_cuda_nothing_is_waited_for_but_the_batch_before_last(played_cuda):
    """Copies from pinned memory and back are queued; rows are taken when the next batch runs."""
    batches = []
    for batch in run(range(10), batch_size=4, device=CUDA):
        played_cuda.append(("yield", len(batches)))
        batches.append(batch)
    assert_array_equal(rows_of(batches), twice(range(10)))
    assert [batch.samples for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert played_cuda == [
        *(("pin", 4), ("copy to cuda", 4, True), ("copy to cpu", 4, True), ("record", 0)),
        *(("pin", 4), ("copy to cuda", 4, True), ("copy to cpu", 4, True), ("record", 1)),
        *(("wait", 0), ("yield", 0)),
        *(("pin", 2), ("copy to cuda", 2, True), ("copy to cpu", 2, True), ("record", 2)),
        *(("wait", 1), ("yield", 1), ("wait", 2), ("yield", 2)),
    ]


def test_on_cuda_a_whole_batch_runs_at_once(played_cuda):
    """Parts are for the caches of a CPU."""
    sizes = []

    def function(batch):
        sizes.append(len(batch))
        return {"row": batch[:, :, 0, 0]}

    image = torch.zeros(3, 224, 224)
    list(run(range(40), function, lambda number: image, device=CUDA, batch_size=32))
    assert sizes == [32, 8]


def test_on_cuda_the_cache_is_emptied_before_a_batch_runs_again(played_cuda):
    """Blocks of the failed size are given back; rows and order are as ever."""
    limited = make_limited(9)
    with pytest.warns(RuntimeWarning, match="cuda:0 ran out of memory"):
        batches = list(run(range(20), limited, device=CUDA, batch_size=16))
    assert limited.sizes == [16, 8, 8, 4]
    assert played_cuda.count(("empty cache",)) == 1
    assert_array_equal(rows_of(batches), twice(range(20)))


def test_on_cuda_samples_that_fail_keep_their_turn(played_cuda):
    """A last batch of nothing but failures is handed out as well."""

    def prepare(number):
        if number > 3:
            raise OSError(number)
        return as_row(number)

    batches = list(run(range(6), prepare=prepare, device=CUDA, batch_size=4))
    assert [batch.samples for batch in batches] == [[0, 1, 2, 3], []]
    assert [number for number, _ in batches[1].failures] == [4, 5]


# Precision --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU())
        )
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def pictures():
    return list(torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def read(net, seen=None):
    """Make a function that pools what a network gives, and notes the type it comes in."""

    def function(batch):
        output = net(batch.to(memory_format=torch.channels_last))
        if seen is not None:
            seen.add(output.dtype)
        return {"row": pool(ResolvedLayer("last", "4", (16, 5, 5)), output, "avg")}

    return function


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_lower_precision_is_near_float32(small_net, pictures, precision):
    """The network computes in the type that was asked for; the rows are float32."""
    seen: set[torch.dtype] = set()
    expected = rows_of(run(pictures, read(small_net), torch.clone))
    rows = rows_of(run(pictures, read(small_net, seen), torch.clone, precision=precision))
    assert seen == {getattr(torch, precision)}
    assert rows.dtype == expected.dtype == np.float32
    assert_allclose(rows, expected, rtol=2e-2, atol=2e-3)


# CUDA itself ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2), ("float16", 5e-3)]
)
def test_cuda_gives_the_rows_of_the_cpu(small_net, pictures, precision, tolerance):
    """In any precision, to within its rounding (TF32 rounds products in float32)."""
    expected = rows_of(run(pictures, read(small_net), torch.clone))
    net = copy.deepcopy(small_net).to(CUDA)
    options = {"module": net, "device": CUDA, "precision": precision, "batch_size": 16}
    batches = run(pictures * 20, read(net), torch.clone, **options)
    assert_allclose(rows_of(batches), np.tile(expected, (20, 1)), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_cuda_runs_a_batch_while_the_caller_has_the_one_before():
    """Rows are handed out without waiting for the batch that was launched after them."""
    cycles = 2_000_000_000  # about a second

    def function(batch):
        if batch[0, 0] == 4:  # the second batch; the comparison waits for the first
            torch.cuda._sleep(cycles)
        return double(batch)

    list(run(range(100, 108), function, device=CUDA, batch_size=4))  # pins memory, which waits
    with closing(run(range(8), function, device=CUDA, batch_size=4)) as batches:
        first = next(batches)
        assert not torch.cuda.current_stream(CUDA).query()  # the second is still at work
        assert_array_equal(first.rows["twice"], twice(range(4)))
        assert_array_equal(next(batches).rows["twice"], twice(range(4, 8)))


@pytest.mark.gpu
def test_cuda_survives_a_batch_that_does_not_fit():
    """The batch is halved until it fits, and rows are right."""
    torch.cuda.empty_cache()
    an_image = torch.cuda.mem_get_info(CUDA)[1] // 5  # bytes: four fit at most

    def function(batch):
        torch.empty(len(batch), an_image, dtype=torch.uint8, device=CUDA)
        return double(batch)

    with pytest.warns(RuntimeWarning, match="cuda:0 ran out of memory"):
        batches = list(run(range(40), function, device=CUDA, batch_size=32))
    assert_array_equal(rows_of(batches), twice(range(40)))
