"""The application: OpenAI's chat completions over one backend, `:focus`, health, metrics and the page.

Knows HTTP and the protocol; how texts are sampled is the backend's business, who may ask is the gate's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from visrl.conversation import Conversation, View
from visrl.engines.base import Sampling
from visrl.models.adapters import Adapter
from visrl.serve.adapters import HeldAdapter, RuntimeAdapters, add_routes
from visrl.serve.backend import Backend
from visrl.serve.connections import RESERVE, Held
from visrl.serve.errors import RequestError
from visrl.serve.images import Fetcher, Opener
from visrl.serve.metrics import Metrics
from visrl.serve.replies import ChatReply, Choice, ChoiceStream, Chunks, event, event_of, model_list, whole_reply
from visrl.serve.requests import QueuedRequest
from visrl.serve.safety import HELD, Budget, Gate
from visrl.serve.scenes import Scenes
from visrl.serve.schemas import (
    FOCUS_SUFFIX,
    WHOLE_SUFFIX,
    ChatRequest,
    Limits,
    read_request,
    to_conversation,
)
from visrl.serve.ways import Ways
from visrl.zoom.protocols import ZoomProtocol

PAGE = Path(__file__).parent / "page"
SMALL_PIXELS = 4_000_000  # of an image: it may use the part of the budget that is closed to larger ones
SHORT_BODY = 64_000  # bytes that are read in the event loop: a few milliseconds at worst
# The page is this file's alone: nothing from elsewhere, no inline script, in nobody's frame.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' data:; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the application is told: the served name, defaults of sampling, limits, and what may be fetched."""

    name: str
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)
    limits: Limits = Limits()  # noqa: RUF009 (frozen)
    fetcher: Fetcher = Fetcher()  # noqa: RUF009 (frozen)
    api_key: str | None = None
    only_local_names: bool = True
    created: int = 0
    adapters: RuntimeAdapters | None = None
    protocol: ZoomProtocol | None = None  # a public one, of the checkpoint; `visrl` otherwise
    max_looks: int | None = None  # of requests that say nothing; one look, always, if left out


