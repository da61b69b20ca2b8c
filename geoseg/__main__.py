"""``python -m geoseg`` is the command ``geoseg``."""

from geoseg.cli import main

main(prog_name="geoseg")
