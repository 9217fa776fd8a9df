"""The page, what it shows as JSON, and the requests that it may make.

    GET /                          the page; with ?token= it opens it, where it needs a token
    GET /page.css /page.js /preview.js /graphs.js /log.js /plotly.js
    GET /preview.png               the newest preview of the run
    GET /sheet.png                 the last sheet that it was asked for
    GET /kept.png?at=&other=&mask=&enlarge=   a kept preview, or the swaps of two
    GET /api/status                where the run stands, and its last events
    GET /api/graphs?first=&last=&series=      these series, and the speed, as some thousand points
    GET /api/analysis              the table of sessions
    GET /series.csv?first=&last=   all series of these iterations
    GET /api/settings              the settings that may be changed while training goes on
    POST /request/save, /request/preview, /request/stop
    POST /request/sheet, /request/pause, /request/resume
    POST /request/change           with change=section.key=value in its form

Of several runs, ?run= says which: 0 is the first that was named. A GET changes nothing. Everything
that is shown has an ETag: what has not changed is not sent again.
"""

import gzip
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from plotly.offline import get_plotlyjs
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from ...core.checkpoint.left_request import send_left_request
from ...core.checkpoint.lock_owner import REQUESTS, LockOwner, RequestError, send_request
from ...core.checkpoint.model_folder import PREVIEW
from ...core.checkpoint.model_folder import SHEET as SHEET_FILE
from ...core.config.live import MAIN_SETTINGS, live_settings, parse_change
from ...core.console.requests import PAUSE, RESUME, SHEET
from .access import COOKIE, HEADER, Access
from .pictures import Drawing
from .watch import Watch

# A form has a token and a change at most; shorter answers grow by gzip's head. Chosen, unmeasured.
_MAX_FORM_BYTES = 4096
_GZIP_FROM_BYTES = 1024
_MOST_SERIES = 64
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
_CHANGE = "change"
_REQUESTS = {f"/request/{name}": name for name in (*REQUESTS, PAUSE, RESUME, SHEET, _CHANGE)}
"""Paths that ask for their token themselves; it may come in a form."""

_PAGE_FILES = ("page.html", "page.css", "page.js", "preview.js", "graphs.js", "log.js")
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}


def make_app(model_dirs: Sequence[Path], access: Access) -> Starlette:
    """The server of the page of one run, or of several.

    Args:
        model_dirs: The model folders; each may be empty, or be made later.
        access: Rules of who may do what.
    """
    files = {name: _File(*_page_file(name)) for name in _PAGE_FILES}
    files["plotly.js"] = _plotly()

    def page(request: Request) -> Response:
        if access.is_token(request.query_params.get("token")):
            return _opened(access)
        return files["page.html"].answer(request)

    runs = Runs(model_dirs, access)
    # Once: their texts are read from source files, which is not safe in several threads at a time.
    settings = _settings()
    routes = [
        Route("/", page),
        *(Route(f"/{name}", files[name].answer) for name in files if name != "page.html"),
        *(Route(f"/{name}", runs.picture(name)) for name in (PREVIEW, SHEET_FILE)),
        Route("/kept.png", runs.kept),
        Route("/api/status", runs.status),
        Route("/api/graphs", runs.graphs),
        Route("/api/analysis", runs.analysis),
        Route("/api/settings", lambda request: _json(request, settings)),
        Route("/series.csv", runs.table),
        *(Route(path, runs.asked(name), methods=["POST"]) for path, name in _REQUESTS.items()),
    ]
    guard = Middleware(BaseHTTPMiddleware, dispatch=_guard(access))
    app = Starlette(routes=routes, middleware=[guard])
    app.router.redirect_slashes = False  # what is here has one path
    return app


