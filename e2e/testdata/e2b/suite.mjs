// Shows behaviours of E2B's API with its published client. It reads E2B_API_KEY,
// E2B_API_URL, E2B_SANDBOX_URL and E2B_DOMAIN, as every program of the client does,
// and prints one JSON object a line: {"n": number of the behaviour, "error": text}.
import assert from 'node:assert/strict'
import {
  CommandExitError, InvalidArgumentError, NotFoundError, Sandbox, SandboxError, SandboxNotFoundError, Template, TimeoutError,
} from 'e2b'

const api = process.env.E2B_API_URL
const plane = process.env.E2B_SANDBOX_URL
const key = process.env.E2B_API_KEY
const none = 'sb0123456789abcdef'
const minutes = (n) => n * 60_000
const sleep = (ms) => new Promise((done) => setTimeout(done, ms))

// limit bounds a step: a step that hangs is a step that failed.
const limit = 300_000

const show = async (n, does) => {
  let timer
  const late = new Promise((_, fail) => {
    timer = setTimeout(() => fail(new Error(`not done after ${limit} ms`)), limit)
  })
  let error = ''
  const began = Date.now()
  try {
    await Promise.race([does(), late])
  } catch (err) {
    error = String(err?.stack ?? err)
  }
  clearTimeout(timer)
  console.log(JSON.stringify({ n, error, ms: Date.now() - began }))
}

const until = async (what, ok) => {
  while (!(await ok())) await sleep(100)
  return what
}

// rest calls the REST API as a program without the client does.
const rest = async (method, path, body) => {
  const answer = await fetch(api + path, {
    method, headers: { 'X-API-KEY': key, ...(body && { 'Content-Type': 'application/json' }) }, body: body && JSON.stringify(body),
  })
  const text = await answer.text()
  return { status: answer.status, body: text && JSON.parse(text) }
}

// port calls a port of a sandbox.
const port = (sandbox, number, path, headers = {}) => fetch(plane + path, {
  headers: { 'E2b-Sandbox-Id': sandbox.sandboxId, 'E2b-Sandbox-Port': String(number), ...headers },
})

// serve starts a web server in a sandbox.
const serve = async (sandbox, number) => {
  await sandbox.commands.run(`cd /etc && exec python3 -m http.server ${number}`, { background: true })
  await until('server', async () => (await port(sandbox, number, '/hostname')).status === 200)
}

const pids = async (sandbox) => (await sandbox.commands.list()).map((p) => p.pid)
const all = async (opts) => {
  const found = []
  for (const pages = Sandbox.list(opts); pages.hasNext;) found.push(await pages.nextItems())
  return found
}

