"""Publish a checkpoint on the Hugging Face Hub.

`push_to_hub` checks a folder or a model, adds code and a model card, and uploads everything in one commit. It consists
of `plan_push`, which needs no network, and `publish`. Only files that belong to a checkpoint are published, never the
optimiser states, logs or pickles beside them, and nothing that a link in the folder leads to.

`plan_push` copies what it publishes before it looks at it: what was checked is what is uploaded, whatever happens to
the folder meanwhile.
"""

import fnmatch
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .check import (
    CONFIG,
    PROCESSOR,
    WEIGHTS,
    WEIGHTS_INDEX,
    check_checkpoint,
    graph_files,
    read_text,
    refuse_local_details,
    weight_files,
    weights_metadata,
)
from .export_record import RECORD_FILE, exported_format
from .model_card import GENERATED_MARK, complete_card, make_model_card, read_results
from .remote_code import code_files, with_auto_map

CARD, RESULTS = "README.md", "results.json"
_EXTRA_FILES = (RESULTS, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")  # published unchanged if the folder has them
# Weights that an earlier push may have left in the repository; `from_pretrained` would prefer them to new shards.
_WEIGHT_PATTERNS = (WEIGHTS, WEIGHTS_INDEX, "model-*-of-*.safetensors")
_GRAPH_PATTERNS = (
    RECORD_FILE,
    *(
        f"{name}.{end}"
        for name in ("model", "generator", "classifier")
        for end in ("onnx*", "xml", "bin", "pt2", "pte")
    ),
)
_MAX_TEXT_BYTES = 16 * 1024**2  # of a card, a configuration, an index: the largest real ones have a hundredth of it
# Ours, and a sentence from the card that Transformers' own `push_to_hub` writes.
_GENERATED_MARKS = (GENERATED_MARK, "This model card has been automatically generated")


@dataclass(frozen=True)
class PushPlan:
    """The files that a push will publish; a context manager that deletes their copies at its end."""

    files: dict[str, Path | str]  # by name in the repository: a copy, or the text of one that differs from the folder's
    left_out: tuple[str, ...]  # names in the folder that will not be published
    card_made: bool  # whether README.md is generated; such a card never replaces one that a person wrote
    copies: "tempfile.TemporaryDirectory[str]"

    def __enter__(self) -> "PushPlan":
        return self

    def __exit__(self, *exception: object) -> None:
        self.copies.cleanup()


def push_to_hub(
    folder_or_model: Any,
    repo_id: str,
    *,
    processor: Any = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
    with_code: bool = True,
    license: str | None = None,
) -> CommitInfo:
    """Publish weights, configuration, image processor, model card and code in one commit.

    Of an exported folder its graphs are published, without code. They never replace weights on the main branch.
    Everything is checked before anything is sent. The repository is created if it does not exist, and weights in it
    that do not belong to the new checkpoint are deleted by the same commit. A README.md in the folder is published with
    the repository's name filled in; without one, a card is generated, which replaces only generated ones.

    Args:
        folder_or_model: folder of a checkpoint, which is not changed, or a model.
        processor: the model's image processor, if a model is given.
        private: whether a new repository is private; None is the owner's default. True is refused for a public one.
        token: access token that may write; None takes that of `hf auth login` or HF_TOKEN.
        revision: branch to commit to, created if it does not exist; None is the main one.
        with_code: also publish the code, for `trust_remote_code=True`.
        license: identifier of the weights' licence, for a generated card.

    Raises:
        ValueError: the checkpoint or an argument is not fit for publishing; nothing was sent.
        OSError: the Hub cannot be reached or refuses; the message has the reason and the remedy.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if isinstance(folder_or_model, str | Path):
            folder = Path(folder_or_model)
        else:
            if processor is None:
                raise ValueError("a model without its image processor cannot be used; pass processor=...")
            folder = Path(temporary)
            folder_or_model.save_pretrained(folder)
            processor.save_pretrained(folder)
        with plan_push(folder, repo_id, with_code=with_code, license=license) as plan:
            return publish(
                plan,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )


def plan_push(folder: str | Path, repo_id: str, *, with_code: bool = True, license: str | None = None) -> PushPlan:
    """Copy what `push_to_hub` would publish of a folder, and check the copies, without the network.

    Raises:
        ValueError: the folder is not fit for publishing, a file in it is a link or no ordinary file, a text in it tells
            where it was made, or the copies do not fit on the disk.
    """
    _check_repo_id(repo_id)
    folder = Path(folder)
    copies = tempfile.TemporaryDirectory(prefix="hf-segvit-push-")
    try:
        _copy_files(folder, Path(copies.name))
        try:
            files, card_made = _checked_files(Path(copies.name), repo_id, with_code, license)
        except ValueError as error:
            raise ValueError(str(error).replace(copies.name, str(folder))) from error
        names = (path.name + "/" * path.is_dir() for path in folder.iterdir())
        left_out = tuple(sorted(name for name in names if name not in files))
    except BaseException:
        copies.cleanup()
        raise
    return PushPlan(files, left_out, card_made, copies)


def _copy_files(folder: Path, copies: Path) -> None:
    """Copy the files of `folder` that may be published."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name the folder that save_pretrained or training wrote")
    present = set(os.listdir(folder))
    for name in sorted({CONFIG, PROCESSOR, CARD, *_EXTRA_FILES} & present):
        _copy(folder / name, copies / name, _MAX_TEXT_BYTES)
    settings = _settings(copies / CONFIG)
    if exported_format(settings) is not None:
        weights = [RECORD_FILE, *graph_files(folder, settings)]
    elif WEIGHTS in present:
        weights = [WEIGHTS]
    else:
        if WEIGHTS_INDEX in present:
            _copy(folder / WEIGHTS_INDEX, copies / WEIGHTS_INDEX, _MAX_TEXT_BYTES)
        weights = weight_files(folder) if {CONFIG, PROCESSOR} <= present else []
    for name in weights:
        _copy(folder / name, copies / name)


