"""What is new or changed tonight, on the Ray cluster that this runs in: ray job submit ... -- python jobs/nightly.py JOB.toml."""

import sys

from geoseg.cli import main

if __name__ == "__main__":
    main(["nightly", "--address", "auto", *sys.argv[1:]])
