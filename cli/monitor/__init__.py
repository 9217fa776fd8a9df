"""mien monitor: a page in the browser that shows how a run goes, and may ask it for work."""

import argparse
import importlib.util
import os
import secrets
import socket
from pathlib import Path

from ...core.system.requirements import install_command
from ..lines import complain, tell

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PACKAGES = ("starlette", "uvicorn", "plotly")
# Letters of a token that a user gives: below that it can be tried out. Chosen.
_LEAST_TOKEN = 16
# Runs on one page: more curves over each other cannot be told apart. Chosen.
_MOST_RUNS = 32
_SIGNS = ("generations", "logs")
"""Folders of which a run makes at least one at its first step."""

_MOST_NAMED = 3
"""Folders without a model that are named. Chosen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "models",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="model folder, also of a new run; several are shown on one page, with their curves "
        "over each other",
    )
    parser.add_argument(
        "--host",
        default=LOOPBACK[0],
        help="address to listen on (default: %(default)s, this machine only; every other one needs "
        "a token for the page: see what is printed at the start)",
    )
    parser.add_argument(
        "--port", type=int, default=8420, help="0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-requests",
        action="store_true",
        help="whoever has the token may ask the run to save, to draw a preview and to stop",
    )
    parser.add_argument(
        "--token",
        help=f"at least {_LEAST_TOKEN} characters, which other users of the machine can see in its "
        "list of processes; left out, one is made and printed",
    )


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the page needs {' and '.join(missing)}; install with "
            f"`{install_command('mien[monitor]')}`"
        )
    # Of a shell's `runs/*`, files that lie between the folders are no reason to refuse the rest.
    models = [path for path in args.models if path.is_dir() or not path.exists()]
    if not models:
        raise ValueError(f"MODEL must be a model folder, got the file {args.models[0]}")
    if len(models) > _MOST_RUNS:
        raise ValueError(
            f"MODEL must be at most {_MOST_RUNS} folders, got {len(models)}; name fewer"
        )
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port must be 0 to 65535, got {args.port}")
    is_open = args.host not in LOOPBACK
    needs_token = is_open or args.allow_requests
    if args.token is not None:
        _check_token(args.token, needs_token)
    token = (args.token or secrets.token_urlsafe(24)) if needs_token else None

    from .access import Access
    from .connection import make_server
    from .server import make_app

    access = Access(host=args.host, token=token, is_open=is_open, allows=args.allow_requests)
    server = make_server(make_app(models, access))
    # Before the page is told of: then port 0 has its number, and an address that cannot be had is
    # refused in one line.
    with _listen(args.host, args.port) as listener:
        _tell(listener, args, models, token)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # the way to end it
            pass
    return 0


def _check_token(token: str, needs_token: bool) -> None:
    if not needs_token:
        raise ValueError(
            "--token guards nothing on this machine's own page; add --allow-requests or --host, or "
            "leave it out"
        )
    if len(token) < _LEAST_TOKEN or not all("!" <= letter <= "~" for letter in token):
        raise ValueError(
            f"--token must be at least {_LEAST_TOKEN} characters of ASCII without spaces, got "
            f"{len(token)}; leave it out to have one made"
        )


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        is_name = isinstance(error, socket.gaierror)
        why = error.strerror if is_name else os.strerror(error.errno or 0)
        raise ValueError(
            f"cannot listen on {host} port {port}: {why}; choose others with --host and --port"
        ) from error


def _may_hold_run(path: Path) -> bool:
    """Whether a folder holds a run, or is an empty one that was made for it."""
    if not path.is_dir():
        return False
    return any((path / name).is_dir() for name in _SIGNS) or not any(path.iterdir())


def _tell(
    listener: socket.socket, args: argparse.Namespace, models: list[Path], token: str | None
) -> None:
    """Print where the page is, with the token in its address: the only time that it is told."""
    from urllib.parse import quote

    port = listener.getsockname()[1]
    # An address that means all of the machine's is none that a browser can open.
    host = socket.gethostname() if args.host in ("0.0.0.0", "::") else args.host
    host = f"[{host}]" if ":" in host else host
    query = f"?token={quote(token, safe='')}" if token else ""
    what = str(models[0]) if len(models) == 1 else f"{len(models)} runs"
    tell(f"{what} at http://{host}:{port}/{query}")
    missing = [str(path) for path in models if not _may_hold_run(path)]
    if missing:
        more = ", ..." if len(missing) > _MOST_NAMED else ""
        complain(
            "monitor",
            f"no model is in {', '.join(missing[:_MOST_NAMED])}{more}: the page waits for a run "
            "there",
        )
    if args.host not in LOOPBACK:
        complain(
            "monitor",
            "the page travels unencrypted; on a network that others share, tunnel it instead: "
            f"ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}",
        )
    tell("Ctrl-C ends the page; training goes on without it.")