def _settings(config: Path) -> dict[str, Any]:
    """The fields of a config.json; none if it is damaged, which the check says."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _copy(source: Path, copy: Path, most_bytes: int | None = None) -> None:
    """Copy an ordinary file; a link, a device or a pipe is refused, as it shows what lies outside the folder."""
    if source.is_symlink():
        raise ValueError(
            f"{source}: is a link to {os.readlink(source)}, and only files of the folder itself are published; put a "
            "copy in its place, or remove it"
        )
    try:
        # Without waiting for the other end of a pipe, and not through a link that has just been put there.
        descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise ValueError(
            f"{source}: cannot be read ({error.strerror}); correct its permissions or remove it"
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{source}: is no ordinary file; remove it, or put a file in its place")
    with open(descriptor, "rb") as file:
        if most_bytes is not None and status.st_size > most_bytes:
            raise ValueError(
                f"{source}: has {status.st_size:,} bytes, and {most_bytes:,} are the most that is published of such a "
                "file; shorten it"
            )
        try:
            with open(copy, "wb") as target:
                shutil.copyfileobj(file, target, 4 * 1024**2)
        except OSError as error:
            raise ValueError(
                f"{source}: cannot be copied to {copy.parent.parent} ({error.strerror}), as is done before checking "
                f"and publishing; set TMPDIR to a folder with {status.st_size:,} bytes to spare"
            ) from error


def _checked_files(
    folder: Path, repo_id: str, with_code: bool, license: str | None
) -> tuple[dict[str, Path | str], bool]:
    """The files to publish of a folder that nobody else changes, and whether its card is generated."""
    checkpoint = check_checkpoint(folder)
    model_type = checkpoint.config.model_type
    with_code = with_code and bool(checkpoint.weights)  # the code loads weights, no graphs
    files: dict[str, Path | str] = {name: folder / name for name in checkpoint.files}
    for name in (CONFIG, PROCESSOR):
        files[name] = with_auto_map(read_text(folder / name), model_type, code=with_code)
    results = read_results(folder / RESULTS) if (folder / RESULTS).is_file() else []
    files.update({name: folder / name for name in _EXTRA_FILES if (folder / name).is_file()})
    if with_code:
        # Always the installed code, which has just read the checkpoint, never code that happens to be in the folder.
        files.update({path.name: path for path in code_files(model_type)})
    if (folder / CARD).is_file():
        files[CARD] = card = complete_card(read_text(folder / CARD), repo_id, with_code)
    else:
        files[CARD] = card = make_model_card(
            checkpoint.config,
            checkpoint.processor,
            repo_id=repo_id,
            num_parameters=checkpoint.num_parameters,
            results=results,
            license=license,
            with_code=with_code,
        )
    metadata = {f"{name} (metadata)": weights_metadata(folder / name) for name in checkpoint.weights}
    refuse_local_details({**_texts(files), **metadata}, repo_id)
    return files, GENERATED_MARK in card


def _texts(files: Mapping[str, Path | str]) -> dict[str, str]:
    """Card, configuration and scores, which may tell about this machine; code and licences are not ours to read."""
    names = [name for name in files if name.endswith((".md", ".json")) and name != WEIGHTS_INDEX]
    texts = {
        name: content if isinstance(content, str) else read_text(content)
        for name, content in ((name, files[name]) for name in names)
        if isinstance(content, str) or not name.startswith("LICENSE")
    }
    if RESULTS in texts:  # JSON can spell any letter as an escape, which would hide a path
        texts[RESULTS] = json.dumps(json.loads(texts[RESULTS]), ensure_ascii=False, indent=1)
    return texts


def publish(
    plan: PushPlan,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a plan; arguments, result and errors are those of `push_to_hub`."""
    if create_pr and revision is not None:
        raise ValueError(
            f"revision={revision!r} with create_pr=True: a pull request starts from main; drop one of them"
        )
    if not commit_message:
        raise ValueError("commit_message is empty; say what this version is")
    _check_token(token)
    api = HfApi(token=token, library_name="hf_segvit")
    with _explained_errors(repo_id, revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = api.model_info(repo_id, revision=revision)
        if private and not present.private:
            raise ValueError(f"{repo_id} exists and is public; make it private in its settings, or drop private=True")
        names = [file.rfilename for file in present.siblings or ()]
        if RECORD_FILE in plan.files and revision is None and not create_pr and {WEIGHTS, WEIGHTS_INDEX} & set(names):
            raise ValueError(
                f"{repo_id} holds weights for PyTorch, which an exported model would replace; publish it to another "
                f"repository, such as {repo_id}-exported, or to a branch with revision="
            )
        # One commit, so that nobody loads half a checkpoint: `upload_folder` may split a large folder into several.
        return api.create_commit(
            repo_id,
            operations=_operations(api, plan, names, repo_id, revision),
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def check_destination(repo_id: str, token: str | None = None) -> None:
    """Raise `ValueError` if a push is sure to fail; needs no network."""
    # For callers with hours of work before them: a wrong name or a missing token should not end a finished run.
    _check_repo_id(repo_id)
    _check_token(token)
    if is_offline_mode():
        raise ValueError("offline mode is on (HF_HUB_OFFLINE); unset it, or publish later with `hf-segvit push`")


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"repo_id={repo_id!r} is no name of a repository; give 'owner/name', of letters, digits and single - _ ."
        ) from error
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id!r} lacks the owner; give 'owner/name'")


