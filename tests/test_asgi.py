"""`TransactionMiddleware`: a transaction per request, under three frameworks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from litestar import Litestar
from litestar import Request as LitestarRequest
from litestar import WebSocket as LitestarWebSocket
from litestar import get as litestar_get
from litestar import websocket as litestar_websocket
from litestar.background_tasks import BackgroundTask as LitestarBackgroundTask
from litestar.middleware import DefineMiddleware
from litestar.response import Response as LitestarResponse
from litestar.response import Stream as LitestarStream
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    IncompatibleTransactionError,
    NoSessionError,
    PoolSettings,
    TransactionTimeoutError,
    UnexpectedRollbackError,
)
from sessionwire.asgi import ASGIScope, Message, Receive, Send, TransactionMiddleware

from .cancellation import each_cancellation
from .conftest import checked_out, notes
from .http_server import served
from .models import Note
from .sample_app import Notebook, Notes


@dataclass
class Reply:
    """What an endpoint answers, in no framework's words."""

    status: int = 200
    body: str | AsyncIterator[str] = ""
    background: Callable[[], Awaitable[None]] | None = None


class Desk:
    """The endpoints of the application: `/action/text`."""

    def __init__(self, manager: DatabaseSessionManager) -> None:
        self.manager = manager
        self.session = CurrentSession(manager)
        self.notes = Notes(self.session)
        self.notebook = Notebook(self.notes, manager.transaction)
        self.seen: list[BaseException] = []
        self.arrived, self.go_on, self.left = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def answer(self, action: str, text: str) -> Reply:
        endpoint: Callable[[str], Awaitable[Reply]] = getattr(self, action)
        return await endpoint(text)

    async def ignore(self, text: str) -> Reply:
        return Reply(body=text)

    async def add(self, text: str) -> Reply:
        self.session.add(Note(text=text))
        return Reply(201)

    async def serve_twice(self, text: str) -> Reply:
        await self.notebook.write(text)
        await self.notebook.write(f"{text} again")
        return Reply(302)

    async def refuse(self, text: str) -> Reply:
        await self.notes.add(text)
        return Reply(int(text))

    async def fail(self, text: str) -> Reply:
        await self.notes.add(text)
        raise ZeroDivisionError

    async def raise_http(self, text: str) -> Reply:
        await self.notebook.write(text)
        raise HTTPException(409)

    async def swallow(self, text: str) -> Reply:
        for _ in range(2):
            try:
                await self.notes.add(text)
            except IntegrityError:
                return Reply(200, "all is well")
        raise AssertionError

    async def change_its_mind(self, text: str) -> Reply:
        await self.notes.add(text)
        self.manager.transaction.set_rollback_only()
        return Reply(200, "dry run")

    async def linger(self, text: str) -> Reply:
        await self.notes.add(text)
        self.arrived.set()
        await self.go_on.wait()
        self.left.set()
        return Reply()

    async def stream(self, text: str) -> Reply:
        await self.notes.add(text)
        return Reply(200, self._slowly())

    async def _slowly(self) -> AsyncIterator[str]:
        yield "a"
        await self.go_on.wait()
        yield "b"

    async def query_in_body(self, text: str) -> Reply:
        await self.notes.add(text)
        return Reply(200, self._querying())

    async def _querying(self) -> AsyncIterator[str]:
        await self._use_scope()
        yield "the texts: "
        async with self.manager.session() as session:
            yield ",".join(await Notes(session).texts())

    async def go_on_in_background(self, text: str) -> Reply:
        await self.notes.add(text)
        return Reply(202, background=self._use_scope)

    async def _use_scope(self) -> None:
        try:
            await self.notes.texts()
        except Exception as error:
            self.seen.append(error)

    async def chat(self) -> str:
        await self._use_scope()
        return type(self.seen[0]).__name__


# The same application on each framework


Build = Callable[[Desk], Any]


def starlette_response(reply: Reply) -> Response:
    background = BackgroundTask(reply.background) if reply.background else None
    kind = PlainTextResponse if isinstance(reply.body, str) else StreamingResponse
    return kind(reply.body, reply.status, background=background)


