"""A session with E2B's desktop client for Python, as e2e's TestDesktop runs it.

It reads E2B_API_KEY, E2B_API_URL, E2B_SANDBOX_URL and E2B_DOMAIN, as every program of the
client does.
"""
import base64
import http.client
import io
import os
import time
import urllib.parse

from e2b_desktop import Sandbox
from PIL import Image

began = time.time()


def say(what):
    print(f"{what} after {time.time() - began:.1f} s", flush=True)


def colours(picture):
    """How many colours a screenshot has, up to a thousand."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    return image.size, len(image.getcolors(image.size[0] * image.size[1]))


def connect(url):
    """A connection to the server behind the stream's URL, and the Host that names it."""
    host = urllib.parse.urlsplit(url).netloc
    agent = urllib.parse.urlsplit(os.environ["E2B_SANDBOX_URL"]).netloc
    return http.client.HTTPConnection(agent, timeout=60), host


def until(what, true, seconds=120):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, f"{what} does not come"
        time.sleep(1)


desktop = Sandbox.create(timeout=900)
say("created")
try:
    size, _ = colours(desktop.screenshot())
    assert size == (1024, 768) == desktop.get_screen_size(), size
    until("the desktop", lambda: colours(desktop.screenshot())[1] > 50, 300)
    say("a screenshot of a desktop")

    desktop.move_mouse(320, 240)
    assert desktop.get_cursor_position() == (320, 240)
    desktop.left_click()
    desktop.double_click(1000, 700)
    desktop.drag((100, 100), (200, 200))
    desktop.scroll("down", 2)

    desktop.launch("xfce4-terminal")
    until("the terminal", lambda: desktop.commands.run("xdotool search --onlyvisible --class xfce4-terminal || true").stdout.strip())
    window = desktop.get_application_windows("xfce4-terminal")[0]
    desktop.commands.run(f"xdotool windowactivate --sync {window}")
    assert desktop.get_current_window_id() == window
    assert "erminal" in desktop.get_window_title(window), desktop.get_window_title(window)
    until("the prompt", lambda: desktop.commands.run("pgrep -x bash || true").stdout.strip())
    desktop.write("echo it was typed > /tmp/typed")
    desktop.press("enter")
    until("what was typed", lambda: desktop.files.exists("/tmp/typed") and desktop.files.read("/tmp/typed") == "it was typed\n")
    assert desktop.commands.run("id -un").stdout == "user\n"
    desktop.press(["alt", "f4"])
    say("typed")

    desktop.stream.start(require_auth=True)
    key = desktop.stream.get_auth_key()
    url = desktop.stream.get_url(auth_key=key)
    connection, host = connect(url)
    connection.request("GET", urllib.parse.urlsplit(url).path, headers={"Host": host})
    answer = connection.getresponse()
    page = answer.read().decode()
    assert answer.status == 200 and "noVNC" in page, (answer.status, page[:200])
    connection.request("GET", "/websockify", headers={
        "Host": host, "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(), "Sec-WebSocket-Protocol": "binary"})
    stream = connection.sock
    text = b""
    while b"\r\n\r\n" not in text or len(text.split(b"\r\n\r\n", 1)[1]) < 14:
        piece = stream.recv(4096)
        assert piece, text
        text += piece
    head, frame = text.split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 101"), head
    assert frame[:2] == b"\x82\x0c" and frame[2:14] == b"RFB 003.008\n", frame
    connection.close()
    say("the stream's banner")
    desktop.stream.stop()
finally:
    desktop.kill()
say("all")
