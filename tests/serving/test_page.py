"""The page, in a browser: type once, see every model's answer as it is written."""

import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request

import pytest
from websockets.sync.client import connect

from tests.serving.servers import serving


class Browser:
    """A page of chromium, by the DevTools protocol."""

    def __init__(self, socket):
        self._socket, self._numbers = socket, itertools.count(1)
        self.messages = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (got := json.loads(self._socket.recv(30))).get("id") != number:
            if got["method"] in ("Runtime.consoleAPICalled", "Log.entryAdded", "Runtime.exceptionThrown"):
                self.messages.append(got["params"])
        return got["result"]

    def read(self, code):
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)["result"]
        return result.get("value")

    def wait(self, code):
        deadline = time.monotonic() + 30
        while not self.read(code):
            assert time.monotonic() < deadline, self.read("document.body.innerText")
        return self.read(code)

    def enter(self, text):
        self.call("Input.insertText", text=text)
        self.press("Enter", 13, text="\r")

    def press(self, key, code, **more):
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)


@contextlib.contextmanager
def browsing(directory):
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command += [f"--user-data-dir={directory}", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if "DevTools listening" in line)
        address = line.split("ws://")[1].split("/")[0]
        pages = json.load(urllib.request.urlopen(f"http://{address}/json"))
        with connect(next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait()


ANSWERS = "[...document.querySelectorAll('section')].map(s => [...s.querySelectorAll('.turn')].at(-1).textContent)"
IDLE = "document.getElementById('stop').hidden"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_person_compares_a_model_and_its_adapters(tmp_path):
    with serving(adapters=["poet", "terse"], api_key="secret") as server, browsing(tmp_path) as page:
        page.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
        page.wait("document.activeElement.id === 'key'")
        page.enter("secret")
        page.wait("document.querySelectorAll('section').length === 3 && document.activeElement.id === 'prompt'")
        page.enter("hi")
        page.wait(f"{IDLE} && document.querySelectorAll('.turn').length === 6")
        assert page.read(ANSWERS) == [f"{name} <user: hi\nassistant:>" for name in ("base", "poet", "terse")]
        page.enter("falter")  # the prompt has the focus still
        page.wait(f"{ANSWERS}.every(text => text.startsWith('la la'))")  # before they have ended
        page.press("Escape", 27)
        page.wait(f"{IDLE} && {ANSWERS}.every(text => text === 'stopped')")
        page.read("document.querySelector('#models input').click()")
        page.enter("smile")
        page.wait(f"{IDLE} && {ANSWERS}.every(text => text === 'é 😀 ü')")
        assert page.read("[...document.querySelectorAll('h2')].map(h => h.firstChild.textContent)") == ["poet", "terse"]
        assert page.messages == []
        assert not page.read("fetch('http://127.0.0.1:9/').then(() => true, () => false)")
        assert "Content Security Policy" in json.dumps(page.messages)
