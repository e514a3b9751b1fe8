// A session with E2B's desktop client for JavaScript, as e2e's TestDesktop runs it.
// It reads E2B_API_KEY, E2B_API_URL, E2B_SANDBOX_URL and E2B_DOMAIN, as every program of the
// client does.
import assert from 'node:assert/strict'
import { Sandbox } from '@e2b/desktop'

const began = Date.now()
const say = (what) => console.log(`${what} after ${Date.now() - began} ms`)

const desktop = await Sandbox.create({ resolution: [800, 600], timeoutMs: 900_000, requestTimeoutMs: 180_000 })
say('created')
try {
  const picture = Buffer.from(await desktop.screenshot())
  assert.equal(picture.subarray(1, 4).toString(), 'PNG')
  assert.deepEqual([picture.readUInt32BE(16), picture.readUInt32BE(20)], [800, 600])
  assert.deepEqual(await desktop.getScreenSize(), { width: 800, height: 600 })
  say(`a screenshot of ${picture.length} bytes`)
  await desktop.moveMouse(300, 200)
  assert.deepEqual(await desktop.getCursorPosition(), { x: 300, y: 200 })
  await desktop.write('typed')
  await desktop.press('enter')
  await desktop.stream.start()
  assert.match(desktop.stream.getUrl(), /^https:\/\/6080-.*\/vnc\.html\?autoconnect=true&resize=scale$/)
  const answer = await fetch(process.env.E2B_SANDBOX_URL + '/vnc.html',
    { headers: { 'E2b-Sandbox-Id': desktop.sandboxId, 'E2b-Sandbox-Port': '6080' } })
  assert.equal(answer.status, 200)
  assert.match(await answer.text(), /noVNC/)
} finally {
  await desktop.kill()
}
say('all')
