"""Functions that run as several ranks on gloo, each in a process forked from one that has loaded torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

TIMEOUT_S = 600.0
PRELOADED = ["torch.distributed", "sklearn.datasets", "pipeline.cli", "pipeline.flow"]
PRELOADED += ["pipeline.evaluators.one_shot", "pipeline.train.retrain"]


class Answer(NamedTuple):
    """What a rank came to: a value, or the name and text of an error; neither where it was killed."""

    value: Any = None
    error: str | None = None
    text: str = ""


KILLED = Answer(error="killed")


def on_ranks(job: Callable[..., Any], size: int, *arguments: Any, **environment: str) -> list[Answer]:
    """The answers of `job(*arguments)` from `size` processes that were started as torchrun would; it is a
    module's function. A process that does not answer in time fails the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    told = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    started = []
    for rank in range(size):
        receive, send = context.Pipe(duplex=False)
        own = {**told, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
        process = context.Process(target=_run, args=(send, own, job, arguments), daemon=True)
        process.start()
        send.close()
        started.append((process, receive))
    deadline = time.monotonic() + TIMEOUT_S
    try:
        return [_answer(receive, deadline) for _, receive in started]
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def _answer(receive: Any, deadline: float) -> Answer:
    assert receive.poll(max(0.0, deadline - time.monotonic())), "a rank does not answer"
    try:
        answer: Answer = receive.recv()
        return answer
    except EOFError:
        return KILLED


def _run(send: Any, environment: dict[str, str], job: Callable[..., Any], arguments: Any) -> None:
    import torch

    from pipeline.errors import BudgetlineError

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        send.send(Answer(job(*arguments)))
    except BudgetlineError as error:
        send.send(Answer(None, type(error).__name__, str(error)))


def die() -> None:
    """As `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)
