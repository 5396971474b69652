"""The engine over a pipeline that only counts: batching, limits, cancelling, draining, failures."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait

import pytest

from tests.serve.fake import FakePipe
from twinflow_rt.errors import CancelledError, ConfigError, DeviceError
from twinflow_rt.sampling.schedule import preset
from twinflow_rt.serve.engine import DrainingError, Engine, QueueFullError
from twinflow_rt.serve.settings import Limits

PATIENCE = 20


@pytest.fixture
def pipe():
    return FakePipe()


@pytest.fixture
def start(pipe):
    """Starts engines with these limits; afterwards all must drain."""
    engines = []

    def make(observe=None, **limits) -> Engine:
        engines.append(Engine(pipe, Limits(**{"max_wait": 0.0, **limits}), observe))
        return engines[-1]

    yield make
    pipe.gate.set()
    assert all(engine.drain(PATIENCE) for engine in engines)


def hold(pipe: FakePipe, engine: Engine):
    """Keeps the worker busy with one image, so that what follows is queued; returns its job."""
    pipe.gate.clear()
    pipe.entered.clear()
    (job,) = engine.submit("first")
    assert pipe.entered.wait(PATIENCE)
    return job


def results(jobs):
    """(prompt, seed) of each job's image."""
    return [job.future.result(PATIENCE).info["made"] for job in jobs]


def test_images_have_their_own_prompt_and_seed(pipe, start):
    engine = start()
    assert results(engine.submit("a", seed=7, num_images=3)) == [("a", 7), ("a", 8), ("a", 9)]
    one, other = results([*engine.submit("b"), *engine.submit("b")])
    assert one != other  # drawn
    assert pipe.calls[0]["size"] == (32, 32)


def test_requests_alike_share_a_batch(pipe, start):
    engine = start(max_batch=4)
    hold(pipe, engine)
    jobs = [*engine.submit("a", seed=1), *engine.submit("b", seed=5, num_images=2)]
    jobs += engine.submit("small", seed=0, width=16, height=32)
    jobs += engine.submit("two", seed=0, nfe=2)
    jobs += [*engine.submit("c", seed=9, nfe=1), *engine.submit("d", seed=9)]  # the 4th alike, and the 5th
    pipe.gate.set()
    assert results(jobs) == [
        ("a", 1), ("b", 5), ("b", 6), ("small", 0), ("two", 0), ("c", 9), ("d", 9),
    ]  # fmt: skip
    assert [call["prompts"] for call in pipe.calls[1:]] == [["a", "b", "b", "c"], ["small"], ["two"], ["d"]]
    assert pipe.calls[2]["size"] == (16, 32)
    assert pipe.calls[3]["sampler"] == preset(2)


def test_guided_requests_share_a_batch_with_their_like(pipe, start):
    engine = start(max_batch=4)
    hold(pipe, engine)
    how = [{}, {"guidance": 2.0, "negative_prompt": "x"}, {"guidance": 2.0}, {"guidance": 2.0, "negative_prompt": "x"}]
    jobs = [job for k, given in enumerate(how) for job in engine.submit(f"p{k}", seed=0, **given)]
    pipe.gate.set()
    results(jobs)
    assert [call["prompts"] for call in pipe.calls[1:]] == [["p0"], ["p1", "p3"], ["p2"]]
    assert [call.get("guidance") for call in pipe.calls[1:]] == [None, 2.0, 2.0]
    assert [call.get("negative_prompt") for call in pipe.calls[1:]] == [None, "x", None]
    for name, value in (("guidance", float("nan")), ("guidance", "4"), ("negative_prompt", 3)):
        with pytest.raises(ConfigError, match=name):
            engine.submit("a", **{name: value})
    with pytest.raises(ConfigError, match="5000 characters"):
        engine.submit("a", negative_prompt="x" * 5000)


def test_one_large_request_is_cut_into_batches(pipe, start):
    engine = start(max_batch=3)
    assert [seed for _, seed in results(engine.submit("a", seed=0, num_images=8))] == list(range(8))
    assert pipe.batches == [3, 3, 2]


def test_waits_for_company(pipe, start):
    engine = start(max_batch=2, max_wait=PATIENCE)
    first = engine.submit("a")
    time.sleep(0.05)
    assert pipe.calls == []
    results([*first, *engine.submit("b")])
    assert pipe.batches == [2]


def test_waits_no_longer_than_told(pipe, start):
    engine = start(max_wait=0.1)
    began = time.monotonic()
    results(engine.submit("a"))
    assert time.monotonic() - began >= 0.1


def test_full_queue_refuses_whole_requests(pipe, start):
    engine = start(max_queue=4, max_images=4)
    hold(pipe, engine)
    engine.submit("a", num_images=3)
    with pytest.raises(QueueFullError, match="3 images are waiting, 2 more") as caught:
        engine.submit("b", num_images=2)
    assert caught.value.retry_after >= 1 and engine.waiting == 3
    (job,) = engine.submit("c", seed=1)
    pipe.gate.set()
    assert results([job]) == [("c", 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "x" * 11}, "11 characters; at most 10"),
        ({"width": 64, "height": 64}, "at most 2048 pixels"),
        ({"width": 17}, "nearest is 16"),
        ({"num_images": 3}, "at most 2"),
        ({"num_images": 0}, "num_images"),
        ({"nfe": 5}, "at most 4"),
        ({"nfe": 0}, "nfe"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed"),
        ({"prompt": "\ud800"}, "surrogate"),
    ],
)
def test_limits(pipe, start, options, message):
    engine = start(max_prompt=10, max_pixels=2048, max_images=2, max_nfe=4)
    with pytest.raises(ConfigError, match=message):
        engine.submit(**{"prompt": "a", **options})
    assert pipe.calls == [] and engine.waiting == 0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"max_wait": -1}, "max_wait"),
        ({"max_wait": float("nan")}, "max_wait"),
        ({"max_queue": 2, "max_images": 3}, "max_queue 2 must hold"),
    ],
)
def test_limits_that_cannot_work(limits, message):
    with pytest.raises(ConfigError, match=message):
        Limits(**limits)


