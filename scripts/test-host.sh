#!/usr/bin/env bash
# Check a running host agent end to end, over plain HTTP and JSON.
#
#   scripts/test-host.sh [URL]        default http://localhost:50051
#
# Prints PASS or FAIL for each step; the exit status is 0 only if all passed.
# The host should have no sandboxes; the one made here is destroyed at the end,
# whatever happens. Needs curl alone.
set -euo pipefail

url=${1:-http://localhost:50051}
url=${url%/}
service=hostagent.v1.HostAgentService
id=
status=
body=
failures=0

# call RPC JSON: sets status (of HTTP, 000 if there was no answer) and body.
call() {
    local answer
    answer=$(curl -sS --max-time "${TIMEOUT:-180}" -w '\n%{http_code}' \
        -H 'Content-Type: application/json' -d "$2" "$url/$service/$1" 2>&1) || true
    status=${answer##*$'\n'}
    body=${answer%"$status"}
    body=${body%$'\n'}
}

# field NAME: the value of a string or number in body, empty if absent.
field() {
    sed -nE "s/.*\"$1\"[[:space:]]*:[[:space:]]*\"?([^\",}]*)\"?.*/\1/p" <<<"$body" | head -n 1
}

# decoded NAME: the bytes that the answer carries in base64.
decoded() {
    field "$1" | base64 -d
}

# step NAME COMMAND...: one line for one thing that must hold.
step() {
    local name=$1
    shift
    if "$@"; then
        echo "PASS  $name"
    else
        echo "FAIL  $name"
        echo "      HTTP $status: ${body:0:500}"
        failures=$((failures + 1))
    fi
}

cleanup() {
    if [[ -n $id ]]; then
        call DestroySandbox "{\"sandboxId\":\"$id\"}"
    fi
}
trap cleanup EXIT

# exec_args JSON: runs what the JSON's fields say in the sandbox.
exec_args() {
    call Exec "{\"sandboxId\":\"$id\",$1}"
    [[ $status == 200 ]]
}

list_empty() {
    call ListSandboxes '{}'
    [[ $status == 200 && $body != *sandboxId* ]]
}

create() {
    call CreateSandbox '{"template":"minimal","vcpus":1,"memoryMb":512,"timeoutSec":300}'
    id=$(field sandboxId)
    [[ $status == 200 && $id =~ ^sb-[0-9a-f]{16,}$ && $(field status) == running && -n $(field hostIp) ]]
}

listed() {
    call ListSandboxes '{}'
    [[ $status == 200 && $(field sandboxId) == "$id" && $(field status) == "$1" && $(field template) == minimal ]]
}

exec_plain() {
    exec_args '"cmd":"echo","args":["hello from the guest"]' &&
        [[ $(decoded stdout) == "hello from the guest" && -z $(field exitCode) ]]
}

exec_many_lines() {
    exec_args '"cmd":"sh","args":["-c","for i in 1 2 3; do echo line $i; done\necho oops >&2\nexit 7"],"timeoutSec":10' &&
        [[ $(decoded stdout) == $'line 1\nline 2\nline 3' && $(decoded stderr) == oops && $(field exitCode) == 7 ]]
}

exec_writes() {
    exec_args '"cmd":"sh","args":["-c","echo kept >/root/mark; cat /proc/sys/kernel/random/boot_id"]' &&
        boot_id=$(decoded stdout) && [[ -n $boot_id ]]
}

exec_finds() {
    exec_args '"cmd":"sh","args":["-c","cat /root/mark /proc/sys/kernel/random/boot_id"]' &&
        [[ $(decoded stdout) == "kept"$'\n'"$boot_id" ]]
}

change() {
    call "$1" "{\"sandboxId\":\"$id\"}"
    [[ $status == 200 ]]
}

exec_refused() {
    ! exec_args '"cmd":"true"' && [[ $(field code) == failed_precondition && $body == *paused* ]]
}

destroy_unknown() {
    call DestroySandbox '{"sandboxId":"sb-0000000000000000"}'
    [[ $status == 404 && $(field code) == not_found ]]
}

destroyed_is_gone() {
    call Exec "{\"sandboxId\":\"$id\",\"cmd\":\"true\"}"
    [[ $(field code) == not_found ]] && id=
}

echo "checking the host agent at $url"
step "list is empty" list_empty
step "create" create
if [[ -z $id ]]; then
    echo "without a sandbox the other steps mean nothing"
    exit 1
fi
step "list shows it running" listed running
step "exec" exec_plain
step "exec of several lines, with stderr and exit status" exec_many_lines
step "exec writes a file" exec_writes
step "pause" change PauseSandbox
step "list shows it paused" listed paused
step "exec is refused while paused" exec_refused
step "resume" change ResumeSandbox
step "exec finds the same machine" exec_finds
step "destroy" change DestroySandbox
step "exec after destroy is refused" destroyed_is_gone
step "list is empty again" list_empty
step "destroy of an unknown id is refused" destroy_unknown

if ((failures > 0)); then
    echo "$failures steps failed"
    exit 1
fi
echo "all steps passed"
