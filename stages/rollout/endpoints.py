"""Endpoints of an engine for the trainer: a plugin of `vllm serve` (entry point `vllm.endpoint_plugins`, name `phimini`).

| endpoint                     | answer                                                                            |
|------------------------------|-----------------------------------------------------------------------------------|
| POST /phimini/generate       | one completion: token ids in; ids, log-probs and spans of weight versions out     |
| POST /phimini/lease          | a token: only its trainer may sync, until DELETE or LEASE_S of silence            |
| POST /phimini/sync/PHASE     | the workers' answers to a phase of a weight sync, to pause, resume, abort or reset |
| GET  /phimini/ping           | seconds since the model's process answered, which vLLM's /health does not know    |
| GET  /phimini/state          | model, settings, process ids, version                                             |

Nothing is sampled before the first whole sync, nor from mixed weights. `Gate` wants the key for every path, passes those
of a list and no other, and opens vLLM's own endpoints that sample only while the weights are whole. The engine itself
stays paused as well while they are not.
"""

import asyncio
import json
import os
import secrets
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from phimini.parallel.ranks.process import end_with_parent
from phimini.stages.rollout.engine import check_prompts, check_temperature
from phimini.stages.rollout.messages import (
    LEASE_HEADER,
    LOGPROBS,
    PREFIX,
    TOKENS,
    Answer,
    Ask,
    Lease,
    Pulse,
    State,
    as_bytes,
    encode,
)
from phimini.stages.rollout.vllm_settings import (
    DESCRIPTION,
    OWNER,
    logprobs_of,
    spans_of,
    vllm_params,
    vllm_version,
)

READ = {("GET", path) for path in ("/health", "/load", "/metrics", "/version", "/v1/models")}
SAMPLE = {
    ("POST", path)
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
}
BEAT_S = 1.0
LEASE_S = 30.0
"""a lease ends after this silence of its trainer"""
REQUEST_S = 10.0
"""a connection that has not sent a request's head after this long is closed"""
MAX_BYTES = 64 << 20
"""largest body of a request"""


