"""Builds templates with E2B's published client.

It is told what to build from: the name of an image, and prints one JSON object a line,
as suite.py does.
"""
import json
import os
import sys
import tempfile
import time
import traceback

from e2b import Sandbox, Template
from e2b.exceptions import BuildException

IMAGE = sys.argv[1]


class show:
    """A block that shows a behaviour: what it raises is printed and goes no further."""

    def __init__(self, n):
        self.n = n

    def __enter__(self):
        self.began = time.time()

    def __exit__(self, kind, error, trace):
        text = "".join(traceback.format_exception(kind, error, trace)) if kind else ""
        print(json.dumps({"n": self.n, "error": text, "ms": int(1000 * (time.time() - self.began))}), flush=True)
        return kind is None or issubclass(kind, Exception)


def build(template, name, **kwargs):
    lines = []
    info = Template.build(template, name, cpu_count=1, memory_mb=512, on_build_logs=lambda e: lines.append(e.message), **kwargs)
    return info, "\n".join(lines)


with tempfile.TemporaryDirectory() as context:
    os.makedirs(os.path.join(context, "files", "sub"))
    with open(os.path.join(context, "files", "sub", "ü.txt"), "w") as f:
        f.write("built\n")
    os.symlink("nowhere", os.path.join(context, "files", "dangling"))
    os.chmod(os.path.join(context, "files", "sub"), 0o700)

    def app():
        return (
            Template(file_context_path=context)
            .from_image(IMAGE)
            .set_envs({"GREETING": "hello"})
            .copy("files", "/srv/data/", user="root", mode=0o755)
            .run_cmd('echo "$GREETING $(id -un)" > ~/who')
            .make_dir("/srv/of-root", user="root")
            .set_workdir("/srv/data")
        )

    with show(45):
        _, log = build(app(), "built-py")
        assert "Uploaded 'files'" in log and "Build finished" in log, log
        box = Sandbox.create("built-py", timeout=900)
        seen = box.commands.run("pwd; id -un; echo \"[$GREETING]\"; cat ~/who; cat sub/ü.txt; readlink dangling; stat -c '%U %a' sub; sudo id -un")
        assert seen.stdout == "/srv/data\nuser\n[]\nhello user\nbuilt\nnowhere\nroot 755\nroot\n", seen.stdout
        box.kill()
    with show(46):
        _, log = build(app(), "built-py")
        assert "Skipping upload of 'files', already cached" in log and "CACHED" in log, log
    with show(47):
        failing = app().run_cmd("echo before; exit 7")
        lines = []
        try:
            Template.build(failing, "failing-py", cpu_count=1, memory_mb=512, on_build_logs=lambda e: lines.append(e.message))
            raise AssertionError("it was built")
        except BuildException as err:
            assert "exit status 7" in str(err), err
        assert len(set(lines)) == len(lines), lines
    with show(50):  # a newer build cancels the one that runs
        slow = Template().from_template("built-py").run_cmd("echo begun; sleep 600")
        old = Template.build_in_background(slow, "slow", cpu_count=1, memory_mb=512)
        end = time.time() + 240
        while "begun" not in str(Template.get_build_status(old).log_entries):
            assert time.time() < end, "it does not begin"
            time.sleep(0.5)
        new, _ = build(Template().from_template("built-py").set_envs({"A": "1"}), "slow")
        status = Template.get_build_status(old)
        assert status.status.value == "error" and "cancelled" in status.reason.message, status
        assert Template.get_build_status(new).status.value == "ready"
