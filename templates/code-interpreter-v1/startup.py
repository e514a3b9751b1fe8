"""What the server runs inside a Python kernel; each function gets IPython's shell."""

import os


def install(shell):
    """Makes figures and tables carry their data besides their pictures."""
    from IPython.core.formatters import BaseFormatter
    from traitlets import ObjectName, Unicode

    class Formatter(BaseFormatter):
        format_type = Unicode("e2b/data")
        print_method = ObjectName("_repr_e2b_data_")
        _return_type = dict

        def __init__(self, kind, module, name, read):
            super().__init__(parent=shell.display_formatter, format_type=kind)
            self.module, self.name, self.read = module, name, read

        def __call__(self, value):
            # By name: to import what defines the type would make every kernel's start slow.
            if not any(c.__name__ == self.name and c.__module__.split(".")[0] == self.module for c in type(value).__mro__):
                return None
            try:
                return self.read(value) or None
            except Exception:
                return None  # its picture or text is there all the same

    def chart(figure):
        import e2b_charts

        return e2b_charts.chart_figure_to_dict(figure)

    def data(table):
        import json

        split = json.loads(table.to_json(orient="split", date_format="iso"))
        return {str(name): [row[i] for row in split["data"]] for i, name in enumerate(split["columns"])}

    formatters = shell.display_formatter.formatters
    formatters["e2b/chart"] = Formatter("e2b/chart", "matplotlib", "Figure", chart)
    formatters["e2b/data"] = Formatter("e2b/data", "pandas", "DataFrame", data)


def preload(shell):
    """Does once what the first cells of every sandbox would do."""
    import importlib
    import io

    for name in ("numpy", "pandas", "e2b_charts"):
        try:
            importlib.import_module(name)
        except ImportError:
            pass
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    figure, axes = pyplot.subplots()
    axes.plot([1, 2])
    figure.savefig(io.BytesIO(), format="png")
    pyplot.close(figure)


def renew(shell, env):
    """A sandbox that began from a snapshot gets variables and randomness of its own."""
    import random
    import sys

    os.environ.update(env)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def push(shell, env):
    """Sets variables for one cell."""
    shell._wrenn_env = {name: os.environ.get(name) for name in env}
    os.environ.update(env)


def pop(shell):
    """Sets them back."""
    for name, value in shell.__dict__.pop("_wrenn_env", {}).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
