"""The page, what it shows as JSON, and the requests that it may make.

    GET /                          the page; with ?token= it opens it, where it needs a token
    GET /page.css /page.js /plotly.js
    GET /preview.png               the newest preview of the run
    GET /api/status                where the run stands, and its last events
    GET /api/graphs?first=&last=   losses and speed of these iterations, as some thousand points
    GET /api/analysis              the table of sessions
    POST /request/save, /request/preview, /request/stop

A GET changes nothing. Everything that is shown has an ETag: what has not changed is not sent again.
"""

import gzip
import hashlib
import json
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from plotly.offline import get_plotlyjs
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from ...core.checkpoint.lock_owner import REQUESTS, RequestError, send_request
from .access import COOKIE, HEADER, Access
from .watch import Watch

# A form has a token and nothing else; shorter answers grow by gzip's head. Chosen, unmeasured.
_MAX_FORM_BYTES = 4096
_GZIP_FROM_BYTES = 1024
_HEADERS = {
    # plotly writes styles of its own into the page; scripts come from files alone.
    "content-security-policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
_REQUESTS = {f"/request/{name}": name for name in REQUESTS}
"""Paths that ask for their token themselves; it may come in a form."""

_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}


def make_app(model_dir: Path, access: Access) -> Starlette:
    """The server of one model's page.

    Args:
        model_dir: The model folder; it may be empty, or be made later.
        access: Rules of who may do what.
    """
    watch = Watch(model_dir, may_ask=access.allows)
    files = {name: _File(*_page_file(name)) for name in ("page.html", "page.css", "page.js")}
    files["plotly.js"] = _plotly()

    def page(request: Request) -> Response:
        if access.is_token(request.query_params.get("token")):
            return _opened(access)
        return files["page.html"].answer(request)

    def preview(request: Request) -> Response:
        content = watch.preview()
        if content is None:
            return Response("there is no preview yet\n", 404)
        return _answer(request, content, "image/png")

    def status(request: Request) -> Response:
        return _json(request, watch.status())

    def graphs(request: Request) -> Response:
        try:
            first, last = (_iteration(request, name) for name in ("first", "last"))
        except ValueError as error:
            return Response(f"{error}\n", 400)
        return _json(request, watch.graphs(first, last))

    def analysis(request: Request) -> Response:
        return _json(request, watch.analysis())

    def asked(name: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            if not access.allows:
                return _refusal(403, "this page is read-only; see mien monitor --allow-requests")
            if not access.is_token(request.headers.get(HEADER) or await _form_token(request)):
                return _refusal(403, "the token is missing or wrong")
            try:
                found = send_request(model_dir, name)
            except RequestError as error:
                return _refusal(409, str(error))
            return JSONResponse({"asked": name, "pid": found.pid})

        return answer

    routes = [
        Route("/", page),
        *(Route(f"/{name}", files[name].answer) for name in files if name != "page.html"),
        Route("/preview.png", preview),
        Route("/api/status", status),
        Route("/api/graphs", graphs),
        Route("/api/analysis", analysis),
        *(Route(path, asked(name), methods=["POST"]) for path, name in _REQUESTS.items()),
    ]
    guard = Middleware(BaseHTTPMiddleware, dispatch=_guard(access))
    app = Starlette(routes=routes, middleware=[guard])
    app.router.redirect_slashes = False  # what is here has one path
    return app


_Next = Callable[[Request], Awaitable[Response]]


def _guard(access: Access) -> Callable[[Request, _Next], Awaitable[Response]]:
    """What every request passes, whatever it asks for, and the headers of every answer."""

    async def dispatch(request: Request, call_next: _Next) -> Response:
        path = request.scope["path"]
        opens = path == "/" and access.is_token(request.query_params.get("token"))
        if not access.knows_host(request):
            response: Response = _refusal(
                421, "this server does not know itself by that name; use its address"
            )
        elif request.method not in ("GET", "HEAD") and not access.is_same_origin(request):
            response = _refusal(403, "requests come from the page itself")
        elif not (opens or access.may_read(request) or path in _REQUESTS):
            response = Response(
                "This page needs its token: open the address that mien monitor printed, or add "
                "?token=... to this one.\n",
                401,
                media_type="text/plain",
            )
        else:
            response = await call_next(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return dispatch


def _opened(access: Access) -> Response:
    """Leave the token out of the address bar and the history; page.js finds it in the fragment."""
    fragment = f"#token={quote(access.token or '', safe='')}" if access.allows else ""
    response = RedirectResponse(f"/{fragment}", 303)
    if access.is_open:
        response.set_cookie(
            COOKIE, access.cookie, max_age=30 * 24 * 3600, httponly=True, samesite="strict"
        )
    return response


async def _form_token(request: Request) -> str | None:
    """The token of a plain form; a body that is larger than one with a token is not read."""
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > _MAX_FORM_BYTES:
                return None
    except ClientDisconnect:  # whoever asked has left before the end
        return None
    return parse_qs(body.decode(errors="replace")).get("token", [None])[0]


def _iteration(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 12:
        raise ValueError(f"{name} must be an iteration, got {text[:20]!r}")
    return int(text)


def _refusal(code: int, why: str) -> Response:
    return JSONResponse({"error": why}, code)


class _File:
    """A file that stays the same while the server runs, compressed once."""

    def __init__(self, content: bytes, media_type: str) -> None:
        self._content, self._type = content, media_type
        self._compressed = gzip.compress(content, 6)
        self._tag = _tag(content)

    def answer(self, request: Request) -> Response:
        """The file, or that the browser has it."""
        return _tagged(request, self._tag, self._content, self._compressed, self._type)


@cache
def _plotly() -> _File:
    return _File(get_plotlyjs().encode(), _TYPES[".js"])


def _page_file(name: str) -> tuple[bytes, str]:
    path = Path(__file__).parent / name
    return path.read_bytes(), _TYPES[path.suffix]


def _json(request: Request, values: Any) -> Response:
    content = json.dumps(values, allow_nan=False, separators=(",", ":")).encode()
    return _answer(request, content, "application/json")


def _answer(request: Request, content: bytes, media_type: str) -> Response:
    is_worth_it = len(content) >= _GZIP_FROM_BYTES and media_type != "image/png"
    compressed = gzip.compress(content, 1) if is_worth_it else None
    return _tagged(request, _tag(content), content, compressed, media_type)


def _tagged(
    request: Request, tag: str, content: bytes, compressed: bytes | None, media_type: str
) -> Response:
    """The content, compressed where the browser takes it, or 304 where it has it already."""
    headers = {"etag": tag, "vary": "accept-encoding"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if compressed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        headers["content-encoding"] = "gzip"
        content = compressed
    return Response(content, headers=headers, media_type=media_type)


def _tag(content: bytes) -> str:
    return f'W/"{hashlib.sha256(content).hexdigest()[:32]}"'