def _check_token(token: str | None) -> None:
    if not (token or get_token()):
        raise ValueError(
            "no access token: run `hf auth login`, set HF_TOKEN, or pass token=; make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens"
        )


def _operations(
    api: HfApi, plan: PushPlan, present: list[str], repo_id: str, revision: str | None
) -> list[CommitOperationAdd | CommitOperationDelete]:
    files = dict(plan.files)
    if plan.card_made and CARD in present:
        downloaded = Path(api.hf_hub_download(repo_id, CARD, revision=revision))
        card = downloaded.read_text(encoding="utf-8", errors="replace")
        if not any(mark in card for mark in _GENERATED_MARKS):
            del files[CARD]
    stale = [
        name
        for name in present
        if name not in files
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in (*_WEIGHT_PATTERNS, *_GRAPH_PATTERNS))
    ]
    return [CommitOperationDelete(name) for name in stale] + [
        CommitOperationAdd(name, content.encode() if isinstance(content, str) else content)
        for name, content in sorted(files.items())
    ]


@contextmanager
def _explained_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub into one line with the reason and the remedy."""
    try:
        yield
    except ValueError as error:
        if not isinstance(error, BadRequestError):  # which is both a ValueError and an HTTP error
            raise
        raise OSError(f"the Hub refused the request: {_first_line(error)}") from error
    except Exception as error:
        # An upload that fails in a thread arrives as a RuntimeError around the real error.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        message = _explanation(cause, repo_id, revision)
        if message is None:
            raise
        raise OSError(message) from error


def _explanation(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    where = constants.ENDPOINT  # may be a private Hub
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE), so nothing was uploaded; unset it and push again"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r} at {where}; name a branch, which is made if it does not exist"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        if status == 403:
            return (
                f"the access token may not write to {repo_id} at {where}; use one that may write, of somebody who owns "
                "the repository or belongs to its organisation"
            )
        # The Hub also answers 401 for repositories that the token may not see.
        if status == 401 and not isinstance(error, RepositoryNotFoundError):
            return f"{where} does not accept the access token; run `hf auth login` again, or correct HF_TOKEN or token="
        if isinstance(error, RepositoryNotFoundError):
            return f"{where} shows no repository {repo_id} to this access token; check the name and the token's owner"
        return f"{where} answered: {_first_line(error)}; try again later, an unfinished push has published nothing"
    # By module name, as which HTTP client is installed depends on the version of huggingface_hub.
    if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore") or isinstance(error, ConnectionError):
        return (
            f"cannot reach {where} ({_first_line(error) or type(error).__name__}); check the network, the proxy "
            "settings and HF_ENDPOINT, and push again"
        )
    return None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