async function life() {
  const metadata = { 'a b': 'c&d=e', 'ü%20': '日本', suite: 'js' }
  const network = { allowOut: ['198.51.100.7'], denyOut: ['192.0.2.0/24'], maskRequestHost: 'mask.test:${PORT}' }
  let box
  await show(8, async () => {
    box = await Sandbox.create({ timeoutMs: minutes(30), metadata, envs: { FROM_CREATE: 'one two' }, network })
    assert.deepEqual((await box.getInfo()).metadata, metadata)
  })
  if (!box) return
  await show(31, async () => assert.ok((await Sandbox.list({ limit: 1 }).nextItems()).length === 1))
  await show(9, async () => {
    assert.equal((await box.commands.run('echo $FROM_CREATE')).stdout, 'one two\n')
    assert.equal((await box.commands.run('echo $FROM_COMMAND', { envs: { FROM_COMMAND: '2' } })).stdout, '2\n')
    assert.equal((await box.commands.run('echo $FROM_COMMAND')).stdout, '\n')
    await assert.rejects(box.commands.run('exit 3'), (err) => err instanceof CommandExitError && err.exitCode === 3)
  })
  await show(14, async () => {
    const info = await box.getInfo()
    assert.equal(info.state, 'running')
    assert.deepEqual(info.lifecycle, { onTimeout: 'kill', autoResume: false })
    assert.deepEqual(JSON.parse(JSON.stringify(info.network)), network)
    assert.equal(info.allowInternetAccess, undefined)
  })
  await show(16, async () => {
    const dashed = box.sandboxId.replace(/^sb/, 'sb-')
    for (const id of [`${box.sandboxId}-0a1b`, dashed, `${dashed}-x`]) {
      const same = await Sandbox.connect(id)
      assert.equal((await same.commands.run('echo $FROM_CREATE')).stdout, 'one two\n')
      assert.equal((await port({ sandboxId: id }, 49983, '/health')).status, 204)
    }
  })
  await show(17, async () => {
    const ahead = async () => (await box.getInfo()).endAt - Date.now()
    await box.setTimeout(minutes(10))
    assert.ok(await ahead() <= minutes(10))
    await box.setTimeout(minutes(60))
    assert.ok(await ahead() > minutes(10))
  })
  await show(18, async () => {
    const before = (await box.getInfo()).endAt
    await Sandbox.connect(box.sandboxId, { timeoutMs: 1000 })
    await box.connect({ timeoutMs: minutes(5) })
    assert.equal((await box.getInfo()).endAt.getTime(), before.getTime())
  })
  await show(19, async () => {
    const before = (await box.getInfo()).endAt
    await box.connect({ timeoutMs: minutes(120) })
    assert.ok((await box.getInfo()).endAt - before > minutes(30))
  })
  await show(33, async () => {
    const query = (metadata) => all({ query: { metadata } })
    assert.deepEqual((await query(metadata)).flat().map((s) => s.sandboxId), [box.sandboxId])
    assert.deepEqual((await query({ ...metadata, 'a b': 'c&d=f' })).flat(), [])
  })
  await show(34, async () => {
    const { startedAt } = await box.getInfo()
    const ids = async (query, order) => (await all({ query: { metadata: { suite: 'js' }, ...query }, order })).flat().map((s) => s.sandboxId)
    assert.deepEqual(await ids({ state: ['running'] }), [box.sandboxId])
    assert.deepEqual(await ids({ state: ['paused'] }), [])
    assert.deepEqual(await ids({ state: ['running', 'paused'], startedAfter: startedAt, template: 'base' }, 'asc'), [box.sandboxId])
    assert.deepEqual(await ids({ startedAfter: new Date(startedAt.getTime() + 1) }), [])
    assert.deepEqual(await ids({ template: 'no-such-template' }), [])
  })
  await show(41, async () => {
    await box.files.write('/home/user/signed file', 'signed\n')
    const url = await box.downloadUrl('/home/user/signed file', { useSignatureExpiration: 3600 })
    assert.equal(await (await fetch(url)).text(), 'signed\n')
    assert.equal((await fetch(url.replace('signed', 'other'))).status === 200, false)
    const upload = await box.uploadUrl('/home/user/uploaded')
    const form = new FormData()
    form.append('file', new Blob(['up']), 'uploaded')
    assert.equal((await fetch(upload, { method: 'POST', body: form })).status, 200)
    assert.equal(await box.files.read('/home/user/uploaded'), 'up')
    await assert.rejects(box.files.read('/no/such/file'), NotFoundError)
  })
  await show(51, async () => {
    await until('a sample', async () => (await box.getMetrics()).length > 0)
    const sample = (await box.getMetrics())[0]
    assert.ok(sample.memUsed > 0 && sample.memUsed <= sample.memTotal && sample.diskTotal > 0 && sample.cpuUsedPct >= 0, JSON.stringify(sample))
    assert.equal(sample.cpuCount, 1)
    assert.ok(sample.timestamp <= new Date())
    assert.deepEqual(await box.getMetrics({ end: new Date(Date.now() - minutes(60)) }), [])
  })
  await show(15, async () => {
    assert.equal(await box.kill(), true)
    assert.equal(await box.kill(), false)
    assert.equal(await Sandbox.kill(none), false)
  })
  await show(20, async () => {
    await assert.rejects(box.connect(), SandboxNotFoundError)
    await assert.rejects(Sandbox.connect(none), SandboxNotFoundError)
  })
}

