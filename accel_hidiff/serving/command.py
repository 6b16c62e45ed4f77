"""`accel-hidiff serve`: a process that serves a deploy file until it is told to end.

The port is bound before anything else, so that probes are answered while models load. SIGTERM and SIGINT: no new
requests (503), those that wait and run get `service.drain` seconds, what is left is refused, compiling processes end,
exit code 0. A second signal skips the rest of the waiting.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from accel_hidiff.deploy import Deployment, ServiceTable
from accel_hidiff.errors import BadInput

LOG = logging.getLogger(__name__)
_BACKLOG: Final = 512
_STEP_S: Final = 20.0  # that a thread gets to come to the end of a step
_CONNECTIONS_S: Final = 30  # that answers get to be read


def serve(deployment: Deployment, announce: Callable[[str], None]) -> int:
    """Serves until a signal comes; the exit code of the process.

    Args:
        deployment: what to serve.
        announce: gets the URL once it is bound.

    Raises:
        BadInput: a package is not installed, the address cannot be bound, or a model is not what it should be.
        AccelHiDiffError, CompileCacheError, OSError: a model or the cache cannot be used.
    """
    with _ends_at_once():
        try:
            import fastapi
            import uvicorn
        except ImportError as problem:
            message = f"serve: expected the packages fastapi and uvicorn, got no {problem.name}"
            raise BadInput(f"{message}; pip install accel-hidiff[serve]") from None
        del fastapi
        listener = _bind(deployment.service)
    try:
        return _Server(uvicorn, deployment, listener, announce).run()
    finally:
        listener.close()


class _Server:
    """Ties a service, its application and uvicorn together."""

    def __init__(
        self, uvicorn: Any, deployment: Deployment, listener: socket.socket, announce: Callable[[str], None]
    ) -> None:
        from accel_hidiff.serving.app import create_app
        from accel_hidiff.serving.service import Service

        self._deployment = deployment
        self._listener = listener
        self._announce = announce
        self._signals = 0
        self._problem: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._service = Service(deployment, self._broken)

        outer = self

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: Any) -> None:
                outer._signal(sig)

        config = uvicorn.Config(
            create_app(self._service),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=_CONNECTIONS_S,
            backlog=_BACKLOG,
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        self._uvicorn = Server(config)

    def run(self) -> int:
        asyncio.run(self._run())
        if self._problem is not None:
            raise self._problem
        return 0

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self._uvicorn.serve([self._listener]))
        while not self._uvicorn.started and not serving.done():
            await asyncio.sleep(0.005)
        self._announce(_url(self._listener, self._deployment.service.host))
        self._service.start()
        ended = asyncio.create_task(self._stop.wait())
        await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
        await self._drain()
        patience = 0.0 if self._hurry.is_set() else _STEP_S
        closed = await asyncio.to_thread(self._service.close, patience, self._problem is not None)
        self._uvicorn.should_exit = True
        await serving
        ended.cancel()
        if not closed and self._problem is None:
            _leave()

    async def _drain(self) -> None:
        self._service.draining = True
        if self._problem is not None:
            return
        seconds = self._deployment.service.drain
        LOG.info("stopping: no new requests; those that are here get %g s", seconds)
        end = asyncio.get_running_loop().time() + seconds
        while not self._service.idle() and not self._hurry.is_set() and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)

    def _signal(self, number: int) -> None:
        """In the main thread, between two bytecodes of whatever it does."""
        self._signals += 1
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe((self._stop if self._signals == 1 else self._hurry).set)

    def _broken(self, problem: Exception) -> None:
        """In an engine's thread."""
        self._problem = self._problem or problem
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)


def _bind(table: ServiceTable) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in table.host else socket.AF_INET
        return socket.create_server((table.host, table.port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as problem:
        where = f"{table.host}:{table.port}"
        reason = getattr(problem, "strerror", None) or problem
        message = f"service.port: expected an address to listen on, cannot bind {where}: {reason}"
        raise BadInput(f"{message}; choose another --port or --host") from problem


def _url(listener: socket.socket, host: str) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


@contextmanager
def _ends_at_once() -> Iterator[None]:
    """A signal before anything is served is no fault: the process ends with code 0."""

    def end(number: int, frame: Any) -> None:
        os._exit(0)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave() -> None:
    """Ends a process whose engine is in the middle of a long step, or reads weights: there is nothing to lose."""
    LOG.warning("a model is still at work; leaving it")
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