class Runs:
    """What the page shows of the runs, and may ask of them.

    Args:
        model_dirs: The model folders.
        access: Rules of who may do what.
    """

    def __init__(self, model_dirs: Sequence[Path], access: Access) -> None:
        self._access, self._model_dirs = access, model_dirs
        self._watches = [Watch(path, may_ask=access.allows) for path in model_dirs]

    def status(self, request: Request) -> Response:
        """State of a run, and the names of all."""
        values = self._watch(request).status()
        return _json(request, values | {"runs": [watch.name for watch in self._watches]})

    def picture(self, name: str) -> Callable[[Request], Response]:
        """The answer to who wants the picture of this name as the run drew it last."""

        def answer(request: Request) -> Response:
            content = self._watch(request).picture(name)
            if content is None:
                return Response(f"there is no {name} yet\n", 404)
            return _answer(request, content, "image/png")

        return answer

    def kept(self, request: Request) -> Response:
        """A drawing of kept previews, made only where the browser lacks it."""
        pictures = self._watch(request).pictures
        words = request.query_params
        at = _iteration(request, "at")
        if at is None:
            raise HTTPException(400, "at must be the iteration of a kept preview")
        try:
            drawing = Drawing(
                at,
                _iteration(request, "other"),
                words.get("mask", "off"),
                words.get("enlarge", "lanczos"),
            )
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        try:
            tag = _tag(pictures.tag(drawing).encode())
            if tag in request.headers.get("if-none-match", ""):
                return _tagged(request, tag, b"", None, "image/png")
            return _tagged(request, tag, pictures.draw(drawing), None, "image/png")
        except ValueError as error:
            raise HTTPException(404, str(error)) from error

    def graphs(self, request: Request) -> Response:
        """Losses and speed of some iterations."""
        first, last = _iteration(request, "first"), _iteration(request, "last")
        return _json(request, self._watch(request).graphs(first, last, _series(request)))

    def analysis(self, request: Request) -> Response:
        """The table of sessions."""
        return _json(request, self._watch(request).analysis())

    def table(self, request: Request) -> Response:
        """All series of some iterations, as a file of comma-separated values."""
        first, last = _iteration(request, "first"), _iteration(request, "last")
        content = self._watch(request).table(first, last).encode()
        return _answer(request, content, "text/csv; charset=utf-8")

    def asked(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        """The answer to a request of this name."""

        async def answer(request: Request) -> Response:
            access = self._access
            if not access.allows:
                return _refusal(403, "this page is read-only; see mien monitor --allow-requests")
            form = await _form(request)
            if not access.is_token(request.headers.get(HEADER) or form.get("token")):
                return _refusal(403, "the token is missing or wrong")
            try:
                model_dir = self._model_dirs[self._number(request)]
                found = _send(model_dir, name, form.get("change", ""))
            except ValueError as error:
                return _refusal(400, f"nothing was changed: {error}")
            except RequestError as error:
                return _refusal(409, str(error))
            return JSONResponse({"asked": name, "pid": found.pid})

        return answer

    def _watch(self, request: Request) -> Watch:
        return self._watches[self._number(request)]

    def _number(self, request: Request) -> int:
        """Number of the run that is meant: of this server's own, never a path."""
        text = request.query_params.get("run", "0")
        most = len(self._watches) - 1
        if not text.isascii() or not text.isdecimal() or len(text) > 4 or int(text) > most:
            raise HTTPException(400, f"run must be a number from 0 to {most}, got {text[:20]!r}")
        return int(text)


def _send(model_dir: Path, name: str, change: str) -> LockOwner:
    """Send a request; ValueError where it is a change that cannot be, RequestError as others."""
    if name in REQUESTS:
        return send_request(model_dir, name)
    if name != _CHANGE:
        return send_left_request(model_dir, name)
    parse_change(change)
    return send_left_request(model_dir, change)


def _settings() -> list[dict[str, str]]:
    """The settings that may be changed, those that are changed most first."""
    specs = live_settings()
    names = [*MAIN_SETTINGS, *(name for name in specs if name not in MAIN_SETTINGS)]
    return [{"name": name, "values": specs[name].values, "doc": specs[name].doc} for name in names]


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


async def _form(request: Request) -> dict[str, str]:
    """The fields of a plain form; of a body that is larger than any of the page's none."""
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > _MAX_FORM_BYTES:
                return {}
    except ClientDisconnect:  # whoever asked has left before the end
        return {}
    return {name: values[0] for name, values in parse_qs(body.decode(errors="replace")).items()}


def _iteration(request: Request, name: str) -> int | None:
    """An iteration of the query; None where it has none of the name."""
    text = request.query_params.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 12:
        raise HTTPException(400, f"{name} must be an iteration, got {text[:20]!r}")
    return int(text)


def _series(request: Request) -> list[str] | None:
    """The series that are wanted; only those that were logged will be found."""
    words = request.query_params.get("series")
    # Split no further than that, so that a long query costs no more than a short one.
    return None if words is None else words.split(",", _MOST_SERIES)[:_MOST_SERIES]


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
    # JSON has no NaN: a browser would refuse the whole answer.
    content = json.dumps(values, allow_nan=False, separators=(",", ":")).encode()
    return _answer(request, content, "application/json")


def _answer(request: Request, content: bytes, media_type: str) -> Response:
    # A PNG is compressed already.
    is_worth_it = len(content) >= _GZIP_FROM_BYTES and media_type != "image/png"
    # At the lowest level: an answer is compressed anew each time, a `_File` once.
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
    # A weak tag, since the same content goes out compressed or as it is.
    return f'W/"{hashlib.sha256(content).hexdigest()[:32]}"'
