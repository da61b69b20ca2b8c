"""One process of a training without Ray: ``python one_worker.py JOB.json RANK WORLD PORT``; dies at ``die_at`` of the job's JSON.

With a WORLD of more than one the processes meet on PORT of this machine through gloo.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from geoseg.config import check
from geoseg.train.feed import feed_from_threads
from geoseg.train.job import TrainJob
from geoseg.train.loop import Group
from geoseg.training import keep_tables_in_threads, prepare, train_share


def main(path: str, rank: int, world: int, port: int) -> None:
    """Train to the end, or to the step at which this process is to die."""
    told = json.loads(Path(path).read_text())
    die_at = told.pop("die_at", None)
    job = check(TrainJob, told, where=path)
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)

    def tell(kind: str, what: Any) -> None:
        if kind == "stepped" and [what["stage"], what["stage_step"]] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    train_share(
        prepare(job, keep_tables=keep_tables_in_threads),
        partial(feed_from_threads, threads=2),
        tell,
        group=Group(rank, world),
        device="cpu",
    )


if __name__ == "__main__":
    main(sys.argv[1], *(int(argument) for argument in sys.argv[2:]))
