"""The page of ``kvmmig watch --web`` in a real browser: a headless Chromium, where one is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from .chromium import CHROMIUM, chromium
from .test_live_page import PATIENCE, watched_machine

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
]

#: How many pixels of a canvas somebody has drawn on.
DRAWN = """(() => {
    const canvas = document.getElementById("%s");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return data.filter((value, index) => index %% 4 === 3 && value).length;
})()"""


async def test_a_browser_draws_a_migration_while_it_runs_and_its_end(tmp_path: Path) -> None:
    async with watched_machine("64MiB") as (client, _, url), chromium(tmp_path / "home") as browser:
        with trio.fail_after(PATIENCE):
            await browser.open(url)
            await browser.until('document.getElementById("state").textContent === "running"')
            assert await browser.until('!document.getElementById("none").hidden'), "nothing has begun"
            await client.execute("migrate", {"uri": "throttle+exec:cat > /dev/null?throttle.rate=20MB/s"})
            words = 'document.getElementById("words").textContent'
            await browser.until(f'{words} === "round 0, the guest runs"')
            for canvas in ("rates", "maps", "turns"):
                await browser.until(DRAWN % canvas)
            await browser.until(f'{words} === "has moved"')
            for canvas in ("rounds", "rates", "maps", "parts", "turns"):
                assert await browser.until(DRAWN % canvas) > 1000, canvas
            happened = await browser.until('document.getElementById("happenings").innerText')
            assert "the guest belongs to the other side" in happened
            await browser.picture(tmp_path / "page.png")
            assert browser.complaints == []