def test_cancelled_jobs_leave_the_queue(pipe, start):
    engine = start(max_queue=2, max_images=2)
    hold(pipe, engine)
    jobs = engine.submit("a", num_images=2)
    engine.cancel(jobs)
    assert engine.waiting == 0 and all(job.future.cancelled() for job in jobs)
    kept = engine.submit("b", seed=1)
    pipe.gate.set()
    assert results(kept) == [("b", 1)]
    assert [call["prompts"] for call in pipe.calls] == [["first"], ["b"]]


def test_a_run_stops_only_when_nobody_waits_for_it(pipe, start):
    engine = start()
    hold(pipe, engine)
    pair = [*engine.submit("a"), *engine.submit("b")]
    pipe.gate.set()
    results(pair)

    hold(pipe, engine)
    pair = [*engine.submit("a", seed=1), *engine.submit("b", seed=2)]
    engine.cancel(pair[:1])  # still queued: leaves
    pipe.gate.set()
    assert results(pair[1:]) == [("b", 2)]

    alone = hold(pipe, engine)
    engine.cancel([alone])  # running: the pipeline is told
    with pytest.raises(CancelledError):
        alone.future.result(PATIENCE)
    engine.cancel([alone])  # finished: nothing happens
    pipe.gate.set()
    results(engine.submit("next"))


def test_one_of_two_callers_leaves_a_running_batch(pipe, start):
    engine = start(max_batch=2, max_wait=PATIENCE)
    pipe.gate.clear()
    gone, stays = *engine.submit("a", seed=1), *engine.submit("b", seed=2)
    assert pipe.entered.wait(PATIENCE)
    engine.cancel([gone])
    pipe.gate.set()
    assert results([stays]) == [("b", 2)]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [("bad", ConfigError), ("crash", ZeroDivisionError), ("big", DeviceError), ("lose", RuntimeError)],
)
def test_a_failing_image_spoils_no_other(pipe, start, prompt, error):
    engine = start()
    hold(pipe, engine)
    before, failing, after = engine.submit("a", seed=1), engine.submit(prompt), engine.submit("c", seed=3)
    pipe.gate.set()
    assert results([*before, *after]) == [("a", 1), ("c", 3)]
    with pytest.raises(error):
        failing[0].future.result(PATIENCE)
    results(engine.submit("next"))  # the worker lives
    assert engine.accepting and pipe.batches == [1, 3, 1, 1, 1, 1]


def test_a_batch_too_large_for_the_device_runs_one_by_one(pipe, start):
    engine = start(max_batch=2, max_wait=PATIENCE)
    assert results(engine.submit("wide", seed=4, num_images=2)) == [("wide", 4), ("wide", 5)]
    assert pipe.batches == [2, 1, 1]


def test_drain_finishes_what_was_accepted(pipe, start):
    engine = start(max_wait=PATIENCE)
    pipe.gate.clear()
    first = engine.submit("a", num_images=3)
    engine.close()
    with pytest.raises(DrainingError):
        engine.submit("late")
    pipe.gate.set()
    assert engine.drain(PATIENCE) and not engine.accepting
    assert len(results(first)) == 3 and engine.waiting == engine.running == 0


def test_drain_gives_up_after_its_time(pipe, start):
    engine = start()
    running, waiting = hold(pipe, engine), engine.submit("b", width=16)
    assert engine.drain(0.05) is False
    for job in (running, *waiting):
        with pytest.raises(CancelledError):
            job.future.result(PATIENCE)


def test_observer_sees_every_run(pipe, start):
    seen = []
    engine = start(observe=seen.append, max_batch=2)
    results(engine.submit("a", num_images=3))
    with pytest.raises(ConfigError):
        results(engine.submit("bad"))
    assert engine.drain(PATIENCE)
    assert [batch.size for batch in seen] == [2, 1, 1]
    assert seen[0].timings == {"total": 0.5} and seen[2].timings == {}
    assert all(batch.seconds >= 0 and batch.wait >= 0 for batch in seen)


def test_many_callers_get_their_own_images(pipe, start):
    engine, jobs, lock = start(max_queue=500, max_batch=7), {}, threading.Lock()

    def caller(number: int) -> None:
        for i in range(20):
            submitted = engine.submit(f"{number}", seed=1000 * number + i, width=16 * (1 + i % 2))
            with lock:
                jobs.update({1000 * number + i: submitted[0]})

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    wait([job.future for job in jobs.values()], PATIENCE)
    assert len(jobs) == 160
    assert all(results([job]) == [(str(seed // 1000), seed)] for seed, job in jobs.items())
    assert max(pipe.batches) <= 7
