// Makes a sandbox with E2B's published client and runs a command in it, once for each
// line on standard input; prints how many milliseconds that took until the sandbox was
// there, and until the command had ended.
import { createInterface } from 'node:readline'
import { Sandbox } from 'e2b'

for await (const _ of createInterface({ input: process.stdin })) {
  const began = performance.now()
  const sandbox = await Sandbox.create()
  const ready = performance.now() - began
  await sandbox.commands.run('true')
  console.log(JSON.stringify({ ready, exec: performance.now() - began }))
  await sandbox.kill()
}