async function pauses() {
  let box
  await show(26, async () => {
    box = await Sandbox.create({ timeoutMs: minutes(30), lifecycle: { onTimeout: 'pause' }, metadata: { pauses: 'yes' } })
    await box.setTimeout(1000)
    await until('paused', async () => (await box.getInfo()).state === 'paused')
    await box.connect({ timeoutMs: 2000 })
    await until('paused again', async () => (await box.getInfo()).state === 'paused')
    await box.connect({ timeoutMs: minutes(30) })
    assert.equal((await box.getInfo()).lifecycle.onTimeout, 'pause')
  })
  if (!box) return
  await show(23, async () => {
    const token = box.envdAccessToken
    const sleeper = await box.commands.run('sleep 3600', { background: true })
    let seen = ''
    const onData = (data) => { seen += new TextDecoder().decode(data) }
    const terminal = await box.pty.create({ cols: 80, rows: 24, onData, timeoutMs: 0 })
    terminal.wait().catch(() => {}) // the pause ends the stream, not the terminal
    await show(22, async () => {
      assert.equal(await box.pause(), true)
      assert.equal((await box.getInfo()).state, 'paused')
      assert.equal(await box.isRunning(), false)
      assert.equal(await box.pause(), false)
    })
    const again = await Sandbox.connect(box.sandboxId)
    assert.equal(again.envdAccessToken, token)
    assert.ok((await pids(again)).includes(sleeper.pid))
    const resumed = await again.pty.connect(terminal.pid, { onData, timeoutMs: 0 })
    resumed.wait().catch(() => {})
    await again.pty.sendInput(terminal.pid, new TextEncoder().encode('echo $((6*7))7\n'))
    await until('the terminal to go on', () => seen.includes('427'))
    assert.equal(await again.pty.kill(terminal.pid), true)
  })
  await show(25, async () => {
    const resumes = async () => (await rest('GET', `/events/sandboxes/${box.sandboxId}?limit=100`)).body
      .filter((e) => e.type === 'sandbox.lifecycle.resumed').length
    assert.equal(await box.pause(), true)
    const before = await resumes()
    const ten = await Promise.all(Array.from({ length: 10 }, () => Sandbox.connect(box.sandboxId)))
    assert.equal((await ten[9].commands.run('echo ok')).stdout, 'ok\n')
    assert.equal(await resumes(), before + 1)
  })
  await show(24, async () => {
    const token = box.envdAccessToken
    await box.files.write('/home/user/kept', 'kept')
    const bootID = async (b) => (await b.commands.run('cat /proc/sys/kernel/random/boot_id')).stdout
    const before = await bootID(box)
    const sleeper = await box.commands.run('sleep 3601', { background: true })
    sleeper.wait().catch(() => {})
    assert.equal(await box.pause({ keepMemory: false }), true)
    assert.equal((await rest('GET', `/sandboxes/${box.sandboxId}`)).body.pauseMode, 'filesystem')
    const again = await Sandbox.connect(box.sandboxId)
    assert.equal(again.envdAccessToken, token)
    assert.equal(await again.files.read('/home/user/kept'), 'kept')
    assert.notEqual(await bootID(again), before)
    assert.equal((await again.commands.list()).some((p) => p.cmd.includes('3601') || p.args.some((a) => a.includes('3601'))), false)
  })
  await box.kill()

  let waker
  await show(27, async () => {
    waker = await Sandbox.create({ timeoutMs: minutes(30), lifecycle: { onTimeout: 'pause', autoResume: true } })
    await serve(waker, 8000)
    assert.equal(await waker.pause(), true)
    const served = await port(waker, 8000, '/hostname')
    assert.equal(served.status, 200)
    await served.text()
    assert.equal((await waker.getInfo()).state, 'running')
  })
  if (!waker) return
  await show(28, async () => {
    assert.equal(await waker.pause(), true)
    assert.equal((await port(waker, 49983, '/files?path=/etc/hostname')).status, 403)
    assert.equal((await port(waker, 49983, '/health', { 'X-Access-Token': 'wrong' })).status, 403)
    assert.equal((await waker.getInfo()).state, 'paused')
    assert.equal((await waker.commands.run('echo awake')).stdout, 'awake\n') // the client shows its token
  })
  await waker.kill()
}

async function copies() {
  let source
  await show(39, async () => {
    source = await Sandbox.create({ timeoutMs: minutes(30), metadata: { copies: 'yes' }, envs: { KIND: 'copied' } })
    const sleeper = await source.commands.run('sleep 3602', { background: true })
    const before = await source.getInfo()
    const forks = await source.fork({ count: 3, timeoutMs: minutes(20) })
    assert.equal((await source.getInfo()).endAt.getTime(), before.endAt.getTime())
    assert.ok((await pids(source)).includes(sleeper.pid))
    assert.equal(forks.length, 3)
    for (const fork of forks) if (fork instanceof Error) throw fork
    const both = [source, ...forks]
    assert.equal(new Set(both.map((b) => b.sandboxId)).size, 4)
    assert.equal(new Set(both.map((b) => b.envdAccessToken)).size, 4)
    const drawn = []
    for (const fork of forks) {
      assert.ok((await pids(fork)).includes(sleeper.pid))
      const ran = await fork.commands.run('echo $KIND; head -c16 /dev/urandom | od -An -tx1')
      assert.ok(ran.stdout.startsWith('copied\n'))
      drawn.push(ran.stdout)
    }
    assert.equal(new Set(drawn).size, 3)
    sleeper.disconnect()
  })
  if (!source) return
  await show(32, async () => {
    const fifth = await Sandbox.create({ timeoutMs: minutes(30), metadata: { copies: 'yes' } })
    const pages = Sandbox.list({ query: { metadata: { copies: 'yes' } }, limit: 2 })
    const found = [await pages.nextItems()]
    // One that stands on the first page changes its state, another one comes.
    const other = await Promise.all([fifth.pause(), Sandbox.create({ timeoutMs: minutes(30), metadata: { copies: 'yes' } })])
    while (pages.hasNext) found.push(await pages.nextItems())
    assert.deepEqual(found.map((p) => p.length), [2, 2, 1])
    assert.equal(new Set(found.flat().map((s) => s.sandboxId)).size, 5)
    await show(40, async () => {
      await assert.rejects(fifth.fork(), (err) => err instanceof SandboxError && /resume it first/.test(err.message))
      assert.equal((await rest('POST', `/sandboxes/${fifth.sandboxId}/fork`, {})).status, 409)
      assert.equal((await rest('POST', `/sandboxes/${source.sandboxId}/fork`, { count: 0 })).status, 400)
    })
    for (const s of found.flat()) if (s.sandboxId !== source.sandboxId) await Sandbox.kill(s.sandboxId)
    await other[1].kill()
  })
  await source.kill()
}

