"""The explorer's HTTP: what it answers, and what it refuses to foreign pages and to paths that lead elsewhere."""

import re
import socket
import threading
import urllib.request

import numpy as np
import pytest
from werkzeug.test import Client

from engine.explore.server import HOST, PAGES, STATIC, ExploreApp, listen, make_server
from tests.explore_sessions import LIVER, make_session
from tests.sam_fakes import SHAPE, atlas_labels
from tests.test_engine_explore import CLASSES

pytestmark = pytest.mark.usefixtures("one_thread")

LOCAL = f"http://{HOST}:8000"
AT = ",".join(map(str, LIVER[0]))


@pytest.fixture(scope="module")
def session():
    return make_session(labels={0: CLASSES.to_classes(atlas_labels(0))}, classes=CLASSES)


@pytest.fixture(scope="module")
def client(session):
    return Client(ExploreApp(session))


def get(client, path: str, **more):
    return client.get(path, base_url=LOCAL, **more)


def test_slices_are_raw_numbers(client, session):
    answer = get(client, "/scans/1/coronal/12")
    values = np.frombuffer(answer.data, "<i2").reshape(SHAPE[0], SHAPE[2])
    np.testing.assert_array_equal(values, session.plane(1, "coronal", 12))
    labels = np.frombuffer(get(client, "/scans/0/labels/axial/17").data, np.uint8).reshape(SHAPE[1:])
    np.testing.assert_array_equal(labels, session.label_plane(0, "axial", 17))


def test_a_match_and_its_map(client):
    found = get(client, f"/matches/0/1?at={AT}").json
    assert found["verdict"] == "trusted" and found["spread_mm"] is None and 0.9 < found["score"] <= 1.001
    np.testing.assert_allclose(found["point_mm"], LIVER[1], atol=2)
    assert len(get(client, f"/similarity/0/1?at={AT}").data) == np.prod(SHAPE)
    assert get(client, "/scans").json["scans"][0]["name"] == "patient0"


@pytest.mark.parametrize(
    "path, status, complaint",
    [
        ("/matches/0/1?at=0,0,900", 400, "outside of the patient"),
        ("/matches/0/1?at=1,2", 400, "expected at=x,y,z in mm, received at=1,2"),
        ("/matches/0/1?at=nan,0,0", 400, "expected at=x,y,z"),
        ("/matches/0/7?at=" + AT, 404, "no scan 7"),
        ("/scans/0/axial/999", 404, "no axial plane 999"),
        ("/scans/0/oblique/1", 404, ""),
        ("/scans/1/labels/axial/0", 409, "patient1 has no labels yet"),
    ],
)
def test_mistakes_are_answered_in_words(client, path, status, complaint):
    answer = get(client, path)
    assert answer.status_code == status and complaint in answer.json["error"]


def test_carrying_starts_by_post_alone(session, client, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(session, "carry_to", lambda number: done.set())
    assert get(client, "/scans/1/labels").status_code == 405 and not done.is_set()
    assert client.post("/scans/1/labels", base_url=LOCAL).status_code == 202 and done.wait(10)
    assert client.post("/scans/0/labels", base_url=LOCAL).status_code == 409


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1:8000"])
def test_foreign_hosts_are_refused(client, host):
    """A page of evil.example whose name is made to lead to 127.0.0.1 still sends its own name."""
    for path in ("/", "/scans", "/scans/0/axial/3"):
        answer = client.get(path, base_url=f"http://{host}")
        assert answer.status_code == 400 and set(answer.json) == {"error"}


@pytest.mark.parametrize("base", [LOCAL, "http://localhost:9999", f"http://{HOST}"])
def test_own_names_are_served_at_any_port(client, base):
    """Behind a tunnel the port is another one."""
    assert client.get("/scans", base_url=base).status_code == 200


def test_pages_of_other_origins_are_refused(client):
    foreign = {"Origin": "http://evil.example"}
    assert get(client, "/scans", headers=foreign).status_code == 403
    assert client.post("/scans/1/labels", base_url=LOCAL, headers=foreign).status_code == 403
    assert get(client, "/scans", headers={"Origin": LOCAL}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/../server.py", "/..%2fserver.py", "/static/index.html", "/server.py", "//etc/passwd", "/explore.js/.."]
)
def test_no_other_file_is_served(client, path):
    assert get(client, path).status_code == 404


def test_pages_load_nothing_from_elsewhere(client):
    assert {path.name for path in STATIC.iterdir()} == set(PAGES)
    for name in PAGES:
        answer = get(client, f"/{name}")
        assert answer.status_code == 200 and answer.mimetype == PAGES[name]
        assert not re.findall(r"(?:https?:)?//[a-z]", answer.text.replace("http://www.w3.org/2000/svg", ""))
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert answer.headers["Cache-Control"] == "no-store"
    assert get(client, "/").data == get(client, "/index.html").data


def test_the_server_listens_on_this_machine_only_and_a_taken_port_is_named(session):
    listening = listen(0)
    port = listening.getsockname()[1]
    with pytest.raises(ValueError, match=f"--port {port}: .* choose another one, or 0"):
        listen(port)
    with pytest.raises(ValueError, match="--port 70000: "):
        listen(70000)
    with listening:
        server = make_server(ExploreApp(session), listening)
    assert server.port == port and server.socket.getsockname() == (HOST, port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/scans/0/axial/3", timeout=30) as answer:
            assert len(answer.read()) == 2 * SHAPE[1] * SHAPE[2]
        with socket.create_connection((HOST, port), timeout=30) as raw:
            raw.sendall(b"GET /scans HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
