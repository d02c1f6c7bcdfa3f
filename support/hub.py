"""Models and data sets from the Hugging Face Hub."""

import collections
import contextlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from support.errors import InputError, one_line
from support.files import MODEL_FILES, WEIGHT_FILES


class HubFile(NamedTuple):
    """A file of a data set, which may not have been downloaded yet."""

    repository: str
    revision: str  # of the repository, a commit hash
    name: str

    def download(self) -> Path:
        """The file in the hub's cache. Raises OSError, not InputError, so that `tokenise` keeps what is done so far."""
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.repository, self.name, repo_type="dataset", revision=self.revision))
        except Exception as error:  # see hub_files
            raise OSError(f"the hub did not deliver {self.name} of {self.repository}; rerun the same command to "
                          f"continue ({one_line(error)})") from None


def find_model(name: str) -> Path:
    """The folder of a model: a local one, or that of a hub name in the hub's cache, downloaded if necessary.

    Only the files that are needed are downloaded. Raises InputError, within 10 seconds if the hub is unreachable.
    """
    def wanted(files: list[str]) -> list[str]:
        weights = [file for file in WEIGHT_FILES if file in files][:1]
        others = {*MODEL_FILES, "README.md"} & set(files)
        if not weights or not others & {"vocab.txt", "tokenizer.json"} or "config.json" not in others:
            raise InputError(f"{name} on the hub lacks config.json, a tokenizer or {' or '.join(WEIGHT_FILES)}")
        modules = [file for file in files if re.fullmatch(rf"\d+_\w+/(config\.json|{'|'.join(WEIGHT_FILES)})", file)]
        return [*weights, *others, *modules]

    return Path(name) if os.path.isdir(name) else hub_files(name, "model", wanted)[0]


def hub_files(name: str, kind: str, wanted: Callable[[list[str]], list[str]], download=True) -> tuple[Path, list[str]]:
    """The local folder of a hub repository and the names of its needed files, from the hub's cache if they are there.

    kind: "model" or "dataset". wanted: maps all file names of the repository to those that are needed, or raises
    InputError if some are missing. Without `download` the folder may lack them.
    Raises InputError if the files are neither in the cache nor on the hub.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "4")  # seconds without a byte; it tries six times
    from huggingface_hub import HfApi, errors, get_cached_repo_tree, snapshot_download

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retry messages are not for our users
    not_cached = contextlib.suppress(errors.CachedRepoTreeNotFoundError, errors.LocalEntryNotFoundError,
                                     errors.HFValidationError, InputError)

    def snapshot(names: list[str], local: bool) -> tuple[Path, list[str]]:
        files = wanted(names)
        patterns = files if download else []
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=patterns, local_files_only=local)), files

    with not_cached:  # the library keeps the names of all files of a repository, also of those not downloaded
        return snapshot([file.path for file in get_cached_repo_tree(name, repo_type=kind)], local=True)
    try:
        info = HfApi().repo_info(name, repo_type=kind, timeout=5)  # one request, no retries: quick to fail
        return snapshot([sibling.rfilename for sibling in info.siblings], local=False)
    except InputError:
        raise
    except Exception as error:  # the hub's client raises its transport's own exceptions: all mean "unavailable"
        with not_cached:  # another program may have put all that is needed into the cache, without the names
            # [], because without patterns the library would demand files that we never ask for
            folder = Path(snapshot_download(name, repo_type=kind, allow_patterns=[], local_files_only=True))
            files = wanted([str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()])
            # (name, count) -> how many
            parts = collections.Counter(re.findall(r"(.*)[-.]\d+-of-(\d+)\.", "\n".join(files)))
            if all(present == int(count) for (_, count), present in parts.items()):
                return folder, files
        if isinstance(error, errors.RepositoryNotFoundError):
            raise InputError(f"{kind} {name}: no such folder here and no such public {kind} on the hub") from None
        raise InputError(f"{kind} {name}: no such folder here, not in the hub's cache, and the hub did not deliver it "
                         f"({one_line(error)}); check the name and the network, or give a local folder") from None
