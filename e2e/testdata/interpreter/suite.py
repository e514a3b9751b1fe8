"""A session with E2B's code interpreter client. It reads E2B_API_KEY, E2B_API_URL,
E2B_SANDBOX_URL and E2B_DOMAIN, as every program of the client does."""

import base64
import time

from e2b_code_interpreter import Sandbox

LONG = {"timeout": 180, "request_timeout": 180}
began = time.monotonic()


def say(what):
    print(f"{what} after {1000 * (time.monotonic() - began):.0f} ms")


sandbox = Sandbox.create(timeout=900, request_timeout=180)
say("created")
try:
    done = sandbox.run_code("print('hello'); x = 6*7\nx", **LONG)
    say("first cell")
    assert done.text == "42", done
    assert "".join(done.logs.stdout) == "hello\n", done

    done = sandbox.run_code("import nothing_like_it", **LONG)
    assert done.error.name == "ModuleNotFoundError", done
    assert "nothing_like_it" in done.error.traceback, done

    done = sandbox.run_code(
        "import matplotlib.pyplot as plt\nplt.bar(['a', 'b'], [3, 4])\nplt.ylabel('height [m]')\nplt.show()", **LONG
    )
    say("chart")
    picture = next(r for r in done.results if r.png)
    assert base64.b64decode(picture.png).startswith(b"\x89PNG"), picture
    assert [(e.label, e.value) for e in picture.chart.elements] == [("a", 3), ("b", 4)], picture.chart.to_dict()
    assert picture.chart.y_unit == "m", picture.chart.to_dict()

    done = sandbox.run_code("import pandas as pd\npd.DataFrame({'a': [1, 2]})", **LONG)
    assert done.results[0].data == {"a": [1, 2]}, done
    assert "<table" in done.results[0].html, done

    context = sandbox.create_code_context(cwd="/tmp", request_timeout=180)
    say("context")
    assert (context.language, context.cwd) == ("python", "/tmp"), context
    done = sandbox.run_code("import os; (os.getcwd(), 'x' in globals())", context=context, **LONG)
    assert done.text == "('/tmp', False)", done
    assert context.id in [c.id for c in sandbox.list_code_contexts()]
    sandbox.remove_code_context(context)
    assert context.id not in [c.id for c in sandbox.list_code_contexts()]

    # A client that goes away interrupts its cell, and the context goes on.
    try:
        sandbox.run_code("import time; time.sleep(600)", timeout=2, request_timeout=30)
        raise AssertionError("a cell of ten minutes has ended")
    except Exception as e:
        assert "imeout" in type(e).__name__, e
    assert sandbox.run_code("x", **LONG).text == "42"
    say("interrupted")
finally:
    sandbox.kill()
say("all")
