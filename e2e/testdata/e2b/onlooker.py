"""Does with E2B's published client what it is told on standard input, one call a line,
again and again until the agent lives to answer it; prints what came of each as JSON.

    create KEY | pause ID | connect ID | run ID COMMAND
"""
import json
import sys
import time

import httpx
from e2b import Sandbox, SandboxException
from e2b.exceptions import ServiceBusyException

boxes = {}


def create(key):
    box = Sandbox.create(timeout=3600, metadata={"key": key}, envs={"KEY": key}, idempotency_key=key)
    boxes[box.sandbox_id] = box
    return box.sandbox_id


def pause(id):
    return Sandbox.pause(id)


def connect(id):
    boxes[id] = Sandbox.connect(id, timeout=3600)
    return boxes[id]._envd_access_token


def run(id, *command):
    return boxes[id].commands.run(" ".join(command)).stdout


def passes(err):
    """Whether an error is of an agent that is gone, or has just come back."""
    return isinstance(err, (httpx.TransportError, ServiceBusyException)) or "idempotency_in_progress" in str(err) or "in progress" in str(err)


def until_answered(call, args):
    end = time.time() + 180
    while True:
        try:
            return {"answer": call(*args)}
        except (httpx.HTTPError, SandboxException, ServiceBusyException) as err:
            if not passes(err) or time.time() > end:
                return {"error": repr(err)}
            time.sleep(0.05)


for line in sys.stdin:
    name, *args = line.split()
    print(json.dumps(until_answered({"create": create, "pause": pause, "connect": connect, "run": run}[name], args)), flush=True)
