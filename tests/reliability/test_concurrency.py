"""Threads that share a pipeline, pipelines that share a process, processes that share nothing but a fork."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from twinflow_rt.errors import CancelledError, ConfigError, DeviceError
from twinflow_rt.loading import load
from twinflow_rt.runtime import out_of_memory

CALLS = [
    {"prompt": prompt, "seed": seed, "height": height, "width": 32, "nfe": nfe}
    for seed, (prompt, height, nfe) in enumerate([
        ("a red circle", 32, 1), ("a blue square beside a triangle", 32, 1), ("a", 64, 1), ("a red circle", 32, 2),
    ])
]  # fmt: skip
FORK = """
import os, signal, sys, threading, torch, twinflow_rt
from twinflow_rt.runtime import forks
from twinflow_rt.serve.engine import DrainingError, Engine
torch.set_num_threads(2)  # OpenMP's threads exist, and do not survive a fork
pipe = twinflow_rt.load("demo", device="cpu")
make = lambda **how: pipe("a red circle", seed=0, output="np", **how).images
want, engine = make(), Engine(pipe)

def children(count):
    made = []
    for _ in range(count):
        if (pid := os.fork()) == 0:
            signal.alarm(60)  # a child that hangs is killed
            close = abs(make().astype(int) - want).max() <= 1  # the child has one thread, which may round otherwise
            try:
                engine.submit("a")
            except DrainingError:
                os._exit(0 if close and torch.get_num_threads() == 1 else 1)
            os._exit(2)
        made.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in made]

held, done = threading.Event(), threading.Event()
def hold():  # every lock of the package, as threads in the middle of everything would
    locks = [thing for thing in forks._reopened if isinstance(thing, forks.Lock)]
    for lock in [*locks, engine._changed]:
        lock.acquire()
    held.set(), done.wait()
    for lock in [*locks, engine._changed]:
        lock.release()
thread = threading.Thread(target=hold)
thread.start(), held.wait()
assert children(1) == [0]
done.set(), thread.join()

busy = True
def work():
    height = 0
    while busy:
        make(height=16 * (height % 4 + 1))
        height += 1
thread = threading.Thread(target=work)
thread.start()
assert children(2) == [0] * 2
busy = False
thread.join()

codes = []
def fork(done, total, x0):  # the child comes out of the call that the fork happened in
    codes.append(os.fork())
inside = make(callback=fork)
if codes[0] == 0:
    os._exit(0 if abs(inside.astype(int) - want).max() <= 1 and (make() == inside).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(codes[0], 0)[1]) == 0
assert (make() == want).all() and torch.get_num_threads() == 2
print("ok")
"""


def image(pipe, call):
    return pipe(output="np", **call).images


def test_one_pipeline_eight_threads(demo):
    """Mixed prompts, sizes, schedules and cancels: every image is the one it is alone."""
    want = [image(demo, call) for call in CALLS]
    wrong, cancelled = [], []

    def work(number):
        draw = random.Random(number)
        for _ in range(6):
            i = draw.randrange(len(CALLS))
            if draw.random() < 0.2:
                with pytest.raises(CancelledError):
                    demo(cancel=lambda: True, **CALLS[i])
                cancelled.append(i)
            elif not np.array_equal(image(demo, CALLS[i]), want[i]):
                wrong.append(i)

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, number) for number in range(8)]:
            done.result()
    assert not wrong and cancelled


def test_saving_beside_other_schedules(demo, tmp_path):
    """What is saved has the pipeline's schedule, whatever other threads compute meanwhile."""
    stop, failures = threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                image(demo, CALLS[3])  # two evaluations
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        saved = demo.save(tmp_path / "saved")
    finally:
        stop.set()
        thread.join()
    assert not failures
    again = load(saved, device="cpu")
    assert len(again.plan.schedule) == 1 and np.array_equal(image(again, CALLS[0]), image(demo, CALLS[0]))


def test_pipelines_side_by_side():
    """Loaded and used at the same time, each with its own plan."""
    options = [{}, {"precision": "int8"}, {"dtype": "bfloat16"}, {"nfe": 2}]
    want = [image(load("demo", device="cpu", **o), {**CALLS[0], "nfe": None}) for o in options]
    start = threading.Barrier(len(options))

    def work(option):
        start.wait()
        pipe = load("demo", device="cpu", **option)
        return [image(pipe, {**CALLS[0], "nfe": None}) for _ in range(3)]

    with ThreadPoolExecutor(len(options)) as threads:
        results = list(threads.map(work, options))
    assert all(np.array_equal(one, w) for w, got in zip(want, results, strict=True) for one in got)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_forked_children_generate():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize("use", [
    lambda pipe, folder: pipe("a"), lambda pipe, folder: pipe.set_loras(), lambda pipe, folder: pipe.warm_up(),
    lambda pipe, folder: pipe.save(folder / "saved"), lambda pipe, folder: pipe.parallelize(),
], ids=["call", "set_loras", "warm_up", "save", "parallelize"])  # fmt: skip
@pytest.mark.parametrize("where", ["callback", "cancel"])
@pytest.mark.parametrize("refused", [False, True], ids=["", "by a fresh thread"])
def test_a_pipeline_refuses_its_own_callbacks(demo, tmp_path, use, where, refused):
    """... by name, instead of waiting for itself; also where the call runs on another thread than its caller's."""
    want = image(demo, CALLS[0])

    def work():
        out_of_memory._thread.refused = refused
        with pytest.raises(ConfigError, match="this pipeline is running the call that this one is made from"):
            demo(**CALLS[0], **{where: lambda *_, **__: use(demo, tmp_path)})

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and not list(tmp_path.iterdir())
    assert np.array_equal(image(demo, CALLS[0]), want)


def test_a_callback_may_use_another_pipeline_and_other_threads_wait(demo):
    """... which in turn may not come back to the first."""
    other, seen = load("demo", device="cpu", dtype="float32"), []
    want = image(demo, CALLS[0])

    def back(done, total, x0):
        with pytest.raises(ConfigError, match="running the call"):
            demo("a")

    def callback(done, total, x0):
        seen.append(other(output="np", **CALLS[0], callback=back).images)
        threads.append(start(lambda: seen.append(image(demo, CALLS[0]))))

    def start(work):
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    threads = []
    demo(**CALLS[0], callback=callback)
    threads[0].join(60)
    assert len(seen) == 2 and all(np.array_equal(images, want) for images in seen)


def spawned(call):
    torch.set_num_threads(torch.get_num_threads())
    return image(load("demo", device="cpu", dtype="float32"), call)


def test_spawned_workers_generate(demo):
    want = image(demo, CALLS[0])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(spawned, (CALLS[0],)), want)


def test_pipelines_stay_in_their_process(demo):
    for copying in (pickle.dumps, copy.deepcopy):
        with pytest.raises(ConfigError, match="load the model there"):
            copying(demo)


def test_cuda_after_a_fork_is_refused_by_name(demo, monkeypatch):
    monkeypatch.setattr(demo._lock, "forked", True)
    monkeypatch.setattr(demo, "device", torch.device("cuda"))
    with pytest.raises(DeviceError, match="spawn"):
        demo("a")
