"""Publishes to a Hugging Face Hub repository, in one commit on top of what was looked at."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from job.errors import SettingsError, TransientError
from job.guard.front_matter import front_matter
from job.hub import hub_errors, is_outage, patiently
from job.hub.git import blob_id
from job.hub.ownership import EMPTY, RECORD, Update, list_files, refuse_others, update
from job.report.events import message
from job.run import Run

_PAUSES_SECONDS = (1.0, 3.0, 8.0, 20.0)
_MAIN = "main"
_REFUSED_CARD = "Invalid metadata in README.md."  # huggingface_hub, of what the Hub answers
_OWN_METADATA = ("library_name", "pipeline_tag", "tags")


@dataclass(frozen=True)
class _Head:
    """What a branch holds: its newest commit, and the size and hash of each file. `commit` is None without the branch."""

    commit: str | None
    files: dict[str, tuple[int, str]]

    def has_all(self, additions: Sequence[CommitOperationAdd]) -> bool:
        """Whether the branch has each file as it would be sent."""
        return self.commit is not None and not self.differing(additions)

    def differing(self, additions: Sequence[CommitOperationAdd]) -> list[str]:
        """The files that the branch lacks, or has with other bytes."""
        return [one.path_in_repo for one in additions if self.files.get(one.path_in_repo) not in _identities(one)]


class HubRepository:
    """A branch of the repository `user/name`, written `user/name` or `user/name@branch`. Both are created if need be."""

    def __init__(self, run: Run, hub_id: str) -> None:
        self._run = run
        self._id, _, branch = hub_id.partition("@")
        self._branch = branch or _MAIN

    def __str__(self) -> str:
        return f"hf://{self._id}" + ("" if self._branch == _MAIN else f"@{self._branch}")

    @property
    def model_id(self) -> str:
        return self._id

    @property
    def branch(self) -> str | None:
        """What a reader passes as `revision`, unless it is the main branch."""
        return None if self._branch == _MAIN else self._branch

    def for_the_adapter(self) -> HubRepository:
        """The branch that the adapter goes to when training ends, before anything else can fail."""
        branch = "adapter" if self._branch == _MAIN else f"{self._branch}-adapter"
        return HubRepository(self._run, f"{self._id}@{branch}")

    def check(self) -> None:
        """Make sure now that the repository can be written to, and that its branches for model and adapter are free."""
        for branch in (self, *([self.for_the_adapter()] if self._run.settings.publishes_adapter_first else [])):
            with hub_errors(f"FT_PUBLISH_TO={branch}"):
                branch._own(HfApi())

    def publish(self, repository: Path, *, tag: str | None = None) -> dict[str, Any]:
        """Push the folder in one commit, then compare the Hub's sizes and hashes with the local files'.

        Large files are sent first, and those that an earlier start sent are not sent again. What this run has published
        already is recognized. The same commit removes what an earlier push by this run published and this one does not.
        Raises TransientError if the Hub's bytes differ from those sent, or somebody else pushed meanwhile.
        """
        api = HfApi()
        with hub_errors(f"FT_PUBLISH_TO={self}"):
            name, head, record = self._own(api)
            if head.commit is None:
                head = self._branch_off(api, name)
            additions = _additions(repository)
            change = update(
                str(self),
                record,
                head.files,
                [one.path_in_repo for one in additions],
                lambda file: [head.files[file][1]],
            )
            try:
                commit = self._commit(api, name, head, _without(change.kept, additions), change)
            except ValueError as error:
                if not str(error).startswith(_REFUSED_CARD):
                    raise
                said = " ".join(str(error).removeprefix(_REFUSED_CARD).split())
                message(
                    f"The Hub refuses the model card's metadata: {said} The card is published without them.", "warning"
                )
                _reduce_metadata(repository / "README.md")
                list_files(repository)
                commit = self._commit(api, name, head, _without(change.kept, _additions(repository)), change)
            if tag is not None:
                self._tag(api, name, tag, commit)
        page = f"{_endpoint()}/{name}" + ("" if self._branch == _MAIN else f"/tree/{self._branch}")
        return {"destination": str(self), "repository": name, "commit": commit, "page": page}

    def holds(self, record: dict[str, Any]) -> bool:
        """Whether the commit is still there. If the Hub cannot be asked, that says nothing against it."""
        try:
            HfApi().model_info(record["repository"], revision=record["commit"])
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            return _status(error) != 404  # 401 without a token: it may be private
        except Exception:
            return True
        return True

    def _own(self, api: HfApi) -> tuple[str, _Head, bytes | None]:
        """The repository's full id, what the branch holds, and this run's record there. Raises SettingsError if that is not this run's.

        Creates the repository if it does not exist, and makes sure that the token may write to it.
        """
        name = patiently(
            lambda: api.create_repo(self._id, private=self._run.settings.hub_private, exist_ok=True)
        ).repo_id
        _refuse_readers(api, name)
        head = self._head(api, name)
        record = None
        if RECORD in head.files:
            with contextlib.suppress(EntryNotFoundError):
                record = Path(patiently(lambda: api.hf_hub_download(name, RECORD, revision=head.commit))).read_bytes()
        refuse_others(self._run, str(self), set(head.files), record, bare=EMPTY)
        return name, head, record

    def _head(self, api: HfApi, name: str) -> _Head:
        try:
            info = patiently(lambda: api.model_info(name, revision=self._branch))
            tree = patiently(lambda: list(api.list_repo_tree(name, recursive=True, revision=info.sha)))
        except RevisionNotFoundError:
            return _Head(None, {})
        files = {
            item.path: (item.size, item.lfs.sha256 if item.lfs is not None else item.blob_id)
            for item in tree
            if isinstance(item, RepoFile)
        }
        return _Head(info.sha, files)

    def _branch_off(self, api: HfApi, name: str) -> _Head:
        """Create the branch from the repository's first commit, since what came later on is another model."""
        first = patiently(lambda: api.list_repo_commits(name))[-1].commit_id
        patiently(lambda: api.create_branch(name, branch=self._branch, revision=first, exist_ok=True))
        head = self._head(api, name)
        if set(head.files) - EMPTY:
            raise SettingsError(
                f"FT_PUBLISH_TO={self}: the first commit of {name} holds files, so that a branch of it would hold them too.",
                "Name another repository, or create the branch yourself.",
            )
        return head

    def _commit(self, api: HfApi, name: str, head: _Head, additions: list[CommitOperationAdd], change: Update) -> str:
        """Make the branch hold the files, in one commit on top of `head`, and return it.

        An answer that was lost is not an answer: before anything is sent again, the branch is looked at.
        """
        for pause in (*_PAUSES_SECONDS, None):
            if _is_done(head, additions, change):
                assert head.commit is not None
                return head.commit
            try:
                api.preupload_lfs_files(name, additions, revision=self._branch, free_memory=False)
                api.create_commit(
                    name,
                    [*map(CommitOperationDelete, sorted(change.removed & set(head.files))), *additions],
                    commit_message=f"Fine-tuned model of run {self._run.id}",
                    parent_commit=head.commit,
                    revision=self._branch,
                )
                break
            except Exception as error:
                moved = self._head(api, name)
                if _is_done(moved, additions, change):
                    break  # the answer was lost, and not the commit
                if moved.commit != head.commit:
                    raise TransientError(
                        f"Somebody pushed to {self} while the model was being published.",
                        "Start the job again: it looks at what is there, and pushes on top of it if that is this run's.",
                    ) from error
                if pause is None or not is_outage(error):
                    raise
                time.sleep(pause)
        now = self._head(api, name)
        if wrong := now.differing(additions):
            raise TransientError(
                f"The bytes on the Hub differ from those sent for {', '.join(wrong)}.",
                "Start the job again to push once more.",
            )
        assert now.commit is not None
        return now.commit

    def _tag(self, api: HfApi, name: str, tag: str, commit: str) -> None:
        """Let `tag` name the commit. It may name an earlier one of the same run."""
        try:
            if patiently(lambda: api.model_info(name, revision=tag)).sha == commit:
                return
            patiently(lambda: api.delete_tag(name, tag=tag))
        except RevisionNotFoundError:
            pass
        patiently(lambda: api.create_tag(name, tag=tag, revision=commit, exist_ok=True))


