"""The comparison's page in a real browser: drawn, light and dark, without an error on its console."""

import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread
from report_cases import comparison, results

from flipkd_dist.comparison_report import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it to look at the page as a reader does"),
]


def look(page, folder, *options, width=1200):
    """What the browser says, and what it shows: floats [height, width, channels]."""
    image = folder / "page.png"
    disabled = [f"--disable-{name}" for name in QUIET]
    profile = ["--headless", "--no-sandbox", "--no-first-run", f"--user-data-dir={folder / 'profile'}"]
    shot = [f"--screenshot={image}", f"--window-size={width},2400", "--enable-logging=stderr", page.as_uri()]
    done = subprocess.run(
        [CHROMIUM, *profile, *disabled, *options, *shot], capture_output=True, text=True, timeout=120, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], imread(image)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    found = comparison(seeds=[1, 2])
    write(folder, found, results(found))
    return folder / "report.html"


def test_the_page_opens_without_a_console_error(page, tmp_path):
    said, seen = look(page, tmp_path)
    assert said == []
    assert seen.shape[:2] == (2400, 1200) and seen[..., :3].std() > 0.05
    assert np.median(seen[..., :3]) > 0.95


def test_the_console_would_be_heard(page, tmp_path):
    other = tmp_path / "other.html"
    other.write_text(page.read_text(encoding="utf-8").replace("</body>", "<script>fetch('x')</script></body>"))
    assert look(other, tmp_path)[0]


def test_the_page_is_dark_where_that_is_preferred(page, tmp_path):
    said, seen = look(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert said == [] and np.median(seen[..., :3]) < 0.2
