"""The server that E2B's code interpreter clients run code by, on port 49999.

A context is a kernel with an id, a language and a directory. Cells of one context run
one after another. A client that goes away interrupts its cell.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import uuid

import tornado.httpclient
import tornado.iostream
import tornado.web

import kernels

KEEPALIVE_SECONDS = 5
INTERRUPT_SECONDS = 10
KERNELS = {"python": kernels.PythonKernel, "javascript": kernels.NodeKernel, "typescript": kernels.TypeScriptKernel}
ALIASES = {"": "python", "python3": "python", "js": "javascript", "ts": "typescript"}

log = logging.getLogger("code-interpreter")


class Context:
    def __init__(self, language, cwd, preload=False):
        self.id = str(uuid.uuid4())
        self.language, self.cwd = language, cwd
        self.kernel = KERNELS[language](cwd, preload)
        self.lock = asyncio.Lock()
        self.sandbox = None  # whose variables the kernel has
        self.alive = False

    def view(self):
        return {"id": self.id, "language": self.language, "cwd": self.cwd}

    async def start(self):
        await self.kernel.start()
        self.alive = True

    async def stop(self):
        self.alive = False
        await self.kernel.stop()

    async def restart(self):
        await self.stop()  # ends a cell that runs
        async with self.lock:
            await self.kernel.stop()
            self.sandbox = None
            await self.start()


class Run:
    """One cell, which goes on to its end in a task of its own."""

    def __init__(self, context, code, env, sandbox, variables):
        self.context, self.code, self.env = context, code, env
        self.sandbox, self.variables = sandbox, variables
        self.outputs = asyncio.Queue(maxsize=256)
        self.left, self.began = False, False
        self.task = asyncio.create_task(self.run())

    async def put(self, out):
        if not self.left:
            await self.outputs.put(out)

    async def run(self):
        context = self.context
        try:
            async with context.lock:
                if self.left:
                    return
                self.began = True
                if not context.alive:
                    await context.kernel.stop()
                    context.sandbox = None
                    await context.start()
                if context.sandbox != self.sandbox:
                    await context.kernel.renew(await self.variables())
                    context.sandbox = self.sandbox
                async for out in context.kernel.run(self.code, self.env):
                    await self.put(out)
        except kernels.KernelDied as e:
            context.alive = False
            await self.put({"type": "error", "name": "KernelDied", "value": str(e), "traceback": ""})
        except Exception as e:
            log.exception("run a cell")
            await self.put({"type": "error", "name": type(e).__name__, "value": str(e), "traceback": ""})
        finally:
            await self.put({"type": "end_of_execution"})
            await self.put(None)

    async def leave(self):
        """The client has gone: the cell is interrupted, and its kernel ended if that does not help."""
        self.left = True
        while not self.outputs.empty():
            self.outputs.get_nowait()
        if self.task.done() or not self.began:
            return
        await self.context.kernel.interrupt()
        done, _ = await asyncio.wait([self.task], timeout=INTERRUPT_SECONDS)
        if not done:
            await self.context.stop()


class Service:
    def __init__(self, cwd, envs_url):
        self.cwd, self.envs_url = cwd, envs_url
        self.contexts = {}
        self.defaults = {}  # by language
        self.making = asyncio.Lock()
        self.leaving = set()

    async def create(self, language, cwd, preload=False):
        context = Context(language, cwd, preload)
        await context.start()
        self.contexts[context.id] = context
        return context

    async def default(self, language):
        async with self.making:
            context = self.contexts.get(self.defaults.get(language))
            if context is None:
                context = await self.create(language, self.cwd)
                self.defaults[language] = context.id
            return context

    async def remove(self, context):
        del self.contexts[context.id]
        await context.stop()

    async def close(self):
        await asyncio.gather(*(c.stop() for c in self.contexts.values()), return_exceptions=True)

    async def variables(self, token):
        """The variables of the sandbox, as envd has them."""
        headers = {"X-Access-Token": token} if token else {}
        try:
            answer = await tornado.httpclient.AsyncHTTPClient().fetch(self.envs_url, headers=headers, request_timeout=10)
            env = json.loads(answer.body)
            return {k: v for k, v in env.items() if isinstance(v, str)}
        except Exception as e:
            log.warning("ask envd for variables: %s", e)
            return {}


class Handler(tornado.web.RequestHandler):
    def initialize(self, service):
        self.service = service

    def refuse(self, status, text):
        self.set_status(status)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        raise tornado.web.Finish(text)

    def body(self):
        try:
            body = json.loads(self.request.body or b"{}")
        except ValueError:
            body = None
        if not isinstance(body, dict):
            self.refuse(400, "the body is not a JSON object")
        return body

    def field(self, body, name, kind):
        value = body.get(name)
        if value is not None and not isinstance(value, kind):
            self.refuse(400, f"{name} has the wrong type")
        return value

    def language(self, body):
        name = (self.field(body, "language", str) or "").strip().lower()
        name = ALIASES.get(name, name)
        if name not in KERNELS:
            # E2B's clients show the text of a 404 alone.
            self.refuse(404, f"this template runs no {name}, but {', '.join(KERNELS)}; "
                        f"install {name} in a template of your own, and run it as a command")
        return name

    def context(self, id):
        if id not in self.service.contexts:
            self.refuse(404, f"Context {id} not found")
        return self.service.contexts[id]


class Health(Handler):
    def get(self):
        self.finish("OK")


class Contexts(Handler):
    def get(self):
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps([c.view() for c in self.service.contexts.values()]))

    async def post(self):
        body = self.body()
        language = self.language(body)
        cwd = self.field(body, "cwd", str) or self.service.cwd
        if not os.path.isdir(cwd):
            self.refuse(400, f"{cwd} is not a directory")
        try:
            context = await self.service.create(language, cwd)
        except (OSError, kernels.KernelDied) as e:
            self.refuse(500, f"start a kernel: {e}")
        self.finish(context.view())


class OneContext(Handler):
    async def delete(self, id):
        await self.service.remove(self.context(id))
        self.set_status(204)


class Restart(Handler):
    async def post(self, id):
        await self.context(id).restart()
        self.finish({})


class Execute(Handler):
    run = None

    async def post(self):
        body = self.body()
        code, id = self.field(body, "code", str), self.field(body, "context_id", str)
        env = self.field(body, "env_vars", dict) or {}
        if code is None:
            self.refuse(400, "code is missing")
        if not all(isinstance(v, str) and "\0" not in k + v and k and "=" not in k for k, v in env.items()):
            self.refuse(400, "env_vars has a value that is not text")
        if id and body.get("language"):
            self.refuse(400, "Only one of context_id or language can be provided")
        if id:
            context = self.context(id)
        else:
            language = self.language(body)
            try:
                context = await self.service.default(language)
            except (OSError, kernels.KernelDied) as e:
                self.refuse(500, f"start a kernel: {e}")
        token = self.request.headers.get("X-Access-Token")
        self.set_header("Content-Type", "application/x-ndjson")
        if self.request.connection.stream.closed():
            return
        # A clone has another host name, or another token, than what it was cloned from.
        self.run = Run(context, code, env, (socket.gethostname(), token), lambda: self.service.variables(token))
        try:
            await self.stream(self.run.outputs)
        except tornado.iostream.StreamClosedError:
            self.on_connection_close()

    async def stream(self, outputs):
        await self.flush()
        while True:
            try:
                out = await asyncio.wait_for(outputs.get(), KEEPALIVE_SECONDS)
            except asyncio.TimeoutError:
                if self.run.left:
                    return
                out = {"type": "keepalive"}
            if out is None:
                return
            self.write(json.dumps(out) + "\n")
            await self.flush()

    def on_connection_close(self):
        if self.run and not self.run.left:
            task = asyncio.create_task(self.run.leave())
            self.service.leaving.add(task)
            task.add_done_callback(self.service.leaving.discard)


def application(service):
    with_service = {"service": service}
    return tornado.web.Application(
        [
            (r"/health", Health, with_service),
            (r"/execute", Execute, with_service),
            (r"/contexts", Contexts, with_service),
            (r"/contexts/([^/]+)", OneContext, with_service),
            (r"/contexts/([^/]+)/restart", Restart, with_service),
        ]
    )


async def main():
    flags = argparse.ArgumentParser()
    flags.add_argument("--address", default="")
    flags.add_argument("--port", type=int, default=49999)
    flags.add_argument("--cwd", default="/home/user")
    flags.add_argument("--envs-url", default="http://127.0.0.1:49983/envs")
    flags.add_argument("--preload", action="store_true", help="import what most cells use before the first of them")
    o = flags.parse_args()
    logging.basicConfig(level=logging.WARNING)

    service = Service(o.cwd, o.envs_url)
    first = await service.create("python", o.cwd, o.preload)
    service.defaults["python"] = first.id
    # A server that listens is ready.
    server = application(service).listen(o.port, address=o.address, max_body_size=64 << 20)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    server.stop()
    await service.close()


if __name__ == "__main__":
    asyncio.run(main())
