// A kernel for JavaScript: cells run in the global scope as in node's own REPL.
// Requests come on the first descriptor that the command line names, answers go to the
// second, a line of JSON each.
'use strict'

const fs = require('fs')
const net = require('net')
const repl = require('repl')
const util = require('util')
const { createRequire } = require('module')
const { Readable, Writable } = require('stream')

const [requestsFd, answersFd] = process.argv.splice(2).map(Number)
const pieceLength = 64 * 1024

function answer(object) {
  let rest = Buffer.from(JSON.stringify(object) + '\n')
  while (rest.length > 0) rest = rest.subarray(fs.writeSync(answersFd, rest))
}

function answerText(type, text) {
  for (let at = 0; at < text.length; at += pieceLength) answer({ type, text: text.slice(at, at + pieceLength) })
}

for (const type of ['stdout', 'stderr']) {
  process[type].write = (chunk, encoding, done) => {
    answerText(type, typeof chunk === 'string' ? chunk : Buffer.from(chunk).toString())
    const callback = typeof encoding === 'function' ? encoding : done
    if (callback) process.nextTick(callback)
    return true
  }
}

const server = repl.start({
  prompt: '',
  input: new Readable({ read() {} }),
  // What node's REPL writes by itself are errors of callbacks.
  output: new Writable({ write(chunk, _, done) { answerText('stderr', chunk.toString()); done() } }),
  useGlobal: true,
  breakEvalOnSigint: true,
  terminal: false,
})
globalThis.require = createRequire(process.cwd() + '/')

// end ends the cell that runs, if one does, once.
let end = null
let count = 0
const onInterrupt = () => { if (end) server.emit('SIGINT') }
process.on('SIGINT', onInterrupt)

// What a cell throws comes here, and so do errors of its callbacks.
server._domain.removeAllListeners('error')
server._domain.on('error', (error) => {
  if (end) end(error)
  else answerText('stderr', failure(error).traceback + '\n')
})

function failure(error) {
  if (error instanceof repl.Recoverable) error = error.err
  if (error instanceof Error) return { type: 'error', name: error.name, value: error.message, traceback: error.stack || String(error) }
  return { type: 'error', name: 'Error', value: util.inspect(error), traceback: 'Uncaught ' + util.inspect(error) }
}

function setEnv(env) {
  const before = {}
  for (const [name, value] of Object.entries(env)) {
    before[name] = process.env[name]
    if (value === undefined) delete process.env[name]
    else process.env[name] = value
  }
  return before
}

function run({ code, env }) {
  answer({ type: 'number_of_executions', execution_count: ++count })
  const before = setEnv(env || {})
  end = (error, value) => {
    end = null
    setEnv(before)
    if (error) answer(failure(error))
    else if (value !== undefined) {
      answer({ type: 'result', is_main_result: true, text: typeof value === 'string' ? value : util.inspect(value) })
    }
    setImmediate(() => answer({ type: 'done' }))
  }
  const own = end
  const once = (error, value) => { if (end === own) end(error, value) }
  // While a cell runs, node's own handler breaks it, which a listener would undo. A cell
  // that waits is ended by the listener.
  process.removeListener('SIGINT', onInterrupt)
  try {
    server.eval(code + '\n', server.context, 'cell', once)
  } catch (error) {
    once(error)
  }
  process.on('SIGINT', onInterrupt)
}

let pending = ''
const requests = new net.Socket({ fd: requestsFd, readable: true, writable: false })
requests.setEncoding('utf8')
requests.on('data', (chunk) => {
  const lines = (pending + chunk).split('\n')
  pending = lines.pop()
  for (const line of lines) {
    const request = JSON.parse(line)
    if (request.renew) {
      setEnv(request.renew)
      answer({ type: 'done' })
    } else run(request)
  }
})
requests.on('close', () => process.exit(0))
answer({ type: 'ready' })
