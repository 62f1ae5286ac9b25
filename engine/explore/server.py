"""The web server of a session: pages, slices, matches and labels, for a browser on this machine and nobody else.

It listens on 127.0.0.1. A page from elsewhere must not read patients' images: requests under another host name (DNS
rebinding) and requests sent by pages of another origin are refused, browsers are told to load nothing from elsewhere
and to keep no copies. The files it serves are those of `PAGES`; images come from the session's memory alone.
"""

import json
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import numpy as np
from werkzeug.exceptions import BadRequest, Conflict, Forbidden, HTTPException, NotFound
from werkzeug.routing import Map, Rule
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler
from werkzeug.serving import make_server as make_wsgi_server
from werkzeug.wrappers import Request, Response

from datasets.ct.planes import PLANES
from engine.explore.session import NotReadyError, Session

HOST = "127.0.0.1"
STATIC = Path(__file__).parent / "static"
PAGES = {
    "index.html": "text/html",
    "icon.svg": "image/svg+xml",
    "explore.css": "text/css",
    "explore.js": "text/javascript",
    "panel.js": "text/javascript",
    "view.js": "text/javascript",
    "mouse.js": "text/javascript",
    "paint.js": "text/javascript",
    "geometry.js": "text/javascript",
    "client.js": "text/javascript",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
ANY_PLANE = f"<any({', '.join(PLANES)}):plane>"
ROUTES = (
    Rule("/", methods=["GET"], endpoint="page", defaults={"name": "index.html"}),
    Rule(f"/<any({', '.join(map(repr, PAGES))}):name>", methods=["GET"], endpoint="page"),
    Rule("/scans", methods=["GET"], endpoint="scans"),
    Rule(f"/scans/<int:scan>/{ANY_PLANE}/<int:index>", methods=["GET"], endpoint="plane"),
    Rule(f"/scans/<int:scan>/labels/{ANY_PLANE}/<int:index>", methods=["GET"], endpoint="label_plane"),
    Rule("/scans/<int:scan>/labels", methods=["POST"], endpoint="carry"),
    Rule("/matches/<int:query>/<int:key>", methods=["GET"], endpoint="match"),
    Rule("/similarity/<int:query>/<int:key>", methods=["GET"], endpoint="similarity"),
)


class LocalRequest(Request):
    """A request to this machine under one of its own names; `host` raises for every other."""

    trusted_hosts = [HOST, "localhost"]


class ExploreApp:
    """The WSGI application.

    GET /scans                           `Session.describe` as JSON
    GET /scans/N/PLANE/INDEX             int16 HU, little-endian, rows from the top
    GET /scans/N/labels/PLANE/INDEX      uint8 channels, likewise
    POST /scans/N/labels                 start carrying labels to scan N; 202
    GET /matches/QUERY/KEY?at=X,Y,Z      the point in the key, as JSON
    GET /similarity/QUERY/KEY?at=X,Y,Z   uint8, the whole map of the key

    Mistakes are answered with a status of 400 or more and {"error": text}.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        # No redirects: a path is right or wrong.
        self._routes = Map([rule.empty() for rule in ROUTES], redirect_defaults=False, merge_slashes=False)

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        request = LocalRequest(environ)
        try:
            response = self._answer(request)
        except HTTPException as error:
            response = as_json({"error": error.description}, error.code)
        response.headers.update(HEADERS)
        return response(environ, start_response)

    def _answer(self, request: Request) -> Response:
        refuse_foreign(request)
        endpoint, values = self._routes.bind_to_environ(request.environ).match()
        try:
            return getattr(self, endpoint)(request, **values)
        except NotReadyError as error:
            raise Conflict(str(error)) from error
        except ValueError as error:
            raise BadRequest(str(error)) from error
        except IndexError as error:
            raise NotFound(str(error)) from error

    def page(self, request: Request, name: str) -> Response:
        return Response((STATIC / name).read_bytes(), mimetype=PAGES[name])

    def scans(self, request: Request) -> Response:
        return as_json(self.session.describe())

    def plane(self, request: Request, scan: int, plane: str, index: int) -> Response:
        return as_bytes(self.session.plane(scan, plane, index).astype("<i2", copy=False))

    def label_plane(self, request: Request, scan: int, plane: str, index: int) -> Response:
        return as_bytes(self.session.label_plane(scan, plane, index))

    def carry(self, request: Request, scan: int) -> Response:
        if self.session.claim_carrying(scan):
            Thread(target=self.session.carry_to, args=(scan,), daemon=True).start()
        return as_json({}, 202)

    def match(self, request: Request, query: int, key: int) -> Response:
        found = self.session.match(query, key, point_of(request))
        point_mm, score, cycle_mm, spread_mm, verdict = (values[0] for values in found)
        numbers = {"score": score, "cycle_mm": cycle_mm, "spread_mm": spread_mm}
        known = {name: float(value) if np.isfinite(value) else None for name, value in numbers.items()}
        place = point_mm.tolist() if np.isfinite(point_mm).all() else None
        return as_json({"point_mm": place, "verdict": str(verdict)} | known)

    def similarity(self, request: Request, query: int, key: int) -> Response:
        return as_bytes(self.session.similarity(query, key, point_of(request)))


def refuse_foreign(request: Request) -> None:
    """Check that a request came to this machine by its own name, and from a page of this server or from no page.

    Raises:
        SecurityError: (400) another Host.
        Forbidden: (403) another Origin.
    """
    host, origin = request.host, request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Forbidden("requests from other pages are refused")


def point_of(request: Request) -> list[float]:
    """World mm of the query's `at=x,y,z`.

    Raises:
        BadRequest: it is not three finite numbers.
    """
    text = request.args.get("at", "")
    try:
        point_mm = [float(part) for part in text.split(",")]
    except ValueError:
        point_mm = []
    if len(point_mm) != 3 or not np.isfinite(point_mm).all():
        raise BadRequest(f"expected at=x,y,z in mm, received at={text}")
    return point_mm


def as_json(content: dict, status: int = 200) -> Response:
    return Response(json.dumps(content), status, mimetype="application/json")


def as_bytes(array: np.ndarray) -> Response:
    return Response(array.tobytes(), mimetype="application/octet-stream")


class QuietHandler(WSGIRequestHandler):
    """Prints errors, and no line for each request."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def listen(port: int) -> socket.socket:
    """A socket that listens on this machine.

    Args:
        port: 0 = any that is free.

    Raises:
        ValueError: the port is taken, not allowed, or no port.
    """
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {port}: {error}; choose another one, or 0 for any that is free") from error


def make_server(app: ExploreApp, listening: socket.socket) -> BaseWSGIServer:
    """A server on a socket of `listen`, of which it keeps a copy; a thread answers each request."""
    return make_wsgi_server(HOST, 0, app, threaded=True, request_handler=QuietHandler, fd=listening.fileno())
