"""Scripts of the repository, run inside the test's process: one of their own would spend seconds on imports alone."""

import contextlib
import io
import os
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_script(script: str | pathlib.Path, *arguments: str) -> str:
    """What `python script arguments` prints when it is called in the root of the repository; raises SystemExit if it fails.

    `sys.argv`, `sys.path`, the environment variables and open figures are put back afterwards.
    """
    path = ROOT / script
    argv, import_path, environment = sys.argv, sys.path[:], dict(os.environ)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    printed = io.StringIO()
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    finally:
        sys.argv, sys.path[:] = argv, import_path
        os.environ.clear()
        os.environ.update(environment)
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
    return printed.getvalue()
