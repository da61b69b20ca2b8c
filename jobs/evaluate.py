"""Judge a bundle on the Ray cluster that this runs in: ray job submit ... -- python jobs/evaluate.py JOB.toml."""

import sys

from geoseg.cli import main

if __name__ == "__main__":
    main(["evaluate", "--address", "auto", *sys.argv[1:]])