async function snapshots() {
  const source = await Sandbox.create({ timeoutMs: minutes(30), envs: { KIND: 'copied' } })
  await show(37, async () => {
    const unnamed = await source.createSnapshot()
    assert.deepEqual(unnamed.names, [])
    assert.match(unnamed.snapshotId, /^[a-z0-9]{20}:default$/)
    assert.equal(await Sandbox.deleteSnapshot(unnamed.snapshotId), true)
  })
  await show(36, async () => {
    await source.files.write('/home/user/state', 'of the source')
    const snapshot = await source.createSnapshot({ name: 'suite-js' })
    assert.match(snapshot.snapshotId, /^[a-z0-9_-]+\/suite-js:default$/)
    const listed = await source.listSnapshots().nextItems()
    assert.deepEqual(listed.map((s) => s.snapshotId), [snapshot.snapshotId])
    await source.kill()
    const two = await Promise.all([1, 2].map(() => Sandbox.create(snapshot.snapshotId, { timeoutMs: minutes(10) })))
    for (const box of two) {
      assert.equal(await box.files.read('/home/user/state'), 'of the source')
      assert.equal((await box.commands.run('echo [$KIND]')).exitCode, 0)
    }
    await show(38, async () => { // what was made from it goes on
      assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
      assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
      assert.equal((await two[0].commands.run('echo on')).stdout, 'on\n')
    })
    for (const box of two) await box.kill()
  })
}

async function ends() {
  const box = await Sandbox.create({ timeoutMs: minutes(30), allowInternetAccess: false })
  await show(13, async () => {
    assert.equal((await box.getInfo()).allowInternetAccess, false)
    const ran = await box.commands.run('timeout 5 bash -c "exec 3<>/dev/tcp/1.1.1.1/443" 2>&1; echo $?')
    assert.notEqual(ran.stdout.trim().split('\n').at(-1), '0')
  })
  await show(43, async () => {
    const handle = await box.commands.run('sleep 3603', { background: true })
    const ended = assert.rejects(handle.wait(), TimeoutError)
    assert.equal(await Sandbox.kill(box.sandboxId), true)
    await ended
  })
  await show(17, async () => {
    const short = await Sandbox.create({ timeoutMs: minutes(1) })
    await short.setTimeout(1000)
    await until('gone', async () => {
      try {
        await short.getInfo()
        return false
      } catch (err) {
        return err instanceof SandboxNotFoundError
      }
    })
    await assert.rejects(short.commands.run('true'), SandboxNotFoundError)
    assert.equal(await short.isRunning(), false)
    await assert.rejects(short.setTimeout(1000), SandboxNotFoundError)
  })
  await show(4, async () => {
    await assert.rejects(Sandbox.create('no-such-template'), (err) => err instanceof SandboxError && /not found/.test(err.message))
  })
}

async function templates() {
  await show(49, async () => {
    assert.equal(await Template.exists('base'), true)
    assert.equal(await Template.exists('no-such-template'), false)
  })
  await show(5, async () => {
    await assert.rejects(Sandbox.create({ timeoutMs: 0 }), (err) => err instanceof SandboxError || err instanceof InvalidArgumentError)
  })
}

const parts = { life, pauses, copies, snapshots, ends, templates }
for (const name of process.argv.slice(2)) await parts[name]()
if (process.argv.length === 2) for (const part of Object.values(parts)) await part()
process.exit(0) // streams may be open
