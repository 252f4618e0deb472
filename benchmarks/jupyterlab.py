"""A JupyterLab of its own, and a notebook open in it in Chromium: for benchmarks, pictures and the browser tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from playwright import sync_api as playwright

ROOT = Path(__file__).resolve().parent.parent
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
PATIENCE = 60_000
"Milliseconds: two busy cores start a kernel slowly."
TOKEN = "browser-test"


@dataclass(kw_only=True)
class Lab:
    """An open notebook, and what its page did wrong."""

    page: playwright.Page
    errors: list[str] = field(default_factory=list)
    "Errors that no script caught."
    foreign: list[str] = field(default_factory=list)
    "Requests to anything but the server."

    def run_all(self) -> None:
        """Run all cells; this does not wait for them."""
        self.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def open(self, notebook: str) -> None:
        """Another notebook in front, its kernel idle."""
        self.page.evaluate(f"() => void window.jupyterapp.commands.execute('docmanager:open', {{path: '{notebook}'}})")
        self.page.wait_for_function(f"window.jupyterapp.shell.currentWidget?.context?.path === '{notebook}'")
        self.wait_for_kernel()

    def wait_for_kernel(self) -> None:
        self.page.wait_for_function(
            "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )


def write_notebook(path: Path, cells: Sequence[str]) -> None:
    """A notebook of code cells."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": kernel}
    )
    nbformat.write(notebook, path)


@contextmanager
def opened(folder: Path, notebook: str, chromium: str, **environment: str) -> Iterator[Lab]:
    """JupyterLab on `folder`, with the notebook open in it and its kernel idle; `environment` is its kernels' as well."""
    server = serve(folder, **environment)
    address = next(server)
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
            page = browser.new_page(viewport={"width": 1300, "height": 1500})
            page.set_default_timeout(PATIENCE)
            lab = Lab(page=page)
            page.on("pageerror", lambda error: lab.errors.append(str(error)))
            page.on("request", lambda request: _note_foreign(lab, request.url, address))
            page.goto(f"{address}lab/tree/{notebook}?token={TOKEN}")
            lab.wait_for_kernel()
            yield lab
            browser.close()
    finally:
        server.close()


def _note_foreign(lab: Lab, url: str, address: str) -> None:
    if not url.startswith((address, "data:", "blob:")):
        lab.foreign.append(url)


def serve(folder: Path, **environment: str) -> Generator[str, None, None]:
    """JupyterLab on `folder` with settings of its own; its address."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    environ |= {"JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data")}
    environ |= {"IPYTHONDIR": str(folder / "ipython"), **environment}
    settings = folder / "lab" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}), encoding="utf-8")
    options = ["--no-browser", "--port=0", "--ip=127.0.0.1", "--allow-root", f"--IdentityProvider.token={TOKEN}"]
    options += ["--LabApp.expose_app_in_browser=True", f"--LabApp.user_settings_dir={folder / 'lab'}"]
    options += [f"--LabApp.workspaces_dir={folder / 'workspaces'}", f"--ServerApp.root_dir={folder}"]
    with (folder / "lab.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environ, stdout=log, stderr=log)
    try:
        yield _address_of(server, folder)
    finally:
        server.terminate()
        server.wait(30)


def _address_of(server: subprocess.Popen[bytes], folder: Path) -> str:
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline and server.poll() is None:
        for info in (folder / "runtime").glob("jpserver-*.json"):
            if text := info.read_text(encoding="utf-8"):  # empty while the server writes it
                return str(json.loads(text)["url"])
        time.sleep(0.1)
    raise AssertionError("JupyterLab did not start:\n" + (folder / "lab.log").read_text(encoding="utf-8")[-2000:])
