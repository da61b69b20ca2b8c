"""Predict the scenes of a job file on the Ray cluster that this runs in: ray job submit ... -- python jobs/predict.py JOB.toml."""

import sys

from geoseg.cli import main

if __name__ == "__main__":
    main(["predict", "--address", "auto", "--config", *sys.argv[1:]])
