"""A headless Chromium, driven by chromedriver's HTTP interface (W3C WebDriver)."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

# Browser options that prevent downloads and look-ups: pages are files, and the machine may have no network.
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-prefers-reduced-motion",
]


class Browser:
    """One window of Chromium."""

    def __init__(self, base, session):
        self._url = f"{base}/session/{session}"

    def post(self, path, **body):
        return _ask("POST", self._url + path, body)

    def open(self, url):
        self.post("/url", url=url)

    def run(self, script):
        """Run JavaScript in the page, and return its result."""
        return self.post("/execute/sync", script=script, args=[])

    def devtools(self, command, **params):
        return self.post("/goog/cdp/execute", cmd=command, params=params)

    def window(self, width, height=900):
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def scheme(self, name):
        """Prefer ``"light"`` or ``"dark"``."""
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def complaints(self):
        """Return the warnings and errors in the console since the last call."""
        return [entry["message"] for entry in self.post("/se/log", type="browser") if entry["level"] == "SEVERE"]

    def screenshot(self, path, *, whole=True):
        if whole:
            height = self.run("return document.documentElement.scrollHeight")
            width = self.run("return window.innerWidth")
            self.window(width, min(height, 6000))
        with open(path, "wb") as file:
            file.write(base64.b64decode(_ask("GET", self._url + "/screenshot")))


def _ask(method, url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


@contextlib.contextmanager
def browser():
    """Start a browser, and end it with the block."""
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        try:
            for line in driver.stdout:
                if "successfully on port" in line:
                    break
            base = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}"
            options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = _ask("POST", base + "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            try:
                yield Browser(base, session)
            finally:
                _ask("DELETE", f"{base}/session/{session}")
        finally:
            driver.terminate()
            driver.wait(20)
            driver.stdout.close()