def starlette(desk: Desk, *middleware: Middleware) -> Starlette:
    async def endpoint(request: Request) -> Response:
        return starlette_response(await desk.answer(**request.path_params))

    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await desk.chat())
        await websocket.close()

    routes = [Route("/{action}/{text}", endpoint), WebSocketRoute("/", chat)]
    return Starlette(routes=routes, middleware=list(middleware) or [for_each_request(desk)])


def for_each_request(desk: Desk) -> Middleware:
    return Middleware(TransactionMiddleware, transaction=desk.manager.transaction)


async def pass_on(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    return await call_next(request)


IN_A_TASK = Middleware(BaseHTTPMiddleware, dispatch=pass_on)


def endpoint_in_a_task(desk: Desk) -> Starlette:
    return starlette(desk, for_each_request(desk), IN_A_TASK)


def all_in_a_task(desk: Desk) -> Starlette:
    return starlette(desk, IN_A_TASK, for_each_request(desk))


def fastapi(desk: Desk) -> FastAPI:
    app = FastAPI()
    app.add_middleware(TransactionMiddleware, transaction=desk.manager.transaction)

    @app.get("/{action}/{text}")
    async def endpoint(action: str, text: str) -> Response:
        return starlette_response(await desk.answer(action, text))

    @app.websocket("/")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await desk.chat())
        await websocket.close()

    return app


