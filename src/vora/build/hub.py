"""What a name of a model means: a place on this machine, or an id of the Hugging Face hub that can be had now.

The hub's client tries again for half a minute, per file, where no network is; here that is found out in seconds. Code
that lies beside a model is run only where a person said so, and never because of a line of standard input.
"""

import difflib
import os
import re
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError

LONGEST_WAIT = 1.5  # seconds, for a connection
KNOWN_FOR = 30.0  # seconds that its answer holds
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
FILE_ENDING = re.compile(
    r"\.(jsonl?|parquet|arrow|tar|gz|zip|gguf|ya?ml|safetensors|bin|pth?|ckpt|csv|tsv|txt|md|py|png|jpe?g|webp|gif)$",
    re.I,
)
_state: dict[str, float] = {}  # {endpoint: until when it counts as out of reach}
_trusts: list[bool] = []


def may_be_hub_id(name: str) -> bool:
    """Whether a name could be one on the hub: not with a path's marks, nor with a file's ending."""
    return bool(HUB_ID.fullmatch(name)) and ".." not in name and not FILE_ENDING.search(name)


def located(name: Path | str, key: str, example: str, aliases: Collection[str] = ()) -> str:
    """A name as `from_pretrained` takes it: a path that exists, `~` resolved, or an id that the hub or its cache has.

    Args:
        key: what the name was given as, for the message.
        example: a hub id for the message.
        aliases: further names that are known, for the message.

    Raises:
        ValueError: it is neither, with the place looked at and the name that is likest.
    """
    name, place = str(name), os.path.expanduser(str(name))
    if os.path.isfile(place) and not place.lower().endswith(".gguf"):
        folder = os.path.dirname(place)
        such = f", such as {folder}" if os.path.exists(os.path.join(folder, "config.json")) else ""
        raise ValueError(f"{key} {name} is a file: name the folder of a model{such}.")
    if os.path.exists(place):
        return place
    cause = hub_problem(name) if may_be_hub_id(name) else None
    if may_be_hub_id(name) and cause is None:
        return name
    known = f", no alias ({', '.join(aliases)})" if aliases else ""
    cause = f"and {cause}" if cause else "and a path is never looked for on the hub"
    raise ValueError(
        f"{key} {name}: there is no {os.path.abspath(place)}{known}, {cause}.{did_you_mean(place, aliases)} "
        f"Name a folder, or a hub id such as {example}."
    )


def hub_problem(name: str) -> str | None:
    """Why a model's files are not to be had under a hub id; None where they are, at the hub or in its cache."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so that the hub is not asked"
    if not hub_is_reachable():
        return f"the hub ({constants.ENDPOINT}) cannot be reached"
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except GatedRepoError:
        return f"on the hub it is gated: ask for access at {constants.ENDPOINT}/{name}, then `hf auth login`"
    except RepositoryNotFoundError:
        return "the hub has no such model, or a private one (`hf auth login`)"
    except EntryNotFoundError:
        return None  # a repository without it; whoever reads it will say
    except Exception as error:  # the client raises many kinds
        return f"the hub does not answer ({' '.join(str(error).split())[:100]})"
    return None


def hub_is_reachable() -> bool:
    """Whether the hub, or the proxy before it, takes a connection; a no holds for some seconds, a yes does not."""
    if time.monotonic() < _state.get(constants.ENDPOINT, 0.0):
        return False
    is_there = _connects(*_first_host(constants.ENDPOINT))
    _state[constants.ENDPOINT] = 0.0 if is_there else time.monotonic() + KNOWN_FOR
    return is_there


@contextmanager
def loading(name: Path | str, key: str) -> Iterator[None]:
    """Whatever is wrong with the files of a model that is loaded within becomes a ValueError of a line."""
    try:
        with _hub_at_hand(name):
            yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        if text.startswith(key):  # it was said within
            raise
        cause = f"cannot be loaded: {text[:200]}"
        if isinstance(error, SafetensorError):
            cause = f"has weights that are damaged or cut off ({text[:100]}): copy or fetch its files again"
        elif "trust_remote_code" in text:
            cause = "needs code of its own: read it, and then give --trust-remote-code, or name another model"
        elif "Unrecognized model" in text:
            cause = "holds no configuration of a model that transformers knows: check the path, or name another"
        elif "no file named" in text:
            cause = "holds no weights (model.safetensors): copy or fetch its files again, or name another"
        raise ValueError(f"{key} {name} {cause.rstrip('.')}.") from None


@contextmanager
def _hub_at_hand(name: Path | str) -> Iterator[None]:
    """Loading a name within: out of the hub's cache alone where the hub cannot be reached, so that nothing waits."""
    if os.path.exists(name) or constants.HF_HUB_OFFLINE or hub_is_reachable():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def trust_remote_code() -> None:
    """From now on, run the code that lies beside models of architectures that transformers does not have."""
    _trusts.append(True)


def remote_code() -> dict[str, bool]:
    """For every `from_pretrained`, which would otherwise ask on standard input."""
    return {"trust_remote_code": bool(_trusts)}


def _first_host(url: str) -> tuple[str, int]:
    """(host, port) that a request for a URL connects to: its own, or a proxy's."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(parts.netloc):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _connects(host: str, port: int) -> bool:
    """Whether a host takes a connection in time; in a thread, for to look up its name knows no limit."""
    found: list[bool] = []

    def connect() -> None:
        with suppress(OSError), socket.create_connection((host, port), timeout=LONGEST_WAIT):
            found.append(True)

    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(LONGEST_WAIT)
    return bool(found)


def did_you_mean(place: str, aliases: Collection[str] = ()) -> str:
    """The likest of what lies beside a place, of the aliases, and of what was fetched from the hub before."""
    parent, candidates = os.path.dirname(place), list(aliases)
    with suppress(OSError):
        candidates += [os.path.join(parent, one) for one in os.listdir(parent or ".") if not one.startswith(".")]
    with suppress(OSError):
        fetched = (one for one in os.listdir(constants.HF_HUB_CACHE) if one.startswith("models--"))
        candidates += [one.removeprefix("models--").replace("--", "/") for one in fetched]
    lower = {one.lower(): one for one in candidates}
    close = difflib.get_close_matches(place.lower(), lower, n=1, cutoff=0.7)
    return f" Did you mean {lower[close[0]]}?" if close else ""
