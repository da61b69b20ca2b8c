"""Damaged real files: each is read or refused in a sentence, in flat memory; nothing crashes, hangs or is surprised."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from kit.data import data_folder
from kit.mutations import KINDS, mutated, read_mutants, sound_files

from geoseg.raster import store
from geoseg.raster.scene import SceneRef
from geoseg.raster.sums import ChecksumError, check_sums

ROOM_MIB = 128


def is_as_its_sum_says(folder: Path, sound: list[bytes], seed: int) -> bool:
    """Whether a mutation is taken for the sound file by the SHA-256 of that one."""
    path = folder / "mutant.tif"
    path.write_bytes(mutated(sound, seed)[0])
    told = "1220" + hashlib.sha256(sound[seed // len(KINDS) % len(sound)]).hexdigest()
    try:
        check_sums(
            SceneRef("mutant", str(path), sums=(told,)), {str(path): (store.head(str(path)).etag, path.stat().st_size)}
        )
    except ChecksumError:
        return False
    return True


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "num",
    [pytest.param(100, id="100"), pytest.param(2000, id="2000", marks=(pytest.mark.chaos, pytest.mark.slow))],
)
def test_mutations_of_real_files_are_read_or_refused(num: int, tmp_path: Path, figure: Callable[..., None]) -> None:
    """Cuts, flipped bits, holes, splices and edited fields by seed: seed n is mutation n of ``kit.mutations.mutated``."""
    before_mib, outcomes = read_mutants(tmp_path, data_folder(), 0, num)
    counts = Counter(one.what for one in outcomes)
    figure("S3", f"crashes in {num:,} seeded mutations of real files", counts["crash"], goal="0")
    figure("S3", f"hangs in {num:,} seeded mutations of real files", counts["hang"], goal="0")
    for what in ("refused", "same", "other"):
        figure("S3", f"of {num:,} mutations: {what}{'' if what == 'refused' else ' pixels'}", counts[what])
    figure("S3", "silently wrong pixels, without a checksum", f"{counts['other'] / num:.1%}")
    others = [one.seed for one in outcomes if one.what == "other"]
    sound = sound_files(tmp_path, data_folder())
    unseen = [seed for seed in others if is_as_its_sum_says(tmp_path, sound, seed)]
    figure(
        "S3",
        "silently wrong pixels, where the catalogue's checksum is compared",
        f"{len(unseen) / num:.1%}",
        goal="0.0%",
    )
    assert not unseen
    assert not [one for one in outcomes if one.what in ("crash", "hang", "surprise")]
    refused = [one for one in outcomes if one.what == "refused"]
    assert not [one for one in refused if ": mutant: " not in one.told or not one.told.isprintable()]
    assert not [one for one in outcomes if one.peak_mib - before_mib > ROOM_MIB]
    cuts = [one for one in outcomes if one.kind == KINDS[0]]
    assert not [one for one in cuts if one.what == "other"], "what is cut short is never taken for whole"
    assert 0.4 < len(refused) / num < 0.9, "the mutations should hit, and not always"
    assert counts["other"], "no checksum can be wanted for nothing"
