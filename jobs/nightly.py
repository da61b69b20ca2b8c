"""The nightly run as a cluster runs it: ``python jobs/nightly.py jobs/configs/nightly.toml``, the same as ``geoseg nightly``."""

from __future__ import annotations

import sys

from geoseg.cli import main

if __name__ == "__main__":
    main(["nightly", *sys.argv[1:]])
