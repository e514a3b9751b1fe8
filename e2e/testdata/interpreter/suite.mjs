// A session with E2B's code interpreter client. It reads E2B_API_KEY, E2B_API_URL,
// E2B_SANDBOX_URL and E2B_DOMAIN, as every program of the client does.
import assert from 'node:assert/strict'
import { Sandbox } from '@e2b/code-interpreter'

const long = { timeoutMs: 180_000, requestTimeoutMs: 180_000 }
const began = Date.now()
const say = (what) => console.log(`${what} after ${Date.now() - began} ms`)

const sandbox = await Sandbox.create({ envs: { WHO: 'sandbox' }, timeoutMs: 900_000, requestTimeoutMs: 180_000 })
say('created')
try {
  const heard = []
  let done = await sandbox.runCode('import os\nprint("hello"); x = 6*7\nx', { ...long, onStdout: (m) => heard.push(m.line) })
  say('first cell')
  assert.equal(done.text, '42')
  assert.equal(done.logs.stdout.join(''), 'hello\n')
  assert.equal(heard.join(''), 'hello\n')
  assert.equal(done.error, undefined)

  done = await sandbox.runCode('(x, os.getenv("WHO"), os.getenv("HERE"), os.getcwd())', { ...long, envs: { HERE: 'yes' } })
  assert.equal(done.text, "(42, 'sandbox', 'yes', '/home/user')")

  done = await sandbox.runCode('def f():\n    return 1/0\nf()', long)
  assert.equal(done.error.name, 'ZeroDivisionError')
  assert.equal(done.error.value, 'division by zero')
  assert.match(done.error.traceback, /Traceback/)

  done = await sandbox.runCode('import matplotlib.pyplot as plt\nplt.plot([1, 2, 3], [2, 4, 8])\nplt.title("T")\nplt.show()', long)
  say('chart')
  const picture = done.results.find((r) => r.png)
  assert.equal(Buffer.from(picture.png, 'base64').subarray(1, 4).toString(), 'PNG')
  assert.equal(picture.chart.type, 'line')
  assert.equal(picture.chart.title, 'T')
  assert.deepEqual(picture.chart.elements[0].points, [[1, 2], [2, 4], [3, 8]])

  done = await sandbox.runCode('console.log("hi"); const y = [1, 2].map((n) => n * 2); y', { ...long, language: 'js' })
  say('JavaScript')
  assert.equal(done.logs.stdout.join(''), 'hi\n')
  assert.equal(done.text, '[ 2, 4 ]')
  done = await sandbox.runCode('await Promise.resolve(y.length)', { ...long, language: 'javascript' })
  assert.equal(done.text, '2')
  const module = 'import { sep } from "node:path"\nasync function main(): Promise<string> { return "a" + sep }\nmain()'
  done = await sandbox.runCode(module, { ...long, language: 'ts' })
  say('TypeScript')
  assert.equal(done.text, 'a/')
  assert.match((await sandbox.commands.run('npm --version', long)).stdout, /^\d+\./)
  const refused = await sandbox.runCode('1', { ...long, language: 'r' }).catch((error) => error)
  assert.match(String(refused), /this template runs no r, but python/)
} finally {
  await sandbox.kill()
}
say('all')
