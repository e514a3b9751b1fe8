// Drives a sandbox's data plane with E2B's published client, as its users do:
//
//     node drive.mjs GATEWAY SANDBOX run|paused TOKEN
//
// It ends with status 0 if all is as the client promises.
import assert from 'node:assert/strict'
import { Sandbox, CommandExitError, NotFoundError } from 'e2b'

const [gateway, sandboxId, what, envdAccessToken] = process.argv.slice(2)
const sandbox = new Sandbox({
  sandboxId,
  sandboxUrl: gateway,
  envdVersion: '0.6.5',
  envdAccessToken,
  apiKey: 'e2b_' + '0'.repeat(40), // for the REST API, which is not called
})

if (what === 'paused') {
  assert.equal(await sandbox.isRunning(), false)
  process.exit(0)
}

const step = async (name, does) => {
  await does()
  console.log(name)
}

await step('isRunning', async () => assert.equal(await sandbox.isRunning(), true))

await step('commands.run', async () => {
  const chunks = []
  const ran = await sandbox.commands.run('echo out; echo err >&2; echo $GREETING; pwd', {
    envs: { GREETING: 'hello' }, cwd: '/usr', onStdout: (text) => chunks.push(text),
  })
  assert.deepEqual([ran.exitCode, ran.stdout, ran.stderr], [0, 'out\nhello\n/usr\n', 'err\n'])
  assert.equal(chunks.join(''), ran.stdout)
  await assert.rejects(sandbox.commands.run('exit 3'), (err) => err instanceof CommandExitError && err.exitCode === 3)
  const named = await sandbox.commands.run('id -un', { user: 'nobody' })
  assert.equal(named.stdout, 'nobody\n')
  await assert.rejects(sandbox.commands.run('sleep 100', { timeoutMs: 500 }))
})

await step('commands: list, connect, stdin, kill', async () => {
  const handle = await sandbox.commands.run('cat; sleep 100', { background: true, stdin: true })
  const listed = await sandbox.commands.list()
  assert.ok(listed.some((p) => p.pid === handle.pid))
  let seen = ''
  const other = await sandbox.commands.connect(handle.pid, { onStdout: (text) => { seen += text } })
  await sandbox.commands.sendStdin(handle.pid, 'typed\n')
  await sandbox.commands.closeStdin(handle.pid)
  while (!seen.includes('typed\n') || !handle.stdout.includes('typed\n')) {
    await new Promise((done) => setTimeout(done, 5))
  }
  assert.equal(await sandbox.commands.kill(handle.pid), true)
  await assert.rejects(handle.wait())
  await assert.rejects(other.wait())
  assert.equal(await sandbox.commands.kill(handle.pid), false)
  assert.ok(!(await sandbox.commands.list()).some((p) => p.pid === handle.pid))
})

await step('files', async () => {
  const { files } = sandbox
  const dir = '/tmp/e2b'
  const wrote = await files.write(`${dir}/a/b.txt`, 'hello')
  assert.deepEqual([wrote.path, wrote.name, wrote.type], [`${dir}/a/b.txt`, 'b.txt', 'file'])
  assert.equal(await files.read(`${dir}/a/b.txt`), 'hello')
  const bytes = new Uint8Array(1 << 20).map((_, i) => i * 7)
  await files.write(`${dir}/bytes`, bytes.buffer)
  assert.deepEqual(await files.read(`${dir}/bytes`, { format: 'bytes' }), bytes)
  await files.write([{ path: `${dir}/one`, data: '1' }, { path: `${dir}/two`, data: '22' }])
  const entries = await files.list(dir)
  assert.deepEqual(entries.map((e) => [e.name, e.type, e.size]).filter(([, type]) => type === 'file'),
    [['bytes', 'file', 1 << 20], ['one', 'file', 1], ['two', 'file', 2]])
  assert.equal(await files.makeDir(`${dir}/new`), true)
  assert.equal(await files.makeDir(`${dir}/new`), false)
  await files.rename(`${dir}/one`, `${dir}/uno`)
  assert.deepEqual([await files.exists(`${dir}/one`), await files.exists(`${dir}/uno`)], [false, true])
  await assert.rejects(files.read('/no/such/file'), NotFoundError)

  const events = []
  const watch = await files.watchDir(dir, (event) => events.push(`${event.type} ${event.name}`))
  await files.write(`${dir}/watched`, 'x')
  while (!events.includes('write watched')) await new Promise((done) => setTimeout(done, 5))
  assert.equal(events[0], 'create watched')
  await watch.stop()

  await files.remove(dir)
  assert.equal(await files.exists(dir), false)
})

await step('pty', async () => {
  let shown = ''
  const terminal = await sandbox.pty.create({
    cols: 90, rows: 20, onData: (data) => { shown += Buffer.from(data).toString() },
  })
  const type = (text) => sandbox.pty.sendInput(terminal.pid, new TextEncoder().encode(text))
  const sees = async (text) => {
    while (!shown.includes(text)) await new Promise((done) => setTimeout(done, 5))
  }
  await type('stty size\n')
  await sees('20 90')
  await sandbox.pty.resize(terminal.pid, { cols: 120, rows: 40 })
  await type('stty size\n')
  await sees('40 120')
  await type('exit 4\n')
  await assert.rejects(terminal.wait(), (err) => err.exitCode === 4)
})
