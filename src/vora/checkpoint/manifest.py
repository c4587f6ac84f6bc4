"""Whether a checkpoint is all there: manifest.json has size and CRC-32 of each file that a run resumes from. It is
written once all processes have written theirs, and before trainer_state.json, the last file."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

MANIFEST, STATE = "manifest.json", "trainer_state.json"
OPTIMIZER_FOLDER = "optimizer"  # of a run whose weights are spread over processes, in place of optimizer.pt
RESUMED = ("*.safetensors", "*.pt", "*.pth", "*.bin", "*.distcp", ".metadata", "data_position_*.json")
NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "data_position_*.json", "*.safetensors")
PIECE_BYTES = 1 << 22


def write_manifest(checkpoint: Path) -> None:
    """Write down what lies in a checkpoint."""
    names = sorted({path.relative_to(checkpoint).as_posix() for kind in RESUMED for path in checkpoint.rglob(kind)})
    sums = {name: [(checkpoint / name).stat().st_size, _crc(checkpoint / name)] for name in names}
    (checkpoint / MANIFEST).write_text(json.dumps(sums, indent=1))


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where a run can go on from it. Those without a manifest, of
    earlier versions, are looked at file by file, and their weights for numbers that are not finite."""
    try:
        if not (checkpoint / STATE).exists():
            return "it was not finished"
        if not is_json(checkpoint / STATE):
            return f"{STATE} is cut off"
        if (checkpoint / MANIFEST).exists():
            return next(_changes(checkpoint), None)
        return next(_visible_faults(checkpoint), None)
    except OSError as error:
        return f"{Path(error.filename or STATE).name} cannot be read ({error.strerror})"


def check_written(folder: Path) -> None:
    """Raise ValueError where what lies in a folder of a run is not what was written there, by its manifest, if it has
    one."""
    if (folder / MANIFEST).exists() and (change := next(_changes(folder), None)):
        raise ValueError(f"{folder}: {change}: copy it again, or name another checkpoint of the run.")


def is_json(file: Path) -> bool:
    """Whether a file holds a JSON object with something in it."""
    try:
        return bool(json.loads(file.read_text()))
    except ValueError:
        return False


def _changes(checkpoint: Path) -> Iterator[str]:
    if not is_json(checkpoint / MANIFEST):
        yield f"{MANIFEST} is cut off"
        return
    for name, (size, crc) in json.loads((checkpoint / MANIFEST).read_text()).items():
        file = checkpoint / name
        if not file.exists():
            yield f"{name} is missing"
        elif (found := file.stat().st_size) != size:
            yield f"{name} has {found:,} of {size:,} bytes"
        elif _crc(file) != crc:
            yield f"{name} has other bytes than were written"


def _visible_faults(checkpoint: Path) -> Iterator[str]:
    if not (checkpoint / "latest").exists():  # DeepSpeed keeps all in files of its own
        yield from (f"{name.replace('*', '')} is missing" for name in NEEDED if not any(checkpoint.glob(name)))
    for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        if not is_zipfile(file):
            yield f"{file.name} is cut off"
    yield from (f"{file.name} is cut off" for file in checkpoint.glob("data_position_*.json") if not is_json(file))
    for file in checkpoint.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as weights:
                bad = [name for name in weights.keys() if not torch.isfinite(weights.get_tensor(name)).all()]
        except SafetensorError:
            yield f"{file.name} is cut off"
            continue
        if bad:
            yield f"{file.name} holds {len(bad)} tensors that are not finite, such as {bad[0]}: the training diverged"


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as opened:
        while piece := opened.read(PIECE_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc
