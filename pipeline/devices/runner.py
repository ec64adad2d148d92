"""The start of a kit, on the device that it was carried to: `python runner.py` in the unpacked folder.

Lies there as `runner.py` beside the files of this package that measure. Any Python can read it, so that one
that is too old is told so."""

import os
import sys

PACKAGES = ("numpy", "onnxruntime")

if __name__ == "__main__":
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, folder)
    problem = ""
    if sys.version_info < (3, 9):  # noqa: UP036  (this file travels; the package does not start it)
        problem = (
            "needs Python 3.9 or newer, this is " + sys.version.split()[0] + "; start it with a newer one"
        )
    for package in PACKAGES:
        try:
            problem or __import__(package)
        except Exception as missing:
            problem = (
                "cannot import " + package + " (" + str(missing) + "); pip install " + " ".join(PACKAGES)
            )
    if problem:
        sys.stderr.write("runner.py: " + problem + "\n")
        sys.exit(2)
    from pipeline.devices.on_device import main

    sys.exit(main(folder, sys.argv[1:]))
