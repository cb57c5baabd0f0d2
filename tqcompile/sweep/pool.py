"""Runs each architecture in a process of its own, forked off this one, with a limit of time and of memory."""

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Limits:
    """Of one process: wall-clock seconds, and bytes of memory that it may hold (resident)."""

    seconds: float = 180.0
    bytes: int = 6 * 2**30


@dataclass
class _Job:
    task: Any
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    started: float
    record: dict


def run(tasks: Iterable[Any], work: Callable, limits: Limits, jobs: int = 1) -> Iterator[tuple[Any, dict]]:
    """Do `work(task, send)` for each task in a process of its own; yields (task, its last record, with `seconds`).

    A process that ends without a word, or passes a limit, is in the record as `died`.
    """
    context, waiting, running = multiprocessing.get_context("fork"), list(tasks)[::-1], []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.pop(), work, limits))
            wait([job.pipe for job in running], POLL_SECONDS)
            for job in list(running):
                if _finished(job, limits):
                    running.remove(job)
                    job.record["seconds"] = round(time.monotonic() - job.started, 1)
                    yield job.task, job.record
    finally:
        for job in running:
            _end(job)


def warm_up(once: Callable[[], Any]) -> None:
    """Do `once` what every process does, so that none has to load and build what the compiler keeps for good.

    The collector leaves alone what is there by now: looking at it would copy the pages that forks share.
    """
    # A process that has started threads cannot be forked in safety.
    torch.set_num_threads(1)
    once()
    torch.compiler.reset()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def apart(work: Callable[[], dict]) -> dict:
    """What `work` returns in a fork of this process, which keeps nothing of it; an `exception` where the fork died."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            try:
                result = work()
            except Exception as error:  # not the model's, which `work` records, but no less a result
                result = {"exception": f"{type(error).__name__}: {error}", "where": "tqcompile/sweep"}
            with os.fdopen(writing, "w") as out:
                json.dump(result, out)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    _, status = os.waitpid(pid, 0)
    died = {"exception": f"its process ended with status {os.waitstatus_to_exitcode(status)}", "where": ""}
    return json.loads(text) if text else died


def _start(context, task: Any, work: Callable, limits: Limits) -> _Job:
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, work, there, limits))
    process.start()
    there.close()
    return _Job(task, process, here, time.monotonic(), {})


def _child(task: Any, work: Callable, pipe: Connection, limits: Limits) -> None:
    # What it starts ends with it: they are one group.
    os.setsid()
    # A tiny model gains nothing from threads. Address space is more than what is held: the watch is the tight limit.
    torch.set_num_threads(1)
    address_space = 4 * limits.bytes
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    work(task, lambda record: pipe.send_bytes(json.dumps(record).encode()))


def _finished(job: _Job, limits: Limits) -> bool:
    """Take what the process sent, and say whether there will be no more of it."""
    over = not job.process.is_alive()
    try:
        while job.pipe.poll():
            job.record = json.loads(job.pipe.recv_bytes())
    except EOFError:
        over = True
    if not over and time.monotonic() - job.started > limits.seconds:
        return _stop(job, f"it ran for more than {limits.seconds:g} seconds")
    if not over and _resident(job.process.pid) > limits.bytes:
        return _stop(job, f"it held more than {limits.bytes / 2**30:g} GiB")
    if over:
        job.process.join()
        if job.process.exitcode:
            job.record["died"] = f"its process ended with status {job.process.exitcode}"
    return over


def _stop(job: _Job, why: str) -> bool:
    _end(job)
    job.record["died"] = why
    return True


def _end(job: _Job) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.process.pid, signal.SIGKILL)
    job.process.kill()
    job.process.join()


def _resident(pid: int) -> int:
    """Bytes that a process holds, or what the largest it started holds: they share most of their pages."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            own = int(file.read().split()[1]) * resource.getpagesize()
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return max(own, *map(_resident, map(int, file.read().split())), 0)
    except (OSError, IndexError):
        return 0
