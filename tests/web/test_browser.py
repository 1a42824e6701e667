"""The page in a real browser: Debian's Chromium without a screen, driven by selenium (extra `browser`)."""

from __future__ import annotations

import io
import shutil
import time
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from web.conftest import Server, pixels, wait_for

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[browser]'")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver, Debian's packages"),
]
QUIET = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync",
)  # fmt: skip
PHONE, DESK = (390, 844), (1280, 900)


class Page:
    """What a person does with the page."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)
        wait_for(lambda: self.js("return document.body.dataset.ready"))

    def js(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def fill(self, **fields: Any) -> None:
        for name, value in fields.items():
            field = self.one(f"[name='{name}']")
            self.js("for (let p = arguments[0].parentElement; p; p = p.parentElement) p.open = true", field)
            if field.tag_name == "select":
                choose = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
                self.js(choose, field, value)
            else:
                field.clear()
                field.send_keys(str(value))

    def value(self, name: str) -> str:
        return self.one(f"[name='{name}']").get_property("value")

    @property
    def status(self) -> str:
        return self.one("#status").text

    def draw(self) -> None:
        self.one("#draw").click()

    def drawn(self) -> bytes:
        """The picture on the stage, when it is there."""
        wait_for(lambda: self.status.startswith("drawn in") or "wrong" in self.one("#status").get_attribute("class"))
        assert self.status.startswith("drawn in"), self.status
        shown, newest = self.one("#shown .looked img"), self.one("#gallery img")
        assert shown.get_attribute("src") == newest.get_attribute("src")
        return self.newest()

    def newest(self) -> bytes:
        """The bytes of the gallery's first picture, which the page may not fetch by its policy."""
        script = """
            const done = arguments[0];
            indexedDB.open("ldm").onsuccess = ({ target: { result: base } }) =>
                base.transaction("pictures").objectStore("pictures").getAll().onsuccess = async ({ target }) => {
                    base.close();
                    done([...new Uint8Array(await target.result.at(-1).png.arrayBuffer())]);
                };"""
        return bytes(self.driver.execute_async_script(script))

    def drop(self, content: bytes, onto: str, name: str = "dropped.png") -> None:
        script = """
            const [text, selector, name] = arguments;
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], name, {type: "image/png"}));
            const event = new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
            document.querySelector(selector).dispatchEvent(event);"""
        self.js(script, b64encode(content).decode(), onto, name)

    def errors(self) -> list[str]:
        said = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [message for message in said if "the server responded with a status of 4" not in message]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (*QUIET, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    from selenium.webdriver.chrome.service import Service

    made = webdriver.Chrome(options, Service(DRIVER))
    made.set_script_timeout(8)
    yield made
    made.quit()


def resize(driver: Any, size: tuple[int, int], dark: bool = False) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


@pytest.fixture
def page(driver: Any, server: Server) -> Iterator[Page]:
    resize(driver, DESK)
    driver.get(f"{server.url}/icon.svg")
    driver.execute_async_script("indexedDB.deleteDatabase('ldm').onsuccess = () => arguments[0]()")
    opened = Page(driver, server.url)
    yield opened
    assert opened.errors() == []  # of scripts, and of what the content security policy refused


def test_a_prompt_a_button_previews_and_the_picture(page: Page, server: Server):
    page.fill(prompt="a red heart", seed=7, steps=100)
    page.draw()
    seen: set[str] = set()
    script = "return [...document.querySelectorAll('#shown img.preview')].map((each) => each.src)"
    wait_for(lambda: seen.update(page.js(script)) or len(seen) > 2)
    assert "step" in page.status and page.one("#draw").get_property("disabled")
    drawn = page.drawn()
    assert drawn == server.draw(prompt="a red heart", seed=7, steps=100).body
    assert "seed 7" in page.one("figcaption").text and not page.all("#shown img.preview")
    assert len(page.all("#gallery li")) == 1


def test_everything_by_keyboard(page: Page):
    from selenium.webdriver.common.keys import Keys

    page.one("[name=prompt]").send_keys("a cat", Keys.CONTROL, Keys.ENTER)
    page.drawn()
    found = page.js("""
        const wanted = [...document.querySelectorAll("input, select, textarea, button, summary, a")];
        return wanted.filter((each) => each.tabIndex < 0 || !(each.labels?.length || each.textContent.trim()
            || each.title || each.ariaLabel)).map((each) => each.outerHTML)""")
    assert found == []


def test_cancel_and_a_closed_tab_stop_the_drawing(page: Page, driver: Any, server: Server):
    slow = {"sampler": "langevin", "steps": 100}
    for leave in (lambda: page.one("#cancel").click(), lambda: driver.get("about:blank")):
        page.fill(**slow)
        page.fill(**{"options.moves": 5000})
        page.draw()
        wait_for(lambda: not page.one("#cancel").get_property("disabled"))
        time.sleep(0.3)
        began = time.monotonic()
        leave()
        assert server.draw().status == 200 and time.monotonic() - began < 5
        if driver.current_url.startswith("http"):
            assert page.status == "cancelled" and not page.one("#draw").get_property("disabled")


def test_settings_come_back_out_of_the_gallery(page: Page):
    page.fill(prompt="first", seed=3, steps=2, sampler="heun", cfg=2)
    page.fill(**{"options.s_churn": 1.5, "cfg_interval": "0.1 inf"})
    page.draw()
    first = page.drawn()
    page.one("#reset").click()
    assert page.value("prompt") == "" and page.value("sampler") == "" == page.value("cfg")
    usual = [page.one(f"[name={name}]").get_property("placeholder") for name in ("steps", "cfg", "width")]
    assert usual == ["20", "7.5", "32"] and "dpmpp_2m" in page.one("[name=sampler] option").text
    page.fill(prompt="second", steps=2)
    page.draw()
    page.drawn()
    page.driver.refresh()  # they are kept
    wait_for(lambda: len(page.all("#gallery li")) == 2)
    page.all("#gallery button")[1].click()
    page.all("#shown button")[0].click()
    assert [page.value(name) for name in ("prompt", "seed", "sampler", "cfg")] == ["first", "3", "heun", "2"]
    page.draw()
    assert page.drawn() == first


def test_a_png_dropped_onto_the_page_brings_its_settings(page: Page, server: Server):
    made = server.draw(prompt="a dog", seed=2**60 + 1, steps=3, sampler="euler_a", spacing="karras")
    page.drop(made.body, "body")
    wait_for(lambda: "settings are in the form" in page.status)
    assert [page.value(name) for name in ("prompt", "seed", "spacing")] == ["a dog", str(2**60 + 1), "karras"]
    page.draw()
    assert page.drawn() == made.body
    page.drop(b"no picture", "body")
    wait_for(lambda: "not a PNG" in page.status)
    page.drop(noise(), "body")  # a picture that carries no settings
    wait_for(lambda: "begin from" in page.status)


def test_what_is_wrong_is_said_on_the_page(page: Page):
    page.fill(width=30)
    page.draw()
    wait_for(lambda: "multiples of 4" in page.status)
    assert "wrong" in page.one("#status").get_attribute("class")
    page.fill(width="", prompt="xyzzyx", cfg_rescale=3)
    page.js("for (const each of document.querySelectorAll('details')) each.open = false")
    page.draw()
    wait_for(lambda: page.status.startswith("cfg rescale: ") and page.one("#more").get_property("open"))
    page.fill(cfg_rescale=0, steps=2)
    page.draw()
    page.drawn()
    assert "xyzzyx" in page.one("#notices").text


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_and_can_be_read(page: Page, size: tuple[int, int], dark: bool):
    resize(page.driver, size, dark)
    page.fill(prompt="a" * 300, steps=2)  # a word without an end
    page.draw()
    page.drawn()
    page.js("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.js("return document.documentElement.scrollWidth") <= size[0]
    small = page.js("""return [...document.querySelectorAll("button, select, input:not([type=checkbox])")]
        .filter((each) => each.offsetHeight && each.offsetHeight < 30).map((each) => each.outerHTML)""")
    assert small == []
    ink, back = page.js("""
        const pixel = document.createElement("canvas").getContext("2d");
        const style = getComputedStyle(document.body);
        return [style.color, style.backgroundColor].map((each) => {
            pixel.fillStyle = each;
            pixel.fillRect(0, 0, 1, 1);
            return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3);
        })""")
    assert (np.mean(ink) > np.mean(back)) == dark
    assert contrast(ink, back) > 7


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG's ratio."""

    def luminance(colour: list[int]) -> float:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# ---------------------------------------------------------------- from a picture


def noise(width: int = 48, height: int = 40) -> bytes:
    levels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "PNG")
    return content.getvalue()


def stroke(page: Page, *points: tuple[float, float]) -> None:
    """Drag over the canvas, through points in shares of its size."""
    from selenium.webdriver import ActionChains

    cover = page.one("canvas.cover")
    wide, tall = cover.size["width"], cover.size["height"]
    mouse = ActionChains(page.driver, duration=20)
    for i, (x, y) in enumerate(points):
        mouse.move_to_element_with_offset(cover, int((x - 0.5) * wide), int((y - 0.5) * tall))
        if i == 0:
            mouse.click_and_hold()
    mouse.release().perform()


def begin(page: Page, image: bytes) -> None:
    page.js("document.getElementById('picture').open = true")
    page.drop(image, "#begin")
    wait_for(lambda: "begin from" in page.status)


def test_a_mask_is_painted_and_the_rest_stays_byte_for_byte(page: Page):
    image = noise()
    begin(page, image)
    page.fill(prompt="a hat", steps=3, seed=2)
    stroke(page, (0.3, 0.3), (0.5, 0.3), (0.5, 0.5))
    page.draw()
    drawn, before = pixels(page.drawn()), pixels(image)
    changed = (drawn != before).any(-1)
    assert changed[10:14, 15:24].mean() > 0.9  # where the brush went
    assert not changed[:4].any() and not changed[30:].any() and not changed[:, 36:].any()
    page.one("#gallery button").click()
    page.one("#reset").click()
    page.all("#shown button")[0].click()  # its settings, its picture, its mask
    wait_for(lambda: "settings are in" in page.status)
    page.draw()
    wait_for(lambda: len(page.all("#gallery li")) == 2)
    assert np.array_equal(pixels(page.drawn()), drawn)
    for button in page.all(".tools button"):
        if button.text == "Clear mask":
            button.click()
    page.draw()
    wait_for(lambda: len(page.all("#gallery li")) == 3)
    assert (pixels(page.drawn()) != before).any(-1).mean() > 0.9


def test_a_mask_is_painted_by_keyboard_and_taken_back(page: Page):
    from selenium.webdriver.common.keys import Keys

    begin(page, noise())
    page.fill(steps=2, seed=2, extend="0 8 0 0")
    cover = page.one("canvas.cover")
    painted = """const canvas = document.querySelector("canvas.cover");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return data.filter((value, i) => i % 4 === 3 && value > 0).length"""
    cover.send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.SPACE)
    once = page.js(painted)
    cover.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.SPACE)
    assert page.js(painted) > once > 0
    page.one(".tools button").click()
    assert page.js(painted) == once
    page.draw()
    assert Image.open(io.BytesIO(page.drawn())).size == (56, 40)


def test_the_picture_that_was_drawn_is_begun_from(page: Page):
    page.fill(steps=2, seed=1)
    page.draw()
    first = page.drawn()
    next(button for button in page.all("#shown button") if button.text == "Begin from it").click()
    wait_for(lambda: "begin from" in page.status)
    page.fill(strength=0)
    page.draw()
    wait_for(lambda: len(page.all("#gallery li")) == 2)
    again = pixels(page.drawn())
    assert again.shape == pixels(first).shape
    page.drop(b"no picture", "#begin", "letter.png")
    wait_for(lambda: "letter.png is no picture" in page.status)


def test_a_word_shows_where_it_is_looked_at(page: Page):
    page.fill(prompt="a red heart", steps=2)
    page.js("const box = document.querySelector('[name=attention]'); box.closest('details').open = true; box.click()")
    page.draw()
    page.drawn()
    words = page.all(".words button")
    assert [word.text for word in words] == ["a", "red", "heart"]
    words[1].click()
    wait_for(lambda: page.js("return document.querySelector('.heat')?.naturalWidth"))
    assert page.one(".heat").size == page.one(".looked img").size
    words[1].click()
    assert not page.all(".heat")
