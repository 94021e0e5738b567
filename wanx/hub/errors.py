"""Errors of the hub and of the way to it, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from wanx.errors import CorruptInputError, EnvironmentMismatchError, UsageError, WanxError
from wanx.hub.official import nearest
from wanx.hub.reference import SCHEME, HubReference

_SIGN_IN = "set HF_TOKEN, or run `hf auth login`"


@contextmanager
def one_line(reference: HubReference) -> Iterator[None]:
    """Turn what ``huggingface_hub`` raises about a repository into errors that say what to do.

    Raises:
        UsageError: there is no such repository or revision, or it is no repository of models.
        EnvironmentMismatchError: it may not be read without a token, or the hub is not reached.
        WanxError: anything else that the hub answers, or the disk does.
    """
    try:
        yield
    except WanxError:
        raise
    except Exception as error:
        raise _explained(error, reference) from error


def _explained(error: Exception, reference: HubReference) -> WanxError:
    from huggingface_hub import errors

    repository, status = reference.repository, _status(error)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{reference} is no name of a repository; write owner/name")
    if isinstance(error, errors.GatedRepoError):
        return EnvironmentMismatchError(
            f"{repository} is gated: accept its terms at {_page(reference)}, then {_SIGN_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(
            f"{repository} has no revision {reference.revision or 'main'}; see "
            f"{_page(reference)}/tree/main for its branches and tags"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _not_found(reference)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return EnvironmentMismatchError(
            f"{reference} is not here, and the hub is not asked, as HF_HUB_OFFLINE is set; unset it"
        )
    if status in (401, 403):
        return EnvironmentMismatchError(
            f"the hub lets nobody read {reference} with this token ({status}); {_SIGN_IN} as "
            "somebody who may"
        )
    if status == 429 or (status is not None and status >= 500):
        return EnvironmentMismatchError(
            f"the hub answers {status} about {reference}; try again later"
        )
    if status is not None:
        return WanxError(f"the hub answered {status} about {reference}; check HF_ENDPOINT")
    if _is_of_network(error):
        return EnvironmentMismatchError(
            f"{reference} is not here, and the hub is not reached ({type(error).__name__}); check "
            "the network, "
            "HF_ENDPOINT and the proxy, and run the command again: what is complete is kept"
        )
    if isinstance(error, OSError) and error.strerror:
        return WanxError(
            f"{reference} cannot be stored in {error.filename or 'the cache of the hub'}: "
            f"{error.strerror}; check the disk, or set HF_HOME to another one"
        )
    reason = " ".join(str(error).split())[:160]
    if "Consistency check failed" in reason:
        return CorruptInputError(
            f"a file of {reference} arrived with another size than the hub says; run the command "
            "again"
        )
    return WanxError(f"{reference} cannot be fetched ({type(error).__name__}: {reason})")


def _not_found(reference: HubReference) -> WanxError:
    """There is no such repository of models, or none that this token may see."""
    from huggingface_hub import HfApi

    repository = reference.repository
    with suppress(Exception):  # only for a better message
        for kind, words in (("dataset", "a data set"), ("space", "a space")):
            if HfApi().repo_exists(repository, repo_type=kind):
                return UsageError(
                    f"{repository} is {words}, not a model; give a repository with a checkpoint or "
                    "a bundle"
                )
    similar = nearest(repository)
    hint = f"did you mean {similar}?" if similar and similar != repository else (
        f"a private one is read with a token: {_SIGN_IN}"
    )  # fmt: skip
    return UsageError(
        f"{repository} is neither a folder here nor a model on the hub; {hint}"
        + ("" if similar else f" (repositories are named {SCHEME}owner/name)")
    )


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _is_of_network(error: BaseException | None) -> bool:
    """True if the cause is a connection; its class depends on the version of huggingface_hub."""
    while error is not None:
        modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
        if modules & {"httpx", "httpx2", "httpcore", "requests", "urllib3", "ssl"}:
            return True
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        error = error.__cause__
    return False


def _page(reference: HubReference) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{reference.repository}"
