"""A proxy before an S3 server that a test can have refuse, answer slowly, or answer in pieces."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-authorization"}
REFUSAL = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>Please reduce your request rate.</Message></Error>"
CODES = {403: "QuotaExceeded", 500: "InternalError", 503: "SlowDown", 507: "InsufficientStorage"}


@dataclass
class Faults:
    """What the proxy does; change it at any time."""

    share: float = 0.0
    """Of the requests that meet a fault."""
    kinds: tuple[str, ...] = ("500", "503", "slow", "cut")
    """`403`, `500`, `503`, `507`: refused with that status; `slow`: answered late; `cut`: the connection is closed within the answer."""
    only: tuple[str, str] = ("", "")
    """Method and part of the path of the requests that are meant; empty: any."""
    slow_seconds: float = 2.0
    done: Counter[str] = field(default_factory=Counter)
    """How many requests met what; `passed`: nothing."""


class Proxy:
    """Passes requests on as they are (signatures hold: the host that was signed is kept), but for `faults`."""

    def __init__(self, target: str, seed: int = 0) -> None:
        self.faults = Faults()
        self.endpoint = ""
        self._target, self._random = target, random.Random(seed)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Of one request."""
        faults = self.faults
        method, part = faults.only
        meant = method in ("", request.method) and part in request.raw_path and self._random.random() < faults.share
        kind = self._random.choice(faults.kinds) if meant else "passed"
        faults.done[kind] += 1
        if kind.isdigit():
            await request.read()
            return web.Response(status=int(kind), text=REFUSAL.format(code=CODES[int(kind)]), content_type="application/xml")
        if kind == "slow":
            await asyncio.sleep(faults.slow_seconds)
        try:
            return await self._pass_on(request, cut=kind == "cut")
        except ClientError:  # the server is gone: so is the connection
            assert request.transport is not None
            request.transport.abort()
            raise

    async def _pass_on(self, request: web.Request, *, cut: bool) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        url = URL(self._target + request.raw_path, encoded=True)
        async with self._session.request(
            request.method, url, headers=headers, data=await request.read(), allow_redirects=False
        ) as found:
            kept = {name: value for name, value in found.headers.items() if name.lower() not in HOP_BY_HOP}
            response = web.StreamResponse(status=found.status, reason=found.reason, headers=kept)
            await response.prepare(request)
            if request.method != "HEAD":
                async for piece in found.content.iter_chunked(65536):
                    if cut:
                        await response.write(piece[: len(piece) // 2])
                        assert request.transport is not None
                        request.transport.abort()
                        return response
                    await response.write(piece)
            await response.write_eof()
            return response

    async def _serve(self, ready: threading.Event, done: asyncio.Event) -> None:
        connector = TCPConnector(limit=0)
        async with ClientSession(connector=connector, auto_decompress=False, timeout=ClientTimeout(total=120)) as self._session:
            app = web.Application(client_max_size=2**30)
            app.router.add_route("*", "/{path:.*}", self.answer)
            runner = web.AppRunner(app, access_log=None, auto_decompress=False)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
            ready.set()
            await done.wait()
            await runner.cleanup()


@contextlib.contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    """A proxy before `target` (`http://host:port`) while the context is open."""
    made, ready = Proxy(target), threading.Event()
    loop, done = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(made._serve(ready, done)), name="proxy", daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(20)
