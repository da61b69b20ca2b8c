"""Train the bundle of a job file on the Ray cluster that this runs in: ray job submit ... -- python jobs/train.py JOB.toml."""

import sys

from geoseg.cli import main

if __name__ == "__main__":
    main(["train", "--address", "auto", *sys.argv[1:]])
