"""Shows behaviours of E2B's API with its published client, sync and async.

It reads E2B_API_KEY, E2B_API_URL, E2B_SANDBOX_URL and E2B_DOMAIN, as every program of
the client does, and prints one JSON object a line: {"n": number, "error": text}.
"""
import asyncio
import json
import os
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request

from e2b import (
    AsyncSandbox, CommandExitException, NotFoundException, Sandbox, SandboxException, SandboxNotFoundException, SandboxQuery, SandboxState, Template, TemplateException,
)
from e2b.exceptions import SandboxNotRunningException, SandboxUnreachableException

PLANE = os.environ["E2B_SANDBOX_URL"]
NONE = "sb0123456789abcdef"
HOUR = 3600


def say(n, began, error=""):
    print(json.dumps({"n": n, "error": error, "ms": int(1000 * (time.time() - began))}), flush=True)


class show:
    """A block that shows a behaviour: what it raises is printed and goes no further."""

    def __init__(self, n):
        self.n = n

    def __enter__(self):
        self.began = time.time()

    def __exit__(self, kind, error, trace):
        say(self.n, self.began, "".join(traceback.format_exception(kind, error, trace)) if kind else "")
        return kind is None or issubclass(kind, Exception)


def raises(kind, does, *args, **kwargs):
    try:
        does(*args, **kwargs)
    except kind as err:
        return err
    raise AssertionError(f"no {kind.__name__}")


def until(what, ok, limit=60):
    end = time.time() + limit
    while not ok():
        assert time.time() < end, f"waited in vain for {what}"
        time.sleep(0.1)


def everything(**kwargs):
    pages, found = Sandbox.list(**kwargs), []
    while pages.has_next:
        found.append(pages.next_items())
    return found


def life():
    metadata = {"a b": "c&d=e", "ü%20": "日本", "suite": "python"}
    box = None
    with show(8):
        box = Sandbox.create(timeout=HOUR, metadata=metadata, envs={"FROM_CREATE": "one two"},
                             network={"deny_out": ["192.0.2.0/24"], "allow_public_traffic": False})
        assert box.get_info().metadata == metadata
    if box is None:
        return
    with show(9):
        assert box.commands.run("echo $FROM_CREATE").stdout == "one two\n"
        assert box.commands.run("id -un; pwd; sudo id -un").stdout == "user\n/home/user\nroot\n"
        assert box.commands.run("id -un", user="root").stdout == "root\n"
        assert box.commands.run("echo $X", envs={"X": "2"}).stdout == "2\n"
        assert box.commands.run("echo $X").stdout == "\n"
        assert raises(CommandExitException, box.commands.run, "exit 3").exit_code == 3
    with show(14):
        info = box.get_info()
        assert info.state == SandboxState.RUNNING, info
        assert info.lifecycle == {"on_timeout": "kill", "auto_resume": False}, info
        assert info.network["deny_out"] == ["192.0.2.0/24"] and info.network["allow_public_traffic"] is False, info
    with show(42):  # private traffic
        assert box.traffic_access_token
        box.commands.run("cd /etc && exec python3 -m http.server 8000", background=True)

        def get(token=None):
            request = urllib.request.Request(PLANE + "/hostname")
            request.add_header("E2b-Sandbox-Id", box.sandbox_id)
            request.add_header("E2b-Sandbox-Port", "8000")
            if token:
                request.add_header("e2b-traffic-access-token", token)
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as err:
                return err.code, err.read().decode()

        until("the server", lambda: get(box.traffic_access_token)[0] == 200)
        status, text = get()
        assert status == 403 and "is missing" in text, (status, text)
        status, text = get("wrong")
        assert status == 403 and "is invalid" in text, (status, text)
    with show(51):
        until("a sample", box.get_metrics)
        sample = box.get_metrics()[0]
        assert 0 < sample.mem_used <= sample.mem_total and sample.disk_total > 0 and sample.cpu_count == 1, sample
    with show(18):
        before = box.get_info().end_at
        Sandbox.connect(box.sandbox_id, timeout=60)
        assert box.get_info().end_at == before
    with show(19):
        Sandbox.connect(box.sandbox_id, timeout=3 * HOUR)
        assert (box.get_info().end_at - before).total_seconds() > HOUR
    with show(33):
        def ids(**query):
            return [s.sandbox_id for page in everything(query=SandboxQuery(**query)) for s in page]
        assert ids(metadata={"a b": "c&d=e", "suite": "python"}) == [box.sandbox_id]
        assert ids(metadata={"a b": "c"}) == []
    with show(34):
        started = box.get_info().started_at
        mine = {"suite": "python"}
        assert ids(metadata=mine, state=[SandboxState.RUNNING, SandboxState.PAUSED], started_after=started, template="base") == [box.sandbox_id]
        assert ids(metadata=mine, state=[SandboxState.PAUSED]) == []
        assert ids(template="no-such-template") == []
    with show(41):
        box.files.write("/home/user/signed file", "signed\n")
        with urllib.request.urlopen(box.download_url("/home/user/signed file", use_signature_expiration=3600), timeout=30) as answer:
            assert answer.read() == b"signed\n"
        raises(NotFoundException, box.files.read, "/no/such/file")
    with show(42):  # a port on which nothing listens
        request = urllib.request.Request(PLANE + "/")
        for name, value in {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "8001",
                            "e2b-traffic-access-token": box.traffic_access_token}.items():
            request.add_header(name, value)
        body = json.loads(raises(urllib.error.HTTPError, urllib.request.urlopen, request, timeout=30).read())
        assert body["code"] == 502 and body["port"] == 8001 and "port is not open" in body["message"], body
    with show(22):
        assert box.pause() is True
        assert box.pause() is False
        assert box.is_running() is False
        assert box.get_info().state == SandboxState.PAUSED
    with show(23):
        again = Sandbox.connect(box.sandbox_id)
        assert again.traffic_access_token == box.traffic_access_token
        assert again.files.read("/home/user/signed file") == "signed\n"
    with show(43):
        handle = box.commands.run("sleep 3603", background=True)
        killer = threading.Timer(0.5, lambda: Sandbox.kill(box.sandbox_id))
        killer.start()
        raises(SandboxNotRunningException, handle.wait)
        killer.join()
    with show(15):
        assert Sandbox.kill(box.sandbox_id) is False
        assert Sandbox.kill(NONE) is False
        raises((SandboxNotRunningException, SandboxNotFoundException), box.commands.run, "true")
    with show(20):
        raises(SandboxNotFoundException, Sandbox.connect, box.sandbox_id)
    with show(4):
        assert "not found" in str(raises(SandboxException, Sandbox.create, "no-such-template"))


