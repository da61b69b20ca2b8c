"""A run that stands still at the worst moment, and goes on when others have done its work, changes nothing any more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import forked
from kit.scenes import noise, write_scene

import geoseg
from geoseg.errors import OutputHeldError
from geoseg.predict import ledger, publish
from geoseg.predict.lease import Lease
from geoseg.predict.verify import verify_output
from geoseg.raster import store

pytestmark = [pytest.mark.bucket, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(900)]

SCENES = ("a", "b")
BEAT_S = 1.0
MOMENTS = {"planning": (ledger, "plan_scene"), "committing": (publish, "_commit")}


def predict(folder: str, out: str, bundle: str) -> int:
    """A run in this process; its exit code."""
    try:
        return geoseg.predict(folder, out, bundle=bundle, engine="local", window=512).exit_code
    except OutputHeldError as error:
        return error.exit_code


def stand_still(moment: str, scene: str, *run: str) -> None:
    """Be a run that stops itself at that moment of that scene, once."""
    module, name = MOMENTS[moment]
    step = getattr(module, name)

    def stopped(*args: Any) -> Any:
        if scene in (getattr(args[0], "id", ""), getattr(getattr(args[1], "scene", None), "id", "")):
            setattr(module, name, step)
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(*args)

    setattr(module, name, stopped)
    Lease.__init__.__kwdefaults__["beat_s"] = BEAT_S
    os._exit(predict(*run))


def until_it_stands_still(process: Any) -> None:
    """Wait for SIGSTOP."""
    deadline = time.monotonic() + 120
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def objects(out: str) -> dict[str, bytes]:
    """What is published."""
    return {info.uri: store.read(info.uri) for info in store.walk(f"{out}/") if "/_geoseg/" not in info.uri}


@pytest.mark.parametrize("other", [False, True], ids=["the same bundle", "another bundle"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_zombies_change_nothing(
    moment: str,
    other: bool,
    bucket: str,
    bundles: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[..., None],
) -> None:
    monkeypatch.setitem(Lease.__init__.__kwdefaults__, "beat_s", BEAT_S)
    for seed, scene in enumerate(SCENES):
        write_scene(tmp_path / "in" / f"{scene}.tif", noise(3, 40, 53, seed=seed))
    folder, (first, second) = str(tmp_path / "in"), bundles
    changed = 0
    for scene in SCENES:
        out = f"s3://{bucket}/{scene}"
        zombie = forked.start(stand_still, moment, scene, folder, out, str(first))
        try:
            until_it_stands_still(zombie)
            assert predict(folder, out, str(second if other else first)) == 0
            before = objects(out)
        finally:
            os.kill(zombie.pid or 0, signal.SIGCONT)
        zombie.join(120)
        nothing_to_do = moment == "planning" and not other  # it may find all that is left done
        assert zombie.exitcode in (OutputHeldError.exit_code, *([0] if nothing_to_do else []))
        after = objects(out)
        assert len([uri for uri in after if uri.endswith("/item.json")]) == len(SCENES)
        assert not verify_output(out).faults
        changed += sum(after.get(uri) != body for uri, body in before.items()) + len(after.keys() - before.keys())
    bundle = "another bundle" if other else "the same bundle"
    figure(
        "R4", f"objects changed by a run that stood still before {moment}, after one with {bundle}", changed, goal="0"
    )
    assert changed == 0