def _additions(repository: Path) -> list[CommitOperationAdd]:
    return [
        CommitOperationAdd(path_in_repo=path.relative_to(repository).as_posix(), path_or_fileobj=path)
        for path in sorted(repository.rglob("*"))
        if path.is_file()
    ]


def _without(names: frozenset[str], additions: list[CommitOperationAdd]) -> list[CommitOperationAdd]:
    return [one for one in additions if one.path_in_repo not in names]


def _reduce_metadata(card: Path) -> None:
    """Leave only what this job decided itself, and not what other cards say of license and language."""
    metadata = {name: value for name, value in front_matter(card).items() if name in _OWN_METADATA}
    text = card.read_text(encoding="utf-8").split("\n---\n", 1)[1]
    card.write_text(f"---\n{yaml.safe_dump(metadata)}---\n{text}", encoding="utf-8")


def _is_done(head: _Head, additions: list[CommitOperationAdd], change: Update) -> bool:
    return head.has_all(additions) and not change.removed & set(head.files)


def _endpoint() -> str:
    """Where people read the repository: HF_ENDPOINT, without a password that may be part of it."""
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path.rstrip("/"), "", ""))


def _refuse_readers(api: HfApi, name: str) -> None:
    """Raise if the token may only read the repository: `create_repo` succeeds for one that exists."""
    try:
        patiently(lambda: api.auth_check(name, write=True))
    except HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise  # other answers: a Hub that does not know the question


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _identities(addition: CommitOperationAdd) -> list[tuple[int, str]]:
    """Size and hash under which the Hub lists a file: the SHA-256 of a large one, git's blob id of any other."""
    info = addition.upload_info
    found = [(info.size, info.sha256.hex())]
    if info.size <= 10_000_000:  # above, every file is a large one
        found.append((info.size, blob_id(Path(str(addition.path_or_fileobj)).read_bytes())))
    return found