async def abroad():
    """The same client, async."""
    began = time.time()
    try:
        box = await AsyncSandbox.create(timeout=HOUR, idempotency_key="suite-python-async")
        same = await AsyncSandbox.create(timeout=HOUR, idempotency_key="suite-python-async")
        assert same.sandbox_id == box.sandbox_id
        try:
            await AsyncSandbox.create(timeout=HOUR + 1, idempotency_key="suite-python-async")
            raise AssertionError("another request under the same key")
        except SandboxException as err:
            assert "422" in str(err) or "another request" in str(err), err
        say(10, began)
        began = time.time()
        runs = await asyncio.gather(*(box.commands.run(f"echo {i}") for i in range(4)))
        assert [r.stdout for r in runs] == [f"{i}\n" for i in range(4)]
        say(9, began)
        began = time.time()
        assert await box.pause(mode="filesystem") is True
        again = await AsyncSandbox.connect(box.sandbox_id)
        assert (await again.commands.run("echo back")).stdout == "back\n"
        say(24, began)
        assert await again.kill() is True
        began = time.time()
        assert await again.is_running() is False
        say(15, began)
    except Exception as err:
        say(10, began, "".join(traceback.format_exception(err)))


def snapshots():
    with show(38):
        box = Sandbox.create(timeout=HOUR)
        info = box.create_snapshot(name="suite-python")
        assert info.snapshot_id.endswith("/suite-python:default"), info
        assert Sandbox.delete_snapshot(info.snapshot_id) is True
        assert Sandbox.delete_snapshot(info.snapshot_id) is False
        box.kill()
    with show(49):
        box = Sandbox.create(timeout=HOUR)
        box.files.write("mark", "one")
        first = box.create_snapshot(name="suite-tags")
        assert Template.assign_tags("suite-tags:default", "kept").tags == ["kept"]
        box.files.write("mark", "two")
        box.create_snapshot(name="suite-tags")  # the next build: only default leads to it
        box.kill()
        tags = {t.tag: t.build_id for t in Template.get_tags("suite-tags")}
        assert sorted(tags) == ["default", "kept"] and len(set(tags.values())) == 2, tags
        for name, mark in (("suite-tags:kept", "one"), ("suite-tags", "two")):
            made = Sandbox.create(name, timeout=HOUR)
            assert made.files.read("mark") == mark, name
            made.kill()
        raises(TemplateException, Template.remove_tags, "suite-tags", "default")
        Template.remove_tags("suite-tags", "kept")
        raises(SandboxException, Sandbox.create, "suite-tags:kept")
        assert Sandbox.delete_snapshot(first.snapshot_id) is True


def templates():
    with show(49):
        assert Template.exists("base") is True
        assert Template.exists("no-such-template") is False


if __name__ == "__main__":
    parts = {"life": life, "abroad": lambda: asyncio.run(abroad()), "snapshots": snapshots, "templates": templates}
    for part in sys.argv[1:] or parts:
        parts[part]()
    sys.stdout.flush()
    os._exit(0)  # the async client, with no server at all, aborts half of all interpreters at their end