def create_app(backend: Backend, settings: Settings, metrics: Metrics, opener: Opener | None = None) -> Gate:
    """The whole application, behind its gate. `opener` is to be closed by who made it; by default there is one."""
    # The generated documentation pages load scripts from elsewhere; docs/SERVING.md is the documentation.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    server = _Server(backend, settings, metrics, opener or Opener(settings.limits, settings.fetcher))
    metrics.ready = lambda: backend.state == "ready"
    app.get("/health")(server.health)
    app.get("/metrics")(server.show_metrics)
    app.get("/v1/models")(server.models)
    app.post("/v1/chat/completions")(server.chat)
    add_routes(app, settings.adapters, backend.check_adapter)
    app.get("/")(server.page)
    app.get("/page/scene")(server.scene)
    app.get("/page/{name}")(server.page_file)
    app.exception_handler(RequestError)(_refused)
    app.exception_handler(404)(_not_found)
    app.exception_handler(405)(_not_that_way)
    return Gate(
        app,  # type: ignore[arg-type]
        limits=settings.limits,
        api_key=settings.api_key,
        only_local_names=settings.only_local_names,
        metrics=metrics,
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(error.body(), error.status, headers)


async def _not_found(request: Request, error: Exception) -> Response:
    return JSONResponse(RequestError(404, "there is nothing at this address").body(), 404)


async def _not_that_way(request: Request, error: Exception) -> Response:
    headers = getattr(error, "headers", None) or {}
    said = f"{request.method[:20]} is not answered at this address, but {headers.get('Allow', 'another method')}"
    return JSONResponse(RequestError(405, said).body(), 405, headers)


class _Server:
    """The routes of one application."""

    def __init__(self, backend: Backend, settings: Settings, metrics: Metrics, opener: Opener) -> None:
        self.backend, self.settings, self.metrics, self.opener = backend, settings, metrics, opener
        most = settings.limits.held_pixels
        self.pixels = Budget(most, "pictures", spare=most // RESERVE, small=SMALL_PIXELS)
        self.scenes = Scenes()
        self.ways = Ways(settings.protocol, settings.max_looks, settings.limits)

    async def health(self) -> Response:
        state = self.backend.state
        return JSONResponse({"status": "ok" if state == "ready" else state}, 200 if state == "ready" else 503)

    async def show_metrics(self) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        return JSONResponse(model_list(self.settings.name, self.settings.created, self._adapters, self.ways.told()))

    @property
    def _adapters(self) -> dict[str, HeldAdapter]:
        return self.settings.adapters.held if self.settings.adapters else {}

    async def page(self) -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    async def page_file(self, name: str) -> Response:
        if name not in {"page.js", "page.css", "icon.svg"}:
            raise RequestError(404, "there is nothing at this address")
        return FileResponse(PAGE / name, headers=PAGE_HEADERS)

    async def scene(self, request: Request) -> Response:
        """A drawn scene and questions about it, for who has no image at hand."""
        # Browsers say so where another page asks; it could not read the scene, but have scenes drawn without end.
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise RequestError(403, "scenes are drawn for this server's own page")
        return Response(await self.scenes.one(), media_type="application/json")

    async def chat(self, request: Request) -> Response:
        asked = await self._read(request)
        self._adapter_of(asked)  # refused before any work is done
        if self.backend.state != "ready":
            raise RequestError(503, f"the model is not ready ({self.backend.state}); try again soon", retry_after_s=2)
        self.ways.check(asked, self.backend.is_passed_on)  # refused before any work is done
        if asked.stream:
            return await self._begin_stream(asked, request)
        choices = await self._timely(self._answer(asked, None, request.scope[HELD]), request)
        if choices is None:
            return Response(status_code=499)  # nobody is there to read it
        return await whole_reply(ChatReply.begin(asked.model), choices)

    def _adapter_of(self, asked: ChatRequest) -> Adapter | None:
        """The adapter that a request names; None where it names the model itself.

        Raises:
            RequestError: 404 where it names neither.
        """
        name, asked_name = self.settings.name, asked.model.removesuffix(asked.suffix)
        if asked_name == name or asked_name in self._adapters:
            return None if asked_name == name else self._adapters[asked_name].adapter
        known = ", ".join([name, *list(self._adapters)[:8]])
        said = f"no model {asked.model[:80]!r} here, but {known}, each with {FOCUS_SUFFIX} or {WHOLE_SUFFIX}, too"
        raise RequestError(404, said, "model_not_found")

    async def _read(self, request: Request) -> ChatRequest:
        # Not by `request.body()`, which would keep the bytes as long as the request.
        body = (await request.receive())["body"]
        given = (body, self.settings.limits, self.backend.is_passed_on)
        return read_request(*given) if len(body) < SHORT_BODY else await asyncio.to_thread(read_request, *given)

    async def _timely(self, work: Coroutine[Any, Any, list[Choice]], request: Request) -> list[Choice] | None:
        """The result of `work`, or None where the client left first, which cancels it.

        Raises:
            RequestError: 504 where the time of a request is over, and whatever `work` raises.
        """
        task = asyncio.ensure_future(work)
        left = asyncio.ensure_future(_until_left(request))
        try:
            await asyncio.wait({task, left}, timeout=self.settings.limits.request_s, return_when="FIRST_COMPLETED")
            if task.done():
                return task.result()
            if left.done():
                return None
            raise RequestError(504, f"this took longer than {self.settings.limits.request_s:g} s and was stopped")
        finally:
            left.cancel()
            task.cancel()
            # The places it holds are given back before the next request is looked at.
            await asyncio.gather(task, left, return_exceptions=True)

    async def _answer(self, asked: ChatRequest, chunks: Chunks | None, kept: Held) -> list[Choice]:
        """All choices of a request; their parts are put into `chunks` as they come.

        `kept` counts the bytes of the body, until its images are open, and those of the crops until they are sent; the
        pixels of several looks are held beside the images'.
        """
        with ExitStack() as held:
            # Held as they are opened: eight at a time, and many requests side by side, are more than memory has.
            views = await self.opener.open(asked.image_urls(), lambda more: held.enter_context(self.pixels.hold(more)))
            kept.free()
            conversation = to_conversation(asked, views)
            jobs = [
                asyncio.ensure_future(self._choice(asked, conversation, views, index, seed, chunks, kept, held))
                for index, seed in enumerate(asked.seeds())
            ]
            try:
                choices = list(await asyncio.gather(*jobs))
            finally:
                for job in jobs:
                    job.cancel()
        self.metrics.tokens["prompt"] += sum(choice.prompt_tokens for choice in choices)
        self.metrics.tokens["completion"] += sum(choice.completion_tokens for choice in choices)
        return choices

    async def _choice(
        self,
        asked: ChatRequest,
        conversation: Conversation,
        views: list[View],
        index: int,
        seed: int,
        chunks: Chunks | None,
        kept: Held,
        held: ExitStack,
    ) -> Choice:
        stream = ChoiceStream(index, chunks)

        def keep(look: dict[str, Any], pixels: int) -> None:
            kept.add(len(look["crop"] or ""))
            if pixels:  # crops stay for the turns to come
                held.enter_context(self.pixels.hold(pixels))

        queued = QueuedRequest(
            conversation,
            asked.sampling(self.ways.sampling(asked, self.settings.sampling)),
            seed,
            asked.stops,
            on_text=None if chunks is None else stream.put_text,
            passed=asked.passed,
            index=index,
            adapter=self._adapter_of(asked),
        )
        return await self.ways.answer(self.backend, asked, views, queued, stream, keep)

    async def _begin_stream(self, asked: ChatRequest, request: Request) -> Response:
        """The streamed reply, begun with its first event, so that what is refused still gets its own status."""
        events = self._stream(asked, request)
        first = await anext(events, None)
        if first is None:
            return Response(status_code=499)

        async def all_events() -> AsyncIterator[bytes]:
            yield first
            async for data in events:
                yield data

        return StreamingResponse(all_events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _stream(self, asked: ChatRequest, request: Request) -> AsyncIterator[bytes]:
        """The reply as server-sent events. An error after the beginning is an event too: the status is long sent."""
        begun = False
        reply = ChatReply.begin(asked.model)
        chunks: Chunks = asyncio.Queue()
        work = asyncio.ensure_future(self._timely(self._answer(asked, chunks, request.scope[HELD]), request))
        work.add_done_callback(lambda _: chunks.put_nowait(None))
        try:
            while (chunk := await chunks.get()) is not None:
                begun = True
                yield await event_of(reply, chunk)
            choices = await work
            if choices is None:
                return
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield event(reply.last_chunk(choices))
            yield event("[DONE]")
        except RequestError as error:
            if not begun:
                raise
            yield event(error.body())
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


async def _until_left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
