"""The service over HTTP: a FastAPI application. FastAPI is imported when one is made.

No `from __future__ import annotations` here: FastAPI evaluates the annotations of endpoints that are defined inside a
function.
"""

import asyncio
import base64
import io
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Final

import accel_hidiff
from accel_hidiff.deploy import ServiceTable
from accel_hidiff.serving import schema
from accel_hidiff.serving.jobs import Event, Finished, Job, Step
from accel_hidiff.serving.refusal import Refusal, client_gone, failed, timed_out, too_large
from accel_hidiff.serving.requests import MAX_SEED, ImageRequest, read_json, read_request, size_text
from accel_hidiff.serving.service import Service

LOG = logging.getLogger(__name__)
GENERATIONS: Final = "/v1/images/generations"
_KEEP_ALIVE_S: Final = 15.0  # of event streams: a comment, so that proxies do not close what is only waiting
_BODY_S: Final = 30.0  # in which a body has to arrive, or the time of a request, if that is less
_DISCARDED: Final = 4 << 20  # bytes of a body that is too large: read all the same, so that the answer is seen


def create_app(service: Service) -> Any:
    """The application of a service that is started and closed by the caller."""
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.exceptions import HTTPException

    title = "accel-hidiff images"
    app = FastAPI(title=title, version=accel_hidiff.__version__, docs_url=None, redoc_url=None)
    deployment = service.deployment

    def refused(refusal: Refusal) -> Response:
        return JSONResponse(refusal.to_json(), refusal.status, headers=refusal.headers())

    @app.get(
        "/livez",
        summary="Whether the process answers.",
        responses={200: schema.json_answer("It does.", "status")},
    )
    async def livez() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get(
        "/healthz",
        summary="Whether every graph of the deploy file is loaded.",
        responses={
            200: schema.json_answer("It is ready.", "status", "models"),
            503: schema.json_answer("It is not; `models` tells what is missing.", "status", "models"),
        },
    )
    async def healthz() -> Response:
        ready, told = service.health()
        return JSONResponse(told, 200 if ready else 503)

    @app.get(
        "/v1/models",
        summary="The models, and what may be asked of each.",
        responses={200: schema.json_answer("The models; the first is the default.", "object", "data")},
    )
    async def models() -> Response:
        return JSONResponse(service.models())

    @app.get(
        "/metrics",
        summary="Prometheus metrics.",
        response_class=PlainTextResponse,
    )
    async def metrics() -> Response:
        text = await asyncio.to_thread(service.prometheus)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post(GENERATIONS, summary="Draws images.", openapi_extra=schema.generation_operation(deployment))
    async def generations(request: Request) -> Response:
        model = None
        try:
            body = read_json(await _read_body(request, deployment.service))
            asked = read_request(body, deployment, lambda: secrets.randbelow(MAX_SEED + 1))
            model = asked.model
            served = _Served(service, asked)
            before = served.submit(request)
        except Refusal as refusal:
            service.metrics.answered(model, refusal.status)
            return refused(refusal)
        if asked.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Request-Id": served.number}
            return StreamingResponse(served.stream(before), media_type="text/event-stream", headers=headers)
        try:
            answer = await served.answer()
        except Refusal as refusal:
            failure = refused(refusal)
            failure.headers["X-Request-Id"] = served.number
            return failure
        return JSONResponse(answer, headers={"X-Request-Id": served.number})

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, problem: Any) -> Response:
        message = f"{request.method} {request.url.path}: {problem.detail}; see /openapi.json for what there is"
        refusal = Refusal(problem.status_code, message, code="not_found" if problem.status_code == 404 else "http")
        answer = refused(refusal)
        answer.headers.update(problem.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def bad_request(request: Request, problem: Any) -> Response:
        return refused(Refusal(400, f"{request.url.path}: {problem.errors()[0]['msg']}", code="invalid_value"))

    @app.exception_handler(Exception)
    async def fault(request: Request, problem: Exception) -> Response:
        return refused(failed(type(problem).__name__, "-"))

    return app


class _Served:
    """One request, from the queue to its answer."""

    def __init__(self, service: Service, asked: ImageRequest) -> None:
        self.number = f"req-{secrets.token_hex(8)}"
        self._service = service
        self._asked = asked
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._job = Job(asked, self.number, self._tell)
        self._watch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, request: Any) -> int:
        """Queues it; from now on it ends with its time, or with its client. Returns how many are before it."""
        seconds = self._service.deployment.service.timeout
        before = self._service.submit(self._job)
        self._timer = self._loop.call_later(seconds, lambda: self._job.finish(timed_out(seconds)))
        self._watch = self._loop.create_task(self._leave_with(request))
        return before

    async def answer(self) -> dict[str, Any]:
        """The images; Refusal where there are none."""
        while True:
            event = await self._events.get()
            if isinstance(event, Refusal):
                raise event
            if isinstance(event, Finished):
                return await self._images(event)

    async def stream(self, before: int) -> AsyncIterator[str]:
        """Server-sent events: queued, one per step, and then the images or an error."""
        name = "image_generation"
        yield _event(f"{name}.queued", {"before": before})
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), _KEEP_ALIVE_S)
            except TimeoutError:
                yield ": still there\n\n"
                continue
            if isinstance(event, Step):
                yield _event(f"{name}.step", {"image": event.image, "step": event.step, "total": event.total})
            elif isinstance(event, Refusal):
                yield _event("error", event.to_json())
                return
            else:
                yield _event(f"{name}.completed", await self._images(event))
                return

    def _tell(self, event: Event) -> None:
        """In whichever thread it happens."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: Event) -> None:
        if not isinstance(event, Step):
            self._end(event)
        self._events.put_nowait(event)

    def _end(self, event: Finished | Refusal) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        asked, seconds = self._asked, time.monotonic() - self._job.arrived
        status = 200 if isinstance(event, Finished) else event.status
        if isinstance(event, Finished):
            self._service.metrics.drawn(asked.model, asked.n, seconds, event.waited)
        self._service.metrics.answered(asked.model, status)
        size = size_text((asked.height, asked.width))
        what = f"{asked.model} {size} n={asked.n} steps={asked.steps} seed={asked.seed}"
        how = f"compiled={event.compiled} eager={event.eager}" if isinstance(event, Finished) else event.code
        LOG.info("%s: %d in %.2f s: %s %s", self.number, status, seconds, what, how)

    async def _leave_with(self, request: Any) -> None:
        """Ends the request when its client goes."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._job.finish(client_gone())

    async def _images(self, event: Finished) -> dict[str, Any]:
        data = []
        for image, seed in event.images:
            data.append({"b64_json": await asyncio.to_thread(_png, image), "seed": seed})
        return {
            "created": int(time.time()),
            "model": self._asked.model,
            "size": size_text((self._asked.height, self._asked.width)),
            "data": data,
            "served": {"compiled": event.compiled, "eager": event.eager},
            "timing": {"waited_s": round(event.waited, 4), "drawn_s": round(event.drawn, 4)},
        }


async def _read_body(request: Any, table: ServiceTable) -> bytes:
    from starlette.requests import ClientDisconnect

    limit, patience = table.max_body, min(_BODY_S, table.timeout)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(patience):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    parts.append(chunk)
                elif size > limit + _DISCARDED:
                    break
    except TimeoutError:
        message = f"body: expected it within {patience:g} s, got a part of it; send it at once"
        raise Refusal(408, message, code="body_timeout") from None
    except ClientDisconnect:
        raise client_gone() from None
    if size > limit:
        raise too_large(limit)
    if kind != "application/json":
        message = f"Content-Type: expected application/json, got {kind[:60] or 'none'}; declare the body as JSON"
        raise Refusal(415, message, code="unsupported_media_type")
    return b"".join(parts)


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
