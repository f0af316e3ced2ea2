"""Checks and error messages for loading models and SAEs."""

import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from threading import RLock, get_ident
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from featpatch.errors import FeatpatchError, FeatpatchWarning, check_kinds, listed
from featpatch.files import as_path
from featpatch.threads import in_this_thread
from featpatch.untrusted import short

_one_at_a_time, _check_call = RLock(), subprocess.check_call


def check_device(device: str) -> None:
    """Raise a FeatpatchError unless torch can put a tensor on a device."""
    check_kinds(str, device=device)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        here += ["mps"] * torch.backends.mps.is_available()
        raise FeatpatchError(
            f"device {device!r} can't be used ({reason}): expected a device that torch finds on this machine: {', '.join(here)}"
            "; pass one of them, or install a build of torch that supports your device"
        ) from error


def numerically(names: Iterable[str]) -> list[str]:
    """Sort names so that the numbers in them are in order, `layer_2` before `layer_10`."""
    return sorted(names, key=lambda name: [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)])


def check_there(what: str, source: str | Path) -> None:
    """Raise a FeatpatchError if nothing is at a path that can't be a name on the hub, before the hub is asked for it."""
    path = as_path(source)
    if str(source).startswith((".", "/", "~")) and not path.exists():
        raise FeatpatchError(
            f"{str(source)!r} does not exist{near_folder(source)}: expected the folder of a saved {what}, or a name on the hub"
        )


def not_found(what: str, source: str, error: Exception) -> FeatpatchError:
    """Return the error for a model or an SAE that can't be loaded, with what to do about it."""
    reason = short(error)
    if Path(source).exists():
        return FeatpatchError(f"the {what} in {source!r} can't be loaded ({reason}): expected a complete folder; save it again")
    return FeatpatchError(
        f"the {what} {source!r} can't be loaded ({type(error).__name__}: {reason}): expected a name that can be downloaded, "
        f"or a folder{near_folder(source)}; without network access, download it on another machine (`hf download NAME "
        "--local-dir FOLDER`), copy the folder here and give its path; for a gated model, log in with `hf auth login`"
    )


@contextmanager
def installing_nothing() -> Iterator[None]:
    """Keep the libraries that load a model from installing packages, until the context ends.

    For the image processor of a multimodal model, TransformerLens runs pip if torchvision is missing or broken, which may
    replace torch. It continues without the processor if pip fails, and text needs none.
    """
    ours, blocked = get_ident(), list[str]()

    def check_call(command: Any, *args: Any, **options: Any) -> int:
        if "install" not in command or get_ident() != ours:
            return _check_call(command, *args, **options)
        blocked.append(" ".join(command))
        raise FeatpatchError(f"{blocked[-1]}: expected no package to be installed while a model is loaded")

    with _one_at_a_time, patch.object(subprocess, "check_call", check_call):
        yield
    if blocked:
        warnings.warn(
            "the model also accepts images and is loaded without its image processor, which needs torchvision; text does not "
            "need it. TransformerLens would have installed torchvision now, and might have replaced torch: if you want it, "
            f"install the version of torchvision that matches your torch {torch.__version__} yourself",
            FeatpatchWarning,
            stacklevel=5,
        )


@contextmanager
def loading_quietly() -> Iterator[None]:
    """Stop the libraries that load a model from showing progress bars, and from printing in this thread.

    Their settings, which apply to all threads, are restored when the context ends.
    """
    with _one_at_a_time:
        hub, bars = not are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
        try:
            with patch.object(sys.stdout, "write", in_this_thread(len, otherwise=sys.stdout.write)):
                yield
        finally:
            if bars:
                transformers_logging.enable_progress_bar()  # this also enables the hub's bars
            (enable_progress_bars if hub else disable_progress_bars)()


def near_folder(source: str | Path) -> str:
    """Suggest an existing folder with a similar name, for an error; empty if there is none."""
    try:
        path = Path(source).expanduser()
        names = [each.name for each in path.parent.iterdir() if each.is_dir()]
    except (OSError, RuntimeError):
        return ""
    near = get_close_matches(path.name, names, 1)
    return f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""


def folder_with(path: str | Path, file: str, what: str) -> Path:
    """Return the path of the folder of a saved model or SAE (`what`) after checking that it holds a file.

    Raises:
        FeatpatchError: the file is not there.
    """
    folder = Path(path)
    if not (folder / file).is_file():
        names = sorted(repr(each.name) for each in folder.iterdir()) if folder.is_dir() else []
        holds = f", which holds {listed(names, 4)}" if names else ""
        raise FeatpatchError(
            f"there is no {file} in {str(path)!r}{holds}: expected the folder of a saved {what} (a local folder takes "
            f"precedence over a name on the hub); give the path of the folder that holds the {what}'s {file}"
        )
    return folder
