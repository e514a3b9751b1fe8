// A kernel for JavaScript and TypeScript: cells run in the global scope as in node's own
// REPL. Requests come on the first descriptor that the command line names, answers go to
// the second, a line of JSON each. node has to be told --expose-internals.
'use strict'

const fs = require('fs')
const net = require('net')
const repl = require('repl')
const util = require('util')
const { createRequire, stripTypeScriptTypes } = require('module')
const { Readable, Writable } = require('stream')
const acorn = require('internal/deps/acorn/acorn/dist/acorn')

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

// end ends the cell that runs, if one does, once. settling is set while a promise that the
// cell's value is decides what ends it.
let end = null
let settling = false
let count = 0
const onInterrupt = () => {
  if (end && settling) end(new Error('The cell was interrupted.'))
  else if (end) server.emit('SIGINT')
}
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

// parse returns the statements of a cell, or undefined for what is no JavaScript.
function parse(code) {
  try {
    return acorn.parse(code, { ecmaVersion: 'latest', sourceType: 'module', allowAwaitOutsideFunction: true }).body
  } catch {
    return undefined
  }
}

// javascript makes a script for node's REPL of a cell: without types, and with awaits in
// place of import statements.
function javascript(code, typescript) {
  let statements = typescript ? undefined : parse(code)
  if (!statements) {
    try {
      const stripped = stripTypeScriptTypes(code, { mode: 'transform' })
      statements = parse(stripped)
      if (statements) code = stripped
    } catch {
      // node says what is wrong with the cell.
    }
  }
  const imports = (statements || []).filter((s) => s.type === 'ImportDeclaration')
  for (const s of imports.reverse()) code = code.slice(0, s.start) + dynamicImport(s, code) + code.slice(s.end)
  return code
}

// dynamicImport returns what does as an import statement. Its names are declared by var, so
// that a cell may run again.
function dynamicImport(statement, code) {
  const key = (node) => node.name === undefined ? node.raw : node.name
  const names = []
  let whole
  for (const s of statement.specifiers) {
    if (s.type === 'ImportNamespaceSpecifier') whole = s.local.name
    else names.push(`${s.type === 'ImportSpecifier' ? key(s.imported) : 'default'}: ${s.local.name}`)
  }
  const attributes = (statement.attributes || []).map((a) => code.slice(a.start, a.end)).join(', ')
  const call = `await import(${statement.source.raw}${attributes && `, { with: { ${attributes} } }`})`
  if (statement.specifiers.length === 0) return call + ';'
  if (whole === undefined) return `var { ${names.join(', ')} } = ${call};`
  return `var ${whole} = ${call};` + (names.length > 0 ? ` var { ${names.join(', ')} } = ${whole};` : '')
}

// What Jupyter's kernels for JavaScript know as rich values: how their parts are named in
// E2B's results.
const formats = {
  'text/plain': 'text', 'text/html': 'html', 'text/markdown': 'markdown', 'text/latex': 'latex', 'image/svg+xml': 'svg',
  'image/png': 'png', 'image/jpeg': 'jpeg', 'application/pdf': 'pdf', 'application/json': 'json',
  'application/javascript': 'javascript',
}

function answerMime(parts, isMain) {
  const result = { type: 'result', is_main_result: isMain }
  for (const [mime, data] of Object.entries(parts)) {
    if (formats[mime]) result[formats[mime]] = data
    else (result.extra ||= {})[mime] = data
  }
  answer(result)
}

// answerValue answers with the value of a cell.
async function answerValue(value) {
  const display = value !== null && typeof value === 'object' && value[Symbol.for('Jupyter.display')]
  if (typeof display === 'function') {
    const parts = await display.call(value)
    if (parts !== null && typeof parts === 'object') {
      answerMime(parts, true)
      return
    }
  }
  answerMime({ 'text/plain': typeof value === 'string' ? value : util.inspect(value) }, true)
}

// $$ shows what a cell names, as ijavascript's does.
Object.defineProperty(globalThis, '$$', {
  configurable: true, writable: true, enumerable: false,
  value: Object.freeze({
    mime: (parts) => answerMime(parts, false),
    text: (text) => answerMime({ 'text/plain': text }, false),
    html: (text) => answerMime({ 'text/html': text }, false),
    svg: (text) => answerMime({ 'image/svg+xml': text }, false),
    png: (base64) => answerMime({ 'image/png': base64 }, false),
    jpeg: (base64) => answerMime({ 'image/jpeg': base64 }, false),
  }),
})

function setEnv(env) {
  const before = {}
  for (const [name, value] of Object.entries(env)) {
    before[name] = process.env[name]
    if (value === undefined) delete process.env[name]
    else process.env[name] = value
  }
  return before
}

function run({ code, env, typescript }) {
  answer({ type: 'number_of_executions', execution_count: ++count })
  const before = setEnv(env || {})
  end = (error, value) => {
    end = null
    settling = false
    setEnv(before)
    if (error) answer(failure(error))
    const told = error || value === undefined ? Promise.resolve() : answerValue(value).catch((e) => answer(failure(e)))
    told.then(() => setImmediate(() => answer({ type: 'done' })))
  }
  const own = end
  const once = (error, value) => {
    if (end !== own) return
    if (error || !util.types.isPromise(value)) {
      end(error, value)
      return
    }
    settling = true
    value.then((v) => { if (end === own) end(null, v) }, (e) => { if (end === own) end(e ?? new Error(String(e))) })
  }
  // While a cell runs, node's own handler breaks it, which a listener would undo. A cell
  // that waits is ended by the listener.
  process.removeListener('SIGINT', onInterrupt)
  try {
    server.eval(javascript(code, typescript) + '\n', server.context, 'cell', once)
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
