"""Kernels: processes that run the cells of a context, one after another.

A kernel has start, stop, interrupt, and run, which yields what a cell puts out as the
objects that E2B's clients read.
"""

import asyncio
import json
import os
import pathlib
import queue
import signal
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
START_SECONDS = 120

# How the parts of Jupyter's results are named in E2B's.
FORMATS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
    "e2b/data": "data",
    "e2b/chart": "chart",
}


class KernelDied(Exception):
    """The process of a kernel ended while it ran a cell."""


def now():
    return time.time_ns()


def result(data, main):
    """The result that E2B's clients read, of the parts that Jupyter has."""
    out = {"type": "result", "is_main_result": main}
    extra = {}
    for kind, value in data.items():
        if kind in FORMATS:
            out[FORMATS[kind]] = value
        else:
            extra[kind] = value
    text = out.get("text")
    if text and len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        out["text"] = text[1:-1]
    if extra:
        out["extra"] = extra
    return out


class PythonKernel:
    """IPython, over Jupyter's protocol on Unix sockets."""

    def __init__(self, cwd, preload=False):
        self.cwd, self.preload = cwd, preload
        self.manager = self.client = self.sockets = None

    async def start(self):
        from jupyter_client import AsyncKernelManager

        self.sockets = tempfile.TemporaryDirectory(prefix="kernel-")
        self.manager = AsyncKernelManager(
            kernel_name="python3", transport="ipc", ip=self.sockets.name + "/ipc", connection_file=self.sockets.name + "/connection.json"
        )
        await self.manager.start_kernel(cwd=self.cwd)
        self.client = self.manager.client()
        self.client.start_channels()
        try:
            await self.client.wait_for_ready(timeout=START_SECONDS)
        except RuntimeError as e:
            await self.stop()
            raise KernelDied(str(e)) from e
        await self.silently(call("startup.py", "install"))
        if self.preload:
            await self.silently(call("startup.py", "preload"))

    async def stop(self):
        manager, client = self.manager, self.client
        self.manager = self.client = None
        if client:
            client.stop_channels()
        if manager:
            await manager.shutdown_kernel(now=True)
            self.sockets.cleanup()

    async def interrupt(self):
        if self.manager:
            await self.manager.interrupt_kernel()

    async def renew(self, env):
        """Sets the variables of a sandbox that this kernel has become part of."""
        await self.silently(call("startup.py", "renew", env))

    async def silently(self, code):
        async for out in self.collect(code, silent=True):
            if out["type"] == "error":
                raise KernelDied(out["value"])

    async def run(self, code, env):
        if env:
            await self.silently(call("startup.py", "push", env))
        async for out in self.collect(code):
            yield out
        if env and self.manager:
            await self.silently(call("startup.py", "pop"))

    async def collect(self, code, silent=False):
        client = self.client
        if client is None:
            raise KernelDied("the kernel has ended")
        request = client.execute(code, silent=silent, store_history=not silent, allow_stdin=False, stop_on_error=False)
        replied, waits = False, 0
        while True:
            try:
                message = await client.get_iopub_msg(timeout=0.5)
            except (queue.Empty, asyncio.TimeoutError):
                # A flood of output can cost the message that says idle; the reply to the
                # request comes another way.
                if self.client is not client or not await self.manager.is_alive():
                    raise KernelDied("the kernel has ended") from None
                replied = replied or await self.replied(client, request)
                waits += replied
                if waits > 4:
                    return
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["header"]["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return
            out = translate(kind, content)
            if out:
                yield out

    async def replied(self, client, request):
        while await client.shell_channel.msg_ready():
            reply = await client.get_shell_msg(timeout=0.5)
            if reply["parent_header"].get("msg_id") == request:
                return True
        return False


def translate(kind, content):
    if kind == "stream":
        return {"type": content["name"], "text": content["text"], "timestamp": now()}
    if kind in ("display_data", "execute_result"):
        return result(content["data"], kind == "execute_result")
    if kind == "error":
        return {"type": "error", "name": content["ename"], "value": content["evalue"], "traceback": "\n".join(content["traceback"])}
    if kind == "execute_input":
        return {"type": "number_of_executions", "execution_count": content["execution_count"]}
    return None


def call(file, function, *args):
    """Code that calls a function of a file of ours, and leaves no name behind."""
    path = str(HERE / file)
    return (
        f"__import__('runpy').run_path({path!r})[{function!r}](get_ipython(), *__import__('json').loads({json.dumps(args)!r}))"
    )


class NodeKernel:
    """node with kernel.js: requests and answers are lines of JSON, on a pipe each."""

    typescript = False

    def __init__(self, cwd, preload=False):
        self.cwd = cwd
        self.process = self.requests = self.answers = None
        self.outputs = asyncio.Queue(maxsize=256)
        self.tasks = []

    async def start(self):
        self.outputs = asyncio.Queue(maxsize=256)
        requests_read, requests_write = os.pipe()
        answers_read, answers_write = os.pipe()
        try:
            self.process = await asyncio.create_subprocess_exec(
                "node", "--expose-internals", "--disable-warning=ExperimentalWarning", str(HERE / "kernel.js"), str(requests_read), str(answers_write),
                cwd=self.cwd, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                pass_fds=(requests_read, answers_write), start_new_session=True,
            )
        except OSError:
            os.close(requests_write)
            os.close(answers_read)
            raise
        finally:
            os.close(requests_read)
            os.close(answers_write)
        self.requests = os.fdopen(requests_write, "wb", buffering=0)
        reader = asyncio.StreamReader(limit=1 << 28)
        self.answers, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(answers_read, "rb", buffering=0)
        )
        self.tasks = [
            asyncio.create_task(self.read_answers(reader)),
            asyncio.create_task(self.read_raw(self.process.stdout, "stdout")),
            asyncio.create_task(self.read_raw(self.process.stderr, "stderr")),
        ]
        try:
            first = await asyncio.wait_for(self.outputs.get(), START_SECONDS)
        except asyncio.TimeoutError:
            first = None
        if first != {"type": "ready"}:
            await self.stop()
            raise KernelDied("node did not start")

    async def stop(self):
        process, self.process = self.process, None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        await process.wait()
        self.requests.close()
        self.answers.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def interrupt(self):
        if self.process and self.process.returncode is None:
            self.process.send_signal(signal.SIGINT)

    async def renew(self, env):
        async for _ in self.ask({"renew": env}):
            pass

    async def run(self, code, env):
        async for out in self.ask({"code": code, "env": env, "typescript": self.typescript}):
            yield out

    async def ask(self, request):
        if self.process is None:
            raise KernelDied("the kernel has ended")
        while not self.outputs.empty():
            if self.outputs.get_nowait() is None:  # of what timers wrote between two cells
                raise KernelDied("the kernel has ended")
        line = json.dumps(request).encode() + b"\n"
        try:
            await asyncio.to_thread(self.requests.write, line)
        except OSError as e:
            raise KernelDied("the kernel has ended") from e
        while True:
            out = await self.outputs.get()
            if out is None:
                raise KernelDied("the kernel has ended")
            if out["type"] == "done":
                return
            if out["type"] in ("stdout", "stderr"):
                out["timestamp"] = now()
            yield out

    async def read_answers(self, reader):
        try:
            while line := await reader.readline():
                await self.outputs.put(json.loads(line))
        finally:
            await self.outputs.put(None)

    async def read_raw(self, stream, name):
        """What programs that a cell started write themselves."""
        while data := await stream.read(65536):
            await self.outputs.put({"type": name, "text": data.decode("utf-8", "replace")})


class TypeScriptKernel(NodeKernel):
    """The same; types are taken out of every cell, not only of those that are no JavaScript."""

    typescript = True
