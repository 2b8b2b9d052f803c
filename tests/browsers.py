"""The browser that pages are tested in, and what its absence means: here alone it is decided."""

import os
import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser():
    """Path of a browser. Without one the test is skipped, and the summary says so; with CI=true it fails."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        missing = f"no browser on this machine (one of {', '.join(BROWSERS)})"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    return found
