"""The explorer's page in a real browser: clicks, wheel, drags and keys, as of a user. Skipped where there is none."""

import threading

import numpy as np
import pytest
from PIL import Image

from engine.explore.server import HOST, ExploreApp, listen, make_server
from tests.browser import headless_browser
from tests.explore_sessions import LIVER, make_session
from tests.sam_fakes import AFFINE, SHAPE, atlas_labels
from tests.test_engine_explore import CLASSES

pytestmark = pytest.mark.usefixtures("one_thread")

IS_IDLE = "document.getElementById('message').textContent === ''"


@pytest.fixture(scope="module")
def served():
    """A session with labels of the first scan, and its address."""
    session = make_session(labels={0: CLASSES.to_classes(atlas_labels(0))}, classes=CLASSES, is_embedded=False)
    with listen(0) as listening:
        server = make_server(ExploreApp(session), listening)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield session, f"http://{HOST}:{server.port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(served, tmp_path_factory):
    """The page, opened while the scans are still being embedded; then they are."""
    with headless_browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(served[1])
        browser.wait_for("document.getElementById('message').textContent.startsWith('Embedding: 0 of 2')")
        browser.wait_for("document.querySelectorAll('canvas').length === 6")
        for scan in served[0].scans:
            served[0].embed_scan(scan)
        browser.wait_for(IS_IDLE)
        yield browser
        assert not browser.errors


def text(browser, selector: str, number: int) -> str:
    return browser.evaluate(f"document.querySelectorAll('{selector}')[{number}].textContent")


def place_on_page(browser, number: int, index: list[float]) -> tuple[float, float]:
    """Where an index (d, h, w) of scan `number` lies on its axial canvas, CSS pixels of the page.

    The page fits the patient's box, here the whole grid, into the canvas, in true proportions.
    """
    left, top, width, height = browser.evaluate(
        f"(() => {{const box = document.querySelectorAll('canvas.axial')[{number}].getBoundingClientRect();"
        "return [box.x, box.y, box.width, box.height]})()"
    )
    scale = min(width / SHAPE[2], height / SHAPE[1])
    x = left + width / 2 + (index[2] + 0.5 - SHAPE[2] / 2) * scale
    return x, top + height / 2 + (index[1] + 0.5 - SHAPE[1] / 2) * scale


def readout(browser, number: int) -> tuple[list[float], str]:
    """World mm and the rest of what stands below a panel."""
    place, _, rest = text(browser, ".hover", number).partition(" mm")
    return [float(value) for value in place.split(",")], rest.strip()


def test_a_click_is_found_in_the_other_scan(browser):
    index = (np.linalg.inv(AFFINE) @ [*LIVER[0], 1])[:3]
    x, y = place_on_page(browser, 0, index)
    browser.mouse("mouseMoved", x, y)
    for _ in range(abs(round(index[0]) - SHAPE[0] // 2)):  # down = towards the feet
        browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-100 if index[0] > SHAPE[0] // 2 else 100)
    browser.click(x, y)
    browser.wait_for("document.querySelectorAll('.badge')[1].textContent === 'trusted'")
    browser.wait_for(IS_IDLE)
    browser.wait_for("document.querySelectorAll('.hover')[0].textContent.includes(' HU')")
    place, rest = readout(browser, 0)
    np.testing.assert_allclose(place, LIVER[0], atol=5)  # half a voxel, and a pixel
    assert "40 HU" in rest and "liver" in rest
    numbers = text(browser, ".numbers", 1)
    assert numbers.startswith("score ") and "cycle " in numbers
    found = [float(value) for value in numbers.split(" at ")[1].removesuffix(" mm").split(",")]
    moved = np.array(LIVER[1]) - LIVER[0]
    np.testing.assert_allclose(np.array(found) - place, moved, atol=5)
    assert browser.evaluate("location.hash").startswith("#scan=0&at=")


def test_the_picture_shows_scan_similarity_and_labels(browser, tmp_path):
    """Grey alone without overlays; colours with similarity in the other scan, and with labels in the first."""

    def coloured(number: int) -> float:
        """Share of an axial canvas' middle that is not grey."""
        x, y = place_on_page(browser, number, [0, 13, 17])
        browser.next_frame()
        browser.screenshot(tmp_path / "page.png")
        picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"), np.int16)
        part = picture[int(y) - 90 : int(y) + 90, int(x) - 90 : int(x) + 90]
        return float((np.ptp(part, axis=2) > 20).mean())

    for key in "slc":
        browser.press(key)
    assert coloured(0) == coloured(1) == 0
    browser.press("s")
    assert coloured(0) == 0 and coloured(1) > 0.05
    browser.press("l")
    assert coloured(0) > 0.05
    browser.press("c")


def test_wheel_window_and_zoom(browser):
    x, y = place_on_page(browser, 1, [0, 13, 17])
    browser.mouse("mouseMoved", x, y)
    before = readout(browser, 1)[0]
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-100)
    browser.next_frame()
    assert readout(browser, 1)[0][2] == pytest.approx(before[2] + 8, abs=0.1)  # a slice towards the head
    browser.press("4")
    assert text(browser, "#window", 0) == "level 400, width 1800 HU"
    browser.mouse("mousePressed", x, y, button="right", buttons=2)
    browser.mouse("mouseMoved", x + 20, y + 10, button="right", buttons=2)
    browser.mouse("mouseReleased", x + 20, y + 10, button="right")
    assert text(browser, "#window", 0) == "level 380, width 1840 HU"
    middle = readout(browser, 1)[0][0]
    browser.mouse("mouseWheel", x + 20, y + 10, deltaX=0, deltaY=-100, modifiers=2)
    browser.next_frame()
    browser.mouse("mouseMoved", x + 120, y + 10)
    after = readout(browser, 1)[0][0]
    assert middle - after > 0  # to the patient's left side, where x falls in radiologists' view
    width = browser.evaluate("document.querySelectorAll('canvas.axial')[1].getBoundingClientRect().width")
    height = browser.evaluate("document.querySelectorAll('canvas.axial')[1].getBoundingClientRect().height")
    per_mm = min(width / SHAPE[2], height / SHAPE[1]) / 8
    assert middle - after == pytest.approx(100 / per_mm / 1.15, rel=0.05)  # enlarged by 15 %
    browser.press("z")
    browser.press("1")


def test_labels_are_carried_on_demand(browser, served):
    assert browser.evaluate("document.querySelectorAll('.carry')[0].hidden")
    browser.evaluate("document.querySelectorAll('.carry')[1].click()")
    browser.wait_for("document.querySelectorAll('.carry')[1].textContent === 'Labels carried'")
    assert served[0].scans[1].labels.any()


def test_the_address_keeps_the_place(browser, served):
    """A reload finds it again, and the browser asked for nothing but this server."""
    address = browser.evaluate("location.href")
    browser.open("about:blank")
    browser.open(address)
    browser.wait_for("document.querySelectorAll('.badge')[1]?.textContent === 'trusted'")
    browser.wait_for(IS_IDLE)
    loaded = browser.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded and all(name.startswith(served[1]) for name in loaded)