class Refused(Exception):
    """A request that is answered with `status` and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Policy:
    """The engine's weights: their version, the trainer that may change them, and a sync under way."""

    def __init__(self, folder: str) -> None:
        self.described: dict[str, Any] = json.loads(Path(folder, DESCRIPTION).read_text())
        self.version: int | None = None
        """of the weights that may be sampled from; None: none, or mixed"""
        self.before: int | None = None
        """version of before the sync under way"""
        self.holder: str | None = None
        self.token = ""
        self.renewed = 0.0
        self.heard = time.monotonic()
        """when the model's process last answered"""
        self.lock = asyncio.Lock()
        """one phase at a time, in the order of arrival"""
        self.running: set[str] = set()
        """ids of the completions under way"""
        self.tasks: list[asyncio.Task] = []
        self.engine: Any
        self.workers: list[int]

    async def start(self, engine: Any, app_state: Any) -> None:
        """Take the engine and pause it until the first sync."""
        self.engine = engine
        self.workers = await self.guard()
        if sys.platform == "linux":
            unname_shared_memory(self.workers)
        await engine.pause_generation()
        self.tasks = [
            asyncio.create_task(action(app_state)) for action in (self.beat, close_silent_strangers)
        ]

    async def guard(self) -> list[int]:
        return await self.engine.collective_rpc("phimini_guard", args=(os.getpid(),))

    async def beat(self, app_state: Any) -> None:
        """Ask the model's process for a sign of life every second; end the server when it is dead."""
        while True:
            try:
                await self.guard()
            except EngineDeadError as error:
                print(f"phimini: the vLLM engine died: {error}", file=sys.stderr, flush=True)
                app_state.server.should_exit = True
                return
            self.heard = time.monotonic()
            if self.before is not None and self.heard - self.renewed > LEASE_S:
                async with self.lock:
                    await self.abort()  # its trainer is gone
            await asyncio.sleep(BEAT_S)

    # --- the lease ----------------------------------------------------------------------------------
    async def lease(self, request: Request) -> Response:
        """Give the lease to a trainer, with an engine that is not in the middle of anything."""
        asked = await decoded(request, Lease)
        silent = time.monotonic() - self.renewed
        if self.holder not in (None, asked.holder) and silent < LEASE_S:
            raise Refused(
                409,
                f"the engine has another trainer, of the run {self.holder}, heard {silent:.0f} s ago",
            )
        self.holder, self.token = asked.holder, secrets.token_urlsafe()
        self.renewed = time.monotonic()
        token = self.token
        async with self.lock:
            await self.engine.abort(list(self.running))
            if self.version is None or self.before is not None or await self.engine.is_paused():
                await self.abort()
        return Response(encode(token))

    async def release(self, request: Request) -> Response:
        """End the lease of a trainer that is done."""
        self.renew(request)
        self.holder, self.token = None, ""
        return Response()

    def renew(self, request: Request) -> None:
        """Renew the lease of the request's trainer. Raises Refused for any other."""
        given = request.headers.get(LEASE_HEADER, "")
        if not self.token or not secrets.compare_digest(given.encode(), self.token.encode()):
            raise Refused(409, f"another trainer has the engine's lease: the run {self.holder}")
        self.renewed = time.monotonic()

    async def ping(self, request: Request) -> Response:
        self.renew(request)
        if self.engine.errored:
            raise Refused(503, "the model's process is dead")
        return Response(encode(Pulse(time.monotonic() - self.heard, self.version)))

    async def state(self, request: Request) -> Response:
        state = State(
            vllm=vllm_version(),
            config=self.described["config"],
            settings=self.described["settings"],
            pid=os.getpid(),
            workers=self.workers,
            version=self.version,
            holder=self.holder,
        )
        return Response(encode(state))

    # --- sampling -----------------------------------------------------------------------------------
    async def generate(self, request: Request) -> Response:
        """Return one completion. During a sync it waits in the engine, which is paused."""
        ask = await decoded(request, Ask)
        config, settings = self.described["config"], self.described["settings"]
        prompt = np.frombuffer(ask.prompt, TOKENS).tolist()
        check_temperature("temperature", ask.params.temperature)
        limits = config["vocab_size"], settings["max_model_len"]
        check_prompts([prompt], [ask.seed], ask.params, *limits)
        params = vllm_params(ask.params, ask.seed)
        if self.version is None and self.before is None:
            raise Refused(409, "the engine has no whole set of weights; a sync comes first")
        answer = await self.completion(request, prompt, params)
        return Response(status_code=499) if answer is None else Response(encode(answer))

    @with_cancellation
    async def completion(self, request: Request, prompt: list[int], params: Any) -> Answer:
        """Return the completion of a prompt; a client that hangs up ends it."""
        id, done = uuid.uuid4().hex, None
        self.running.add(id)
        try:
            async for part in self.engine.generate({"prompt_token_ids": prompt}, params, id):
                done = part
        finally:
            self.running.discard(id)
        assert done is not None, "a request ends with an output"
        output = done.outputs[0]
        reason = output.finish_reason
        return Answer(
            tokens=as_bytes(output.token_ids, TOKENS),
            logprobs=as_bytes(logprobs_of(output), LOGPROBS),
            finish_reason=reason if reason in ("stop", "abort") else "length",
            versions=[(s.version, s.start, s.end) for s in spans_of(output)],
        )

    # --- weight sync --------------------------------------------------------------------------------
    async def sync(self, request: Request) -> Response:
        """Run one phase for the trainer that has the lease; return a row per worker."""
        info = await decoded(request, dict[str, Any])
        async with self.lock:
            self.renew(request)
            workers = await self.phase(request.path_params["phase"], info)
            self.renewed = time.monotonic()
        return Response(encode(workers))

    async def phase(self, phase: str, info: dict[str, Any]) -> list[dict[str, Any]]:
        if phase == "pause":
            mode = info.get("mode", "keep")
            if mode not in ("keep", "wait", "abort"):
                raise Refused(400, f"mode: expected keep, wait or abort, got {mode!r}")
            await self.engine.pause_generation(mode=mode, clear_cache=True)
        elif phase == "resume":
            if self.version is None:
                raise Refused(409, "the engine has no whole set of weights; a sync comes first")
            await self.engine.resume_generation()
        elif phase == "reset":
            await self.reset_prefix_cache()
        elif phase == "abort":
            return await self.abort()
        elif phase in ("init", "start", "update", "finish"):
            return await self.transfer(phase, info)
        else:
            raise Refused(404, f"unknown phase {phase!r}")
        return []

    async def transfer(self, phase: str, info: dict[str, Any]) -> list[dict[str, Any]]:
        """Run a phase in which weights change."""
        if phase == "start":
            if not await self.engine.is_paused():
                raise Refused(409, "start: the engine is not paused")
            if self.version is not None:
                self.before, self.version = self.version, None
        workers = await self.engine.collective_rpc("phimini_sync", args=(phase, info))
        if phase == "finish" and not any("error" in worker for worker in workers):
            version = int(info["version"])
            await self.engine.update_weight_version(str(version))
            await self.reset_prefix_cache()
            self.version, self.before = version, None
        return workers

    async def abort(self) -> list[dict[str, Any]]:
        """End a sync that failed: go on with the old weights if they are whole, else stay paused and end all requests."""
        workers = await self.engine.collective_rpc("phimini_sync", args=("abort", {}))
        if self.version is None and all(worker["whole"] for worker in workers):
            self.version = self.before
        self.before = None
        if self.version is None:
            await self.engine.pause_generation(mode="abort")
        else:
            await self.engine.resume_generation()
        return workers

    async def reset_prefix_cache(self) -> None:
        if not await self.engine.reset_prefix_cache():
            raise Refused(409, "the prefix cache is in use and was not reset")