def litestar(desk: Desk) -> Litestar:
    @litestar_get("/{action:str}/{text:str}")
    async def endpoint(request: LitestarRequest[Any, Any, Any]) -> LitestarResponse[Any]:
        reply = await desk.answer(**request.path_params)
        background = LitestarBackgroundTask(reply.background) if reply.background else None
        kind: Any = LitestarResponse if isinstance(reply.body, str) else LitestarStream
        return kind(
            reply.body, status_code=reply.status, background=background, media_type="text/plain"
        )

    @litestar_websocket("/")
    async def chat(socket: LitestarWebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        await socket.send_text(await desk.chat())
        await socket.close()

    middleware = DefineMiddleware(TransactionMiddleware, transaction=desk.manager.transaction)
    return Litestar([endpoint, chat], middleware=[middleware], logging_config=None)


FRAMEWORKS: list[Build] = [fastapi, starlette, litestar]
STACKS: list[Build] = [*FRAMEWORKS, endpoint_in_a_task, all_in_a_task]


@pytest.fixture
def desk(manager: DatabaseSessionManager) -> Desk:
    return Desk(manager)


@pytest.fixture(params=STACKS)
async def client(desk: Desk, request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of the application on each stack, or on the named ones."""
    async with served(request.param(desk)) as client:
        yield client


def on(*stacks: Build) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("client", stacks, indirect=True)


class TestEndsBeforeTheResponse:
    async def test_the_middleware_makes_a_request_one_transaction(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        assert (await client.get("/add/a")).status_code == 201
        assert (await client.get("/serve_twice/b")).status_code == 302
        assert await notes(desk.manager) == ["a", "b", "b again"]

    async def test_the_response_begins_after_the_commit_without_a_connection(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        async with client.stream("GET", "/stream/a") as response:
            assert response.status_code == 200
            assert await notes(desk.manager) == ["a"]
            assert checked_out(desk.manager) == 0
            desk.go_on.set()
            assert await response.aread() == b"ab"

    @on(*FRAMEWORKS, endpoint_in_a_task)
    async def test_an_error_in_the_endpoint_rolls_the_request_back(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        for path, status in (
            ("/refuse/400", 400),
            ("/refuse/503", 503),
            ("/fail/a", 500),
            ("/raise_http/a", 409),
        ):
            assert (await client.get(path)).status_code == status
        assert await notes(desk.manager) == []

    @on(starlette)
    async def test_a_response_without_an_error_is_committed(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        assert (await client.head("/add/a")).status_code == 201
        assert (await client.get("/refuse/304")).status_code == 304
        assert (await client.get("/refuse/399")).status_code == 399
        assert await notes(desk.manager) == ["304", "399", "a"]

    @on(*FRAMEWORKS, endpoint_in_a_task)
    async def test_a_commit_that_fails_replaces_the_response(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        assert (await client.get("/add/a")).status_code == 201
        assert (await client.get("/add/a")).status_code == 500
        assert await notes(desk.manager) == ["a"]

    @on(fastapi, endpoint_in_a_task)
    async def test_a_failed_statement_whose_error_is_caught_makes_an_error_response(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        response = await client.get("/swallow/a")
        assert (response.status_code, "well" in response.text) == (500, False)
        assert await notes(desk.manager) == []

    @on(starlette)
    async def test_an_endpoint_can_request_a_rollback(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        assert (await client.get("/change_its_mind/a")).text == "dry run"
        assert await notes(desk.manager) == []

    @on(fastapi, litestar)
    async def test_a_request_that_uses_no_session_sends_nothing_to_the_server(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        await desk.manager.engine.dispose()
        for path in ("/ignore/a", "/nowhere"):
            await client.get(path)
        pool: Any = desk.manager.engine.pool
        assert pool.checkedin() + pool.checkedout() == 0


class TestHasNoScope:
    @on(*FRAMEWORKS, all_in_a_task)
    async def test_the_body_of_a_streaming_response_has_no_scope(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        response = await client.get("/query_in_body/a")
        assert response.text == "the texts: a"
        [error] = desk.seen
        assert isinstance(error, NoSessionError)
        assert (
            "such as a streaming body or a background task, must open its own session()"
            in error.__notes__[0]
        )

    @on(endpoint_in_a_task)
    async def test_a_body_that_queries_before_the_response_makes_an_error_response(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        assert (await client.get("/query_in_body/a")).status_code == 500
        assert await notes(desk.manager) == []

    @on(*FRAMEWORKS)
    async def test_a_background_task_has_no_scope(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        assert (await client.get("/go_on_in_background/a")).status_code == 202
        async with asyncio.timeout(5):
            while not desk.seen:
                await asyncio.sleep(0.001)
        [error] = desk.seen
        assert isinstance(error, NoSessionError)
        assert "a background task" in error.__notes__[0]
        assert await notes(desk.manager) == ["a"]

    @on(*FRAMEWORKS)
    async def test_a_websocket_has_no_scope(self, client: httpx.AsyncClient, desk: Desk) -> None:
        async with connect(str(client.base_url.copy_with(scheme="ws")), proxy=None) as websocket:
            assert await websocket.recv() == "NoSessionError"


class TestOptions:
    async def test_the_options_of_the_middleware_reach_its_transaction(
        self, desk: Desk, backend: str
    ) -> None:
        async def endpoint(request: Request) -> Response:
            level = (
                "SHOW transaction_isolation" if backend == "postgresql" else "SELECT 'serializable'"
            )
            await desk.notes.add(str(await desk.session.scalar(text(level))))
            return Response()

        app = Starlette(routes=[Route("/", endpoint)])
        app.add_middleware(
            TransactionMiddleware, transaction=desk.manager.transaction, isolation="SERIALIZABLE"
        )
        async with served(app) as client:
            assert (await client.get("/")).status_code == 200
        assert await notes(desk.manager) == ["serializable"]

    async def test_the_options_of_the_middleware_are_checked_before_the_first_request(
        self, desk: Desk
    ) -> None:
        with pytest.raises(ValueError, match="unknown isolation level 'QUICK'"):
            TransactionMiddleware(
                Starlette(), transaction=desk.manager.transaction, isolation="QUICK"
            )

    @pytest.mark.parametrize("swallows", [False, True])
    async def test_the_timeout_of_the_middleware_ends_when_the_response_begins(
        self, desk: Desk, swallows: bool
    ) -> None:
        async def slow(request: Request) -> Response:
            await desk.notes.add("slow")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if not swallows:
                    raise
            return Response()

        async def body() -> AsyncIterator[str]:
            await asyncio.sleep(0.15)
            yield "a"

        async def stream(request: Request) -> Response:
            await desk.notes.add("stream")
            return StreamingResponse(body())

        with_timeout = Middleware(
            TransactionMiddleware, transaction=desk.manager.transaction, timeout=0.1
        )
        app = Starlette(
            routes=[Route("/slow", slow), Route("/stream", stream)], middleware=[with_timeout]
        )
        app.add_exception_handler(
            TransactionTimeoutError, lambda request, error: Response("never asked")
        )
        app.add_exception_handler(
            Exception, lambda request, error: Response(type(error).__name__, 503)
        )
        async with served(app) as client:
            assert (await client.get("/stream")).text == "a"
            response = await client.get("/slow")
        assert (response.status_code, response.text) == (503, "TransactionTimeoutError")
        assert await notes(desk.manager) == ["stream"]


async def test_many_concurrent_requests_share_few_connections(database_url: str) -> None:
    few = DatabaseSettings(url=database_url, pool=PoolSettings(size=3, max_overflow=0))
    async with DatabaseSessionManager(few) as manager:
        async with manager.connect() as connection:
            await manager.create_all(connection)
        async with served(fastapi(Desk(manager))) as client:
            responses = await asyncio.gather(*(client.get(f"/serve_twice/{n}") for n in range(50)))
        assert {response.status_code for response in responses} == {302}
        assert len(await notes(manager)) == 100
        assert checked_out(manager) == 0


# Applications that do as they like, called as a server calls them


OK: Message = {"type": "http.response.start", "status": 200, "headers": []}
REFUSED: Message = {**OK, "status": 503}
BODY: Message = {"type": "http.response.body", "body": b""}


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def call(
    app: Any, path: str = "/", *, receive: Receive = never, sent: list[Message] | None = None
) -> list[int]:
    """Call the application, and return the statuses that it sent."""
    sent = [] if sent is None else sent

    async def send(message: Message) -> None:
        sent.append(message)

    asgi = {"version": "3.0", "spec_version": "2.3"}
    scope: ASGIScope = {
        "type": "http",
        "asgi": asgi,
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [],
    }
    await app(scope, receive, send)
    return statuses(sent)


def statuses(sent: list[Message]) -> list[int]:
    return [message["status"] for message in sent if message["type"] == "http.response.start"]


@pytest.fixture
def wrap(desk: Desk) -> Callable[[Callable[[Send], Awaitable[None]]], TransactionMiddleware]:
    """Return a function that wraps an application in a transaction for each request."""

    def wrap(answer: Callable[[Send], Awaitable[None]]) -> TransactionMiddleware:
        async def app(scope: ASGIScope, receive: Receive, send: Send) -> None:
            await answer(send)

        return TransactionMiddleware(app, transaction=desk.manager.transaction)

    return wrap


Wrap = Callable[[Callable[[Send], Awaitable[None]]], TransactionMiddleware]


class TestApplicationsThatDoAsTheyLike:
    async def test_an_application_that_sends_no_response_rolls_back(
        self, desk: Desk, wrap: Wrap
    ) -> None:
        async def answer(send: Send) -> None:
            await desk.notes.add("a")

        assert await call(wrap(answer)) == []
        assert await notes(desk.manager) == []

    async def test_an_error_after_the_start_of_the_response_rolls_nothing_back(
        self, desk: Desk, wrap: Wrap
    ) -> None:
        async def answer(send: Send) -> None:
            await desk.notes.add("a")
            await send(OK)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await call(wrap(answer))
        assert await notes(desk.manager) == ["a"]

    @pytest.mark.parametrize("then", [[], [BODY], [OK, BODY]])
    async def test_an_application_that_swallows_a_commit_error_cannot_report_success(
        self, desk: Desk, wrap: Wrap, then: list[Message]
    ) -> None:
        async def answer(send: Send) -> None:
            desk.session.add_all([Note(text="a"), Note(text="a")])
            try:
                await send(OK)
            except IntegrityError:
                for message in then:
                    await send(message)

        sent: list[Message] = []
        with pytest.raises(IntegrityError):
            await call(wrap(answer), sent=sent)
        assert sent == []
        assert await notes(desk.manager) == []

    async def test_an_application_that_swallows_a_commit_error_may_answer_with_an_error(
        self, desk: Desk, wrap: Wrap
    ) -> None:
        async def answer(send: Send) -> None:
            desk.session.add_all([Note(text="a"), Note(text="a")])
            try:
                await send(OK)
            except IntegrityError:
                await send(REFUSED)
                await send(BODY)

        assert await call(wrap(answer)) == [503]

    async def test_a_later_error_does_not_hide_a_commit_error(self, desk: Desk, wrap: Wrap) -> None:
        async def answer(send: Send) -> None:
            desk.session.add_all([Note(text="a"), Note(text="a")])
            try:
                await send(OK)
            except IntegrityError as error:
                raise RuntimeError(
                    "Caught handled exception, but response already started."
                ) from error

        with pytest.raises(IntegrityError):
            await call(wrap(answer))

    @pytest.mark.parametrize("start", [OK, REFUSED])
    async def test_a_response_sent_inside_a_joined_block_is_refused(
        self, desk: Desk, wrap: Wrap, start: Message
    ) -> None:
        async def answer(send: Send) -> None:
            async with desk.manager.transaction():
                await desk.notes.add("a")
                await send(start)

        sent: list[Message] = []
        with pytest.raises(UnexpectedRollbackError):
            await call(wrap(answer), sent=sent)
        assert 200 not in statuses(sent)
        assert await notes(desk.manager) == []

    async def test_a_response_sent_inside_a_separate_block_is_sent(
        self, desk: Desk, wrap: Wrap
    ) -> None:
        async def answer(send: Send) -> None:
            await desk.notes.add("a")
            async with desk.manager.session():
                await send(OK)

        assert await call(wrap(answer)) == [200]
        assert await notes(desk.manager) == ["a"]


class TestExceptionHandlers:
    """Of Starlette: to them the response has started when the commit fails."""

    async def test_a_handler_for_the_commit_error_does_not_hide_it(self, desk: Desk) -> None:
        app = starlette(desk)
        app.add_exception_handler(IntegrityError, lambda request, error: Response("conflict", 409))
        await call(app, "/add/a")
        sent: list[Message] = []
        with pytest.raises(IntegrityError):
            await call(app, "/add/a", sent=sent)
        assert statuses(sent) == [500]

    async def test_a_handler_for_all_exceptions_answers_a_commit_error(self, desk: Desk) -> None:
        app = starlette(desk)
        app.add_exception_handler(
            Exception, lambda request, error: Response(type(error).__name__, 503)
        )
        async with served(app) as client:
            assert (await client.get("/add/a")).status_code == 201
            response = await client.get("/add/a")
        assert (response.status_code, response.text) == (503, "IntegrityError")

    async def test_a_flush_in_the_endpoint_takes_the_error_to_its_handler(self, desk: Desk) -> None:
        app = starlette(desk)
        app.add_exception_handler(IntegrityError, lambda request, error: Response("conflict", 409))
        async with served(app) as client:
            assert [(await client.get("/refuse/200")).status_code for _ in range(2)] == [200, 409]
        assert await notes(desk.manager) == ["200"]


class TestHooks:
    async def test_hooks_run_before_the_response_begins(self, desk: Desk, wrap: Wrap) -> None:
        sent: list[Message] = []
        seen: list[int] = []

        async def answer(send: Send) -> None:
            desk.manager.transaction.on_commit(lambda: seen.append(len(sent)))
            await desk.notes.add("a")
            await send(OK)

        await call(wrap(answer), sent=sent)
        assert seen == [0]

    async def test_the_error_of_a_hook_replaces_the_response(self, desk: Desk, wrap: Wrap) -> None:
        async def answer(send: Send) -> None:
            desk.manager.transaction.on_commit(lambda: 1 // 0)
            await desk.notes.add("a")
            await send(OK)

        sent: list[Message] = []
        with pytest.raises(ZeroDivisionError):
            await call(wrap(answer), sent=sent)
        assert sent == []
        assert await notes(desk.manager) == ["a"]


class TestNested:
    async def test_a_nested_middleware_joins_the_outer_one(self, desk: Desk) -> None:
        begun: list[object] = []
        desk.manager.transaction.on_begin(begun.append)
        app = starlette(desk, for_each_request(desk), for_each_request(desk))
        async with served(app) as client:
            assert (await client.get("/add/a")).status_code == 201
            assert (await client.get("/refuse/400")).status_code == 400
            assert (await client.get("/fail/b")).status_code == 500
            assert (await client.get("/add/a")).status_code == 500
        assert len(begun) == 4
        assert await notes(desk.manager) == ["a"]

    async def test_a_nested_middleware_that_rolls_back_rolls_the_outer_one_back(
        self, desk: Desk, wrap: Wrap
    ) -> None:
        async def refuse(send: Send) -> None:
            await desk.notes.add("a")
            await send(REFUSED)

        async def answer(send: Send) -> None:
            async def say_ok(message: Message) -> None:
                await send({**message, "status": 200})

            await call_inner({"type": "http"}, never, say_ok)

        call_inner = wrap(refuse)
        with pytest.raises(UnexpectedRollbackError):
            await call(wrap(answer))
        assert await notes(desk.manager) == []

    async def test_a_nested_middleware_with_other_options_is_refused(self, desk: Desk) -> None:
        stricter = Middleware(
            TransactionMiddleware, transaction=desk.manager.transaction, isolation="SERIALIZABLE"
        )
        with pytest.raises(IncompatibleTransactionError, match="isolation='SERIALIZABLE'"):
            await call(starlette(desk, for_each_request(desk), stricter), "/ignore/a")

    async def test_a_request_made_inside_a_transaction_joins_it(self, desk: Desk) -> None:
        with pytest.raises(ZeroDivisionError):
            async with desk.manager.transaction():
                assert await call(starlette(desk), "/add/a") == [201]
                raise ZeroDivisionError
        assert await notes(desk.manager) == []


class TestWhoGoesAway:
    @on(fastapi, litestar)
    async def test_a_client_that_disconnects_during_the_endpoint_does_not_stop_it(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        request = asyncio.create_task(client.get("/linger/a"))
        await desk.arrived.wait()
        request.cancel()
        await asyncio.wait([request])
        desk.go_on.set()
        await desk.left.wait()
        async with asyncio.timeout(5):
            while await notes(desk.manager) != ["a"]:
                await asyncio.sleep(0.001)

    @on(fastapi, litestar)
    async def test_a_client_that_disconnects_while_streaming_undoes_no_commit(
        self, client: httpx.AsyncClient, desk: Desk
    ) -> None:
        async with client.stream("GET", "/stream/a") as response:
            assert await anext(response.aiter_bytes()) == b"a"
        desk.go_on.set()
        assert await notes(desk.manager) == ["a"]

    @pytest.mark.parametrize("build", FRAMEWORKS)
    async def test_a_client_that_disconnects_during_the_commit_does_not_stop_it(
        self, desk: Desk, build: Build
    ) -> None:
        committing = asyncio.Event()
        event.listen(desk.manager.engine.sync_engine, "commit", lambda connection: committing.set())
        received: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Message:
            if received:
                return received.pop()
            await committing.wait()
            return {"type": "http.disconnect"}

        desk.go_on.set()
        await call(build(desk), "/stream/a", receive=receive)
        assert committing.is_set()
        assert await notes(desk.manager) == ["a"]

    @pytest.mark.parametrize("insists", [False, True])
    async def test_a_cancellation_at_any_await_reports_no_success_without_a_commit(
        self, desk: Desk, wrap: Wrap, insists: bool
    ) -> None:
        texts: list[str] = []
        kept: list[str] = []

        async def answer(send: Send) -> None:
            try:
                await desk.notes.add(texts[-1])
                desk.session.add(Note(text=f"{texts[-1]} flushed"))
                await send(OK)
            except asyncio.CancelledError:
                if not insists:
                    raise
                await send(OK)
            await send(BODY)

        app = wrap(answer)

        async def request() -> None:
            texts.append(f"{len(texts):03}")
            sent: list[Message] = []
            try:
                await call(app, sent=sent)
            except UnexpectedRollbackError:
                assert insists
            finally:
                if sent:
                    kept.extend([texts[-1], f"{texts[-1]} flushed"])

        async for _ in each_cancellation(request):
            assert checked_out(desk.manager) == 0
            assert set(kept) <= set(
                await notes(desk.manager)
            )  # and a connection is there for the next
        assert kept[-1] == f"{texts[-1]} flushed"
