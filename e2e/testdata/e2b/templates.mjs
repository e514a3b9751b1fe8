// Builds templates with E2B's published client. It is told in argv: what to build from, as
// the name of a template, and prints one JSON object a line, as suite.mjs does.
import assert from 'node:assert/strict'
import { mkdtempSync, mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { BuildError, Sandbox, Template, TemplateError, waitForPort } from 'e2b'

const [from] = process.argv.slice(2)
const plane = process.env.E2B_SANDBOX_URL
const context = mkdtempSync(join(tmpdir(), 'wrenn-templates-'))
mkdirSync(join(context, 'app', 'sub'), { recursive: true })
writeFileSync(join(context, 'app', 'index.html'), 'built\n')
writeFileSync(join(context, 'app', 'sub', 'run.sh'), '#!/bin/sh\necho ran\n', { mode: 0o755 })
symlinkSync('sub', join(context, 'app', 'link'))

const show = async (n, does) => {
  let error = ''
  const began = Date.now()
  try {
    await does()
  } catch (err) {
    error = String(err?.stack ?? err)
  }
  console.log(JSON.stringify({ n, error, ms: Date.now() - began }))
}

// build returns what the client was told about a build.
const build = async (template, name, options = {}) => {
  const lines = []
  const info = await Template.build(template, name, { cpuCount: 1, memoryMB: 512, onBuildLogs: (e) => lines.push(e.message), ...options })
  return { info, log: lines.join('\n') }
}

const app = (copy = {}) => Template({ fileContextPath: context }).fromTemplate(from)
  .setEnvs({ GREETING: 'hello' })
  .copy('app', '/srv/app', { user: 'root', ...copy })
  .runCmd('echo "$GREETING $(id -un)" > /srv/app/who', { user: 'root' })
  .runCmd('test "$(id -un)" = user && mkdir -p /home/user/work')
  .setWorkdir('/home/user/work')
  .setStartCmd('python3 -m http.server 8000 --directory /srv/app', waitForPort(8000))

await show(45, async () => {
  const { info, log } = await build(app(), 'built-js:v1')
  assert.ok(log.includes("Uploaded 'app'") && log.includes('Build finished'), log)
  assert.ok(await Template.exists('built-js') && await Template.exists('built-js:v1') && !await Template.exists('built-js:v2'))
  assert.equal((await Template.getBuildStatus(info)).status, 'ready')
})

let box
await show(48, async () => { // the first request to a new sandbox is answered by the program of its template
  box = await Sandbox.create('built-js:v1', { timeoutMs: 900_000 })
  const answer = await fetch(plane + '/who', { headers: { 'E2b-Sandbox-Id': box.sandboxId, 'E2b-Sandbox-Port': '8000' } })
  assert.equal(answer.status, 200)
  assert.equal(await answer.text(), 'hello root\n')
})
await show(45, async () => {
  const seen = await box.commands.run('pwd; id -un; echo "[$GREETING]"; cat /srv/app/index.html; /srv/app/link/run.sh; stat -c %U /srv/app/index.html')
  assert.equal(seen.stdout, '/home/user/work\nuser\n[]\nbuilt\nran\nroot\n')
})
await show(50, async () => {
  await assert.rejects(fetch(process.env.E2B_API_URL + '/templates/built-js', {
    method: 'DELETE', headers: { 'X-API-KEY': process.env.E2B_API_KEY },
  }).then(async (r) => assert.equal(r.status, 204, `${r.status} ${await r.text()}`)), /400 .*running sandboxes using it/)
  await box.kill()
})
await show(46, async () => {
  const { log } = await build(app(), 'built-js:v2')
  assert.ok(log.includes("Skipping upload of 'app', already cached") && log.includes('CACHED'), log)
  const again = await build(app({ forceUpload: true }), 'built-js:v3')
  assert.ok(again.log.includes("Uploaded 'app'"), again.log)
})
await show(47, async () => {
  const failing = Template().fromTemplate(from)
    .setEnvs({ GREETING: 'hello' })
    .runCmd('echo before; echo to-stderr >&2; exit 7') // the line that the error names
  const lines = []
  const err = await Template.build(failing, 'failing-js', { cpuCount: 1, memoryMB: 512, onBuildLogs: (e) => lines.push(e.message) })
    .then(() => assert.fail('it was built'), (e) => e)
  assert.ok(err instanceof BuildError && /exit status 7/.test(err.message), String(err))
  const source = readFileSync(fileURLToPath(import.meta.url), 'utf8').split('\n')
  const line = source.findIndex((text) => text.endsWith('// the line that the error names')) + 1
  assert.ok(err.stack.includes(`templates.mjs:${line}:`), err.stack)
  const log = lines.join('\n')
  assert.ok(/stdout\]: before/.test(log) && /stderr\]: to-stderr/.test(log) && /Build failed/.test(log), log)
  assert.equal(new Set(lines).size, lines.length, `an entry came twice:\n${log}`)
  await assert.rejects(Sandbox.create('failing-js'), /not ready/)
})
await show(49, async () => {
  const tags = async () => Object.fromEntries((await Template.getTags('built-js')).map((t) => [t.tag, t.buildId]))
  const before = await tags()
  assert.deepEqual(Object.keys(before).sort(), ['v1', 'v2', 'v3'])
  await Template.assignTags('built-js:v1', ['stable', 'default'])
  assert.equal((await tags()).stable, before.v1)
  await Template.removeTags('built-js', 'v3')
  assert.equal((await tags()).v3, undefined)
  await assert.rejects(Template.removeTags('built-js', 'default'), TemplateError)
})
rmSync(context, { recursive: true })
