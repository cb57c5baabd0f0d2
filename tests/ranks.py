"""Processes of one process group that wait for work: what the tests of tensor parallelism run on."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from time import monotonic

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from tqcompile.report import clear

RANKS = 2
LIMIT = 120.0
# What a rank gets to answer in after another one failed: over NCCL it would wait for that one until the limit.
GRACE = 10.0
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class Ranks:
    """`RANKS` processes, started when they are needed and again after a failure."""

    def __init__(self, device: str):
        self.device, self.processes, self.pipes = device, [], []

    def run(self, function: Callable, *arguments) -> list:
        """`function(device, *arguments)` on every rank at once; what each returned.

        The test fails with the tracebacks of the ranks where one raises, or where one takes longer than `LIMIT` s.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers, deadline = {}, monotonic() + LIMIT
        while len(answers) < RANKS:
            ready = wait([p for p in self.pipes if p not in answers], max(0, deadline - monotonic()))
            if not ready:
                break
            answers |= {pipe: _answer(pipe) for pipe in ready}
            if not all(fine for fine, _ in answers.values()):
                deadline = min(deadline, monotonic() + GRACE)
        failed = [
            f"rank {rank}: {answers[pipe][1] if pipe in answers else 'no answer within the time limit'}"
            for rank, pipe in enumerate(self.pipes)
            if not answers.get(pipe, (False,))[0]
        ]
        if failed:
            self.stop()
            pytest.fail("\n".join(failed), pytrace=False)
        return [answers[pipe][1] for pipe in self.pipes]

    def _start(self) -> None:
        # The store looks for a free port itself, and keeps it: nobody can take it in between.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.store.port, self.device, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        """End the processes, whatever they are waiting for."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def _answer(pipe: Connection) -> tuple[bool, object]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "the process ended without a word"


def _serve(rank: int, port: int, device: str, pipe: Connection) -> None:
    try:
        torch.set_num_threads(1)
        # Transformers reads these, as torchrun sets them: how many parts to cut a model into, and which device is ours.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        if device == "cuda":
            torch.cuda.set_device(rank)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group(
            BACKENDS[device], store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=LIMIT)
        )
        while True:
            function, arguments = pipe.recv()
            torch._dynamo.reset()
            clear()
            pipe.send((True, function(device, *arguments)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