class Gate(AuthenticationMiddleware):
    """The key for every path, a list of paths, and no sampling without a whole set of weights."""

    def __init__(self, app: ASGIApp, tokens: list[str], policy: Policy) -> None:
        super().__init__(app, tokens)
        self.policy = policy

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "lifespan":
            return self.app(scope, receive, send)
        request = scope.get("method", scope["type"]), scope["path"]
        if not self.verify_token(Headers(scope=scope)):
            return refusal(scope, 401, "wrong or no key: expected Authorization: Bearer KEY")(scope, receive, send)  # fmt: skip
        if request in SAMPLE:
            if self.policy.version is None:
                return refusal(scope, 409, "the policy's weights are not whole")(
                    scope, receive, send
                )
        elif request not in READ and not request[1].startswith(f"{PREFIX}/"):
            return refusal(scope, 404, "not an endpoint of this engine")(scope, receive, send)
        return self.app(scope, receive, send)


def refusal(scope: Scope, status: int, sentence: str) -> ASGIApp:
    """Return the answer to a request whose body is not read; a web socket is closed."""
    if scope["type"] == "websocket":
        return WebSocketClose(code=1008, reason=sentence)
    return PlainTextResponse(sentence, status, {"connection": "close"})


async def decoded(request: Request, kind: Any) -> Any:
    """Return a request's message. Raises msgspec.ValidationError, or Refused for one that is too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise Refused(413, f"expected at most {MAX_BYTES} bytes")
    return msgspec.msgpack.decode(body, type=kind)


def answering(handler: Callable[[Request], Awaitable[Response]]) -> Any:
    """Return the endpoint of a handler: its errors are answers, so that no request ends more than itself."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except Refused as error:
            return PlainTextResponse(str(error), error.status)
        except (msgspec.DecodeError, VLLMClientError, ValueError, OverflowError) as error:
            return PlainTextResponse(str(error), 400)
        except (EngineDeadError, EngineGenerateError) as error:
            return PlainTextResponse(f"the engine failed: {error}", 503)

    return endpoint


async def close_silent_strangers(app_state: Any) -> None:
    """Close connections that send no request, which uvicorn keeps for ever."""
    seen: set[Any] = set()
    while True:
        await asyncio.sleep(REQUEST_S)
        connections = app_state.server.server_state.connections
        silent = {c for c in connections if getattr(c, "cycle", c) is None}
        for connection in silent & seen:
            connection.transport.close()
        seen = silent - seen


def unname_shared_memory(workers: list[int]) -> None:
    """On a CPU, workers of one engine meet in shared memory that vLLM 0.32 never removes; they have it mapped by now."""
    for pid in workers:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            path = line[line.find("/") :]
            if path.startswith("/dev/shm/") and "-cpushm_" in path:
                Path(path).unlink(missing_ok=True)


class Endpoints:
    """The plugin that vLLM loads."""

    name = "phimini"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the endpoints and the gate. Raises ValueError without a key."""
        args = app.state.args
        tokens = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
        if not tokens:
            raise ValueError("phimini: an engine needs a key: set VLLM_API_KEY, or --api-key")
        self.policy = policy = Policy(args.model)
        for method, path, handler in (
            ("POST", "generate", policy.generate),
            ("POST", "lease", policy.lease),
            ("DELETE", "lease", policy.release),
            ("POST", "sync/{phase}", policy.sync),
            ("GET", "ping", policy.ping),
            ("GET", "state", policy.state),
        ):
            app.router.routes.append(
                Route(f"{PREFIX}/{path}", answering(handler), methods=[method])
            )
        app.add_middleware(Gate, tokens=tokens, policy=policy)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Take the engine. An engine that a trainer started ends with it, even if it was killed meanwhile."""
        owner = os.environ.get(OWNER)
        if owner is not None:
            end_with_parent()
            if os.getppid() != int(owner):
                sys.exit("phimini: the trainer of this engine is gone")
        await self.policy.start(engine_client, state)
