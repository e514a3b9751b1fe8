"""Tests of server.py against real kernels: python3 -m unittest in this directory, with the
packages of requirements.txt, whose node is the first in PATH."""

import asyncio
import base64
import json
import os
import tempfile
import unittest

import tornado.httpclient
import tornado.httpserver
import tornado.web
import tornado.testing

import server


class Envs(tornado.web.RequestHandler):
    """Answers as envd does."""

    def get(self):
        if self.request.headers.get("X-Access-Token") != "right":
            self.send_error(401)
            return
        self.finish({"SANDBOX": "yes"})


class Test(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.dir = tempfile.TemporaryDirectory()
        self.addCleanup(self.dir.cleanup)
        self.envs_url = self.listen(tornado.web.Application([(r"/envs", Envs)])) + "/envs"
        self.service = server.Service(self.dir.name, self.envs_url)
        self.addAsyncCleanup(self.service.close)
        self.url = self.listen(server.application(self.service))

    def listen(self, application):
        sock, port = tornado.testing.bind_unused_port()
        http = tornado.httpserver.HTTPServer(application)
        http.add_socket(sock)
        self.addCleanup(http.stop)
        return f"http://127.0.0.1:{port}"

    async def call(self, method, path, body=None, headers=None):
        return await tornado.httpclient.AsyncHTTPClient().fetch(
            self.url + path, method=method, body=None if body is None else json.dumps(body), headers=headers,
            raise_error=False, request_timeout=100, allow_nonstandard_methods=True,
        )

    async def run_code(self, code, headers=None, **more):
        answer = await self.call("POST", "/execute", {"code": code, **more}, headers)
        self.assertEqual(answer.code, 200, answer.body)
        return [json.loads(line) for line in answer.body.splitlines()]

    def of(self, outs, kind):
        return [o for o in outs if o["type"] == kind]

    async def text(self, code, **more):
        outs = await self.run_code(code, **more)
        self.assertEqual(self.of(outs, "error"), [])
        return [o["text"] for o in self.of(outs, "result") if o["is_main_result"]]

    async def test_python(self):
        outs = await self.run_code("import sys\nprint('a'); print('b', file=sys.stderr)\nx = 6*7\nx")
        self.assertEqual(outs[0], {"type": "number_of_executions", "execution_count": 1})
        self.assertEqual("".join(o["text"] for o in self.of(outs, "stdout")), "a\n")
        self.assertEqual("".join(o["text"] for o in self.of(outs, "stderr")), "b\n")
        self.assertEqual(outs[-1], {"type": "end_of_execution"})
        self.assertEqual(await self.text("x + 1"), ["43"])
        self.assertEqual(await self.text("import os; os.getcwd()"), [os.path.realpath(self.dir.name)])
        self.assertEqual(await self.text("'plain'"), ["plain"])
        outs = await self.run_code("1/0")
        self.assertEqual(self.of(outs, "error")[0]["name"], "ZeroDivisionError")
        self.assertIn("division by zero", self.of(outs, "error")[0]["traceback"])
        self.assertEqual(await self.text("x"), ["42"])

    async def test_charts_and_tables(self):
        outs = await self.run_code(
            "import matplotlib.pyplot as plt\nplt.plot([1, 2], [3, 4], label='l')\nplt.xlabel('t (s)')\nplt.show()")
        picture = [o for o in self.of(outs, "result") if o.get("png")]
        self.assertEqual(len(picture), 1)
        self.assertTrue(base64.b64decode(picture[0]["png"]).startswith(b"\x89PNG"))
        chart = picture[0]["chart"]
        self.assertEqual((chart["type"], chart["x_unit"]), ("line", "s"))
        self.assertEqual(chart["elements"], [{"label": "l", "points": [[1, 3], [2, 4]]}])
        outs = await self.run_code("import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': ['x', None]})")
        table = self.of(outs, "result")[0]
        self.assertEqual(table["data"], {"a": [1, 2], "b": ["x", None]})
        self.assertIn("<table", table["html"])

    async def test_variables(self):
        get = "import os; (os.getenv('SANDBOX'), os.getenv('X'))"
        outs = await self.run_code(get, headers={"X-Access-Token": "wrong"})
        self.assertEqual(self.of(outs, "result")[0]["text"], "(None, None)")
        outs = await self.run_code(get, headers={"X-Access-Token": "right"}, env_vars={"X": "1"})
        self.assertEqual(self.of(outs, "result")[0]["text"], "('yes', '1')")
        outs = await self.run_code(get, headers={"X-Access-Token": "right"}, env_vars=None)
        self.assertEqual(self.of(outs, "result")[0]["text"], "('yes', None)")
        get = "process.env.SANDBOX + process.env.X"
        outs = await self.run_code(get, headers={"X-Access-Token": "right"}, language="js", env_vars={"X": "1"})
        self.assertEqual(self.of(outs, "result")[0]["text"], "yes1")
        self.assertEqual(await self.text("process.env.X === undefined", language="js"), ["true"])

    async def test_javascript(self):
        outs = await self.run_code("console.log('hi'); console.error('no'); const x = 5", language="javascript")
        self.assertEqual([o["text"] for o in self.of(outs, "stdout")], ["hi\n"])
        self.assertEqual([o["text"] for o in self.of(outs, "stderr")], ["no\n"])
        self.assertEqual(self.of(outs, "result"), [])
        self.assertEqual(await self.text("x + 1", language="js"), ["6"])
        self.assertEqual(await self.text("await new Promise(r => setTimeout(() => r('late'), 50))", language="js"), ["late"])
        self.assertEqual(await self.text("require('fs').existsSync('/') && process.cwd()", language="js"),
                         [os.path.realpath(self.dir.name)])
        outs = await self.run_code("null.x", language="js")
        self.assertEqual(self.of(outs, "error")[0]["name"], "TypeError")
        outs = await self.run_code("let = ;", language="js")
        self.assertEqual(self.of(outs, "error")[0]["name"], "SyntaxError")
        outs = await self.run_code("require('child_process').execSync('echo child', {stdio: 'inherit'}); 1", language="js")
        self.assertEqual([o["text"] for o in self.of(outs, "result")], ["1"])
        outs = await self.run_code("process.exit(3)", language="js")
        self.assertEqual(self.of(outs, "error")[0]["name"], "KernelDied")
        self.assertEqual(await self.text("typeof x", language="js"), ["undefined"])

    async def test_javascript_imports(self):
        os.makedirs(os.path.join(self.dir.name, "node_modules", "own"))
        for name, text in {"package.json": '{"name":"own","type":"module","exports":"./own.js"}',
                           "own.js": "export default 7; export const other = 8", }.items():
            with open(os.path.join(self.dir.name, "node_modules", "own", name), "w") as f:
                f.write(text)
        for _ in range(2):  # a cell may run again
            self.assertEqual(await self.text("import own, { other as o } from 'own'\nimport * as all from 'own';\n"
                                             "import path from 'node:path'\nimport 'own'\n[own, o, all.other, path.sep]", language="js"),
                             ["[ 7, 8, 8, '/' ]"])
        self.assertEqual(await self.text("own + o", language="js"), ["15"])
        self.assertEqual(await self.text("(await import('own')).default", language="js"), ["7"])
        outs = await self.run_code("import nothing from 'nothing'", language="js")
        self.assertIn("nothing", self.of(outs, "error")[0]["value"])
        self.assertEqual(await self.text("`import x from 'y'`", language="js"), ["import x from 'y'"])

    async def test_javascript_promises(self):
        self.assertEqual(await self.text("async function main() { return 'late' }\nmain()", language="js"), ["late"])
        self.assertEqual(await self.text("Promise.resolve()", language="js"), [])
        for code in ("Promise.reject(new RangeError('no'))", "await Promise.reject(new RangeError('no'))"):
            error, = self.of(await self.run_code(code, language="js"), "error")
            self.assertEqual((error["name"], error["value"]), ("RangeError", "no"))
            self.assertIn("RangeError: no", error["traceback"])
        await self.leave_after(1, "new Promise(() => { setInterval(() => {}, 1000) })", language="js")
        self.assertEqual(await asyncio.wait_for(self.text("1", language="js"), 20), ["1"])

    async def test_javascript_displays(self):
        outs = await self.run_code("$$.html('<b>x</b>'); $$.png('AAAA'); $$.mime({'text/plain': 'p', 'a/b': 1}); 3", language="js")
        results = self.of(outs, "result")
        self.assertEqual([r.get("html") or r.get("png") or r["text"] for r in results], ["<b>x</b>", "AAAA", "p", "3"])
        self.assertEqual(results[2]["extra"], {"a/b": 1})
        self.assertEqual([r["is_main_result"] for r in results], [False, False, False, True])
        outs = await self.run_code("({ [Symbol.for('Jupyter.display')]() { return {'text/plain': 't', 'text/html': '<i>t</i>'} } })",
                                   language="js")
        result, = self.of(outs, "result")
        self.assertEqual((result["text"], result["html"]), ("t", "<i>t</i>"))
        outs = await self.run_code("({ [Symbol.for('Jupyter.display')]() { throw new TypeError('cannot') } })", language="js")
        self.assertEqual(self.of(outs, "error")[0]["value"], "cannot")

    async def test_typescript(self):
        subtract = "function subtract(x: number, y: number): number {\n  return x - y;\n}\nsubtract(1, 2)"
        for language in ("ts", "typescript", "js"):
            self.assertEqual(await self.text(subtract, language=language), ["-1"])
        self.assertEqual(await self.text("import path from 'path'\nenum Colour { Red, Blue }\n"
                                         "const joined: string = path.join('a', 'b');\n[Colour.Blue, joined]", language="ts"),
                         ["[ 1, 'a/b' ]"])
        self.assertEqual(await self.text("joined as string", language="ts"), ["a/b"])
        self.assertEqual(await self.text("typeof joined", language="js"), ["undefined"])
        outs = await self.run_code("const x: = 1", language="ts")
        self.assertEqual(self.of(outs, "error")[0]["name"], "SyntaxError")

    async def test_other_languages(self):
        for language in ("r", "java", "bash"):
            answer = await self.call("POST", "/execute", {"code": "1", "language": language})
            self.assertEqual(answer.code, 404)
            self.assertIn(f"this template runs no {language}, but python, javascript, typescript", answer.body.decode())

    async def test_contexts(self):
        answer = await self.call("POST", "/contexts", {"language": "python", "cwd": "/"})
        context = json.loads(answer.body)
        self.assertEqual((context["language"], context["cwd"]), ("python", "/"))
        listed = json.loads((await self.call("GET", "/contexts")).body)
        self.assertEqual(listed, [context])
        id = context["id"]
        self.assertEqual(await self.text("import os; y = 1; os.getcwd()", context_id=id), ["/"])
        self.assertEqual(self.of(await self.run_code("y"), "error")[0]["name"], "NameError")
        self.assertEqual((await self.call("POST", f"/contexts/{id}/restart")).code, 200)
        self.assertEqual(self.of(await self.run_code("y", context_id=id), "error")[0]["name"], "NameError")
        self.assertLess((await self.call("DELETE", f"/contexts/{id}")).code, 300)
        for answer, status in [
            (await self.call("POST", "/execute", {"code": "1", "context_id": id}), 404),
            (await self.call("DELETE", f"/contexts/{id}"), 404),
            (await self.call("POST", "/execute", {"code": "1", "context_id": id, "language": "python"}), 400),
            (await self.call("POST", "/execute", {"code": "1", "language": "cobol"}), 404),
            (await self.call("POST", "/execute", {}), 400),
            (await self.call("POST", "/execute", {"code": "1", "env_vars": {"A": 1}}), 400),
            (await self.call("POST", "/contexts", {"cwd": "/no/such"}), 400),
            (await self.call("GET", "/health"), 200),
        ]:
            self.assertEqual(answer.code, status, answer.body)

    async def leave_after(self, seconds, code, **more):
        body = json.dumps({"code": code, **more}).encode()
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await asyncio.sleep(seconds)
        writer.close()

    async def test_leaving_interrupts(self):
        await self.text("z = 1; z")
        await self.text("var z = 1; z", language="js")
        await self.leave_after(1, "import time\ntime.sleep(1000)")
        self.assertEqual(await asyncio.wait_for(self.text("z"), 20), ["1"])
        for code in ("while (true) {}", "await new Promise(() => { setInterval(() => {}, 1000) })"):
            await self.leave_after(1, code, language="js")
            self.assertEqual(await asyncio.wait_for(self.text("z", language="js"), 20), ["1"])

    async def test_keepalive_and_death(self):
        server.KEEPALIVE_SECONDS = 0.5
        self.addCleanup(setattr, server, "KEEPALIVE_SECONDS", 5)
        outs = await self.run_code("import time; time.sleep(2)")
        self.assertGreater(len(self.of(outs, "keepalive")), 1)
        outs = await self.run_code("import os; os._exit(1)")
        self.assertEqual(self.of(outs, "error")[0]["name"], "KernelDied")
        self.assertEqual(await self.text("1 + 1"), ["2"])

    async def test_flood(self):
        outs = await self.run_code("for i in range(30000): print(i)\n'end'")
        self.assertEqual([o["text"] for o in self.of(outs, "result")], ["end"])
        text = "".join(o["text"] for o in self.of(outs, "stdout"))
        self.assertEqual(text, "".join(f"{i}\n" for i in range(30000)))


if __name__ == "__main__":
    unittest.main()
