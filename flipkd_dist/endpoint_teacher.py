"""The teacher behind an OpenAI-compatible endpoint that embeds.

The only module that imports openai, inside its functions. Keys are read from the environment where they are used and
are neither logged nor stored. Shapes: n texts, d the hidden size.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from flipkd_dist.errors import UserError
from flipkd_dist.model_files import one_line

PROBE = "What does it cost to send money abroad?"  # its vector stands for the model that answers
SAME_MODEL = 0.999  # cosine of two vectors of the probe; servers round a little differently from batch to batch
MAX_RETRIES = 8  # with delays of 0.5 s, doubled up to 8 s, or as long as the server says
TIMEOUT_S = 120.0  # of one request


@dataclass(frozen=True)
class Endpoint:
    """Where the model is, and how fast it may be asked."""

    api_base: str
    model: str
    api_key_env: str
    requests_per_minute: float | None  # of one worker

    @property
    def host(self) -> str:
        parts = urlsplit(self.api_base)
        return parts.netloc or self.api_base

    @property
    def name(self) -> str:
        """16 hex digits that stand for the model's name; a server may come back under another address."""
        return hashlib.blake2b(self.model.encode(), digest_size=8).hexdigest()

    def check(self) -> None:
        """
        Raises:
            UserError: the address is not one that may be written into a run folder, or there is no openai package.
        """
        parts = urlsplit(self.api_base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("teacher.api_base: not an address: write it like http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise UserError(
                "teacher.api_base: holds a name, a password or a query, which would be stored: "
                "put the key into the environment and name the variable in teacher.api_key_env"
            )
        if "openai" not in _packages():
            raise UserError('teacher.api_base: the openai package is missing: pip install "flipkd_dist[endpoint]"')


def _packages() -> set[str]:
    from importlib.util import find_spec

    try:
        return {"openai"} if find_spec("openai") else set()
    except ValueError:  # a module of that name that is blocked
        return set()


class EndpointTeacher:
    """The encoder behind an endpoint; its vectors are scaled to length 1 here.

    Args:
        endpoint: where it is.
        probe: the unit vector [d] that the model once gave for `PROBE`; None: ask for it.
        record: a file that keeps the probe's vector from the first vectors on, see `recorded_probe`.
        prompt: stands before every text.
    Raises:
        UserError: the endpoint does not answer as it should, or the model is another one than when `probe` was made.
    """

    num_truncated = 0  # the server cuts, or refuses

    def __init__(self, endpoint: Endpoint, probe: np.ndarray | None = None, record: Path | None = None, prompt=""):
        from openai import OpenAI

        endpoint.check()
        self.endpoint, self.record, self.prompt, self.hidden_size = endpoint, record, prompt, None
        key = os.environ.get(endpoint.api_key_env) or "EMPTY"  # what servers without keys are used to
        self._client = OpenAI(api_key=key, base_url=endpoint.api_base, max_retries=MAX_RETRIES, timeout=TIMEOUT_S)
        self._next = 0.0  # when the next request may go out
        answer = self._embedded([PROBE])[0]
        self.probe = answer if probe is None else probe  # the run's own, of which its specification is made
        if len(self.probe) != len(answer) or float(self.probe @ answer) < SAME_MODEL:
            where = f"remove {record}, which scores every text anew" if record else "choose another name"
            raise UserError(
                f"teacher {endpoint.model} at {endpoint.host}: gives another vector than when this run began, so the "
                f"model has changed: bring the old one back, or {where}"
            )

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Unit vectors of the texts, float32 [n, d], in the order given.

        Args:
            batch_size: texts of one request.
        Raises:
            UserError: the endpoint fails for good, refuses a text, or gives what is no vector.
        """
        vectors = np.empty((len(texts), self.hidden_size), np.float32)
        if texts and self.record and not self.record.exists():
            _write_record(self.record, self.endpoint, self.probe)
        for start in range(0, len(texts), batch_size):
            batch = [self.prompt + text for text in texts[start : start + batch_size]]
            vectors[start : start + len(batch)] = self._embedded(batch)
        return vectors

    def _embedded(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [n, d] of the texts of one request; a refused request is split down to the text to blame."""
        from openai import APIStatusError

        try:
            answer = self._asked(lambda: self._ask(texts))
        except APIStatusError as error:  # one of 400, 413 and 422
            if len(texts) > 1:
                half = len(texts) // 2
                return np.concatenate([self._embedded(texts[:half]), self._embedded(texts[half:])])
            raise UserError(
                f"teacher {self.endpoint.model} at {self.endpoint.host}: refuses the text {texts[0][:60]!r} of "
                f"{len(texts[0])} characters ({self._safe(error)}): shorten it, or serve a model that takes it"
            ) from None
        try:
            rows = {item.index: item.embedding for item in answer.data}
            if sorted(rows) != list(range(len(texts))) or len(answer.data) != len(texts):
                raise ValueError(f"{len(answer.data)} vectors for {len(texts)} texts")
            vectors = np.array([rows[row] for row in range(len(texts))], np.float32)
        except (AttributeError, TypeError, ValueError) as error:
            raise self._failed(f"does not answer with one vector per text ({self._safe(error)})") from None
        if vectors.ndim != 2 or self.hidden_size not in (None, vectors.shape[1]):
            raise self._failed(f"gives vectors of {vectors.shape[-1]} numbers, before of {self.hidden_size}")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or not lengths.all():
            raise self._failed("gives a vector that is zero or not finite")
        self.hidden_size = vectors.shape[1]
        return vectors / lengths

    def _ask(self, texts: list[str]):
        return self._client.embeddings.create(model=self.endpoint.model, input=texts, encoding_format="float")

    def _asked(self, ask: Callable):
        """The answer to one request, at its time; errors that a refused text may explain pass through."""
        import openai

        if self.endpoint.requests_per_minute:
            time.sleep(max(0.0, self._next - time.monotonic()))
            self._next = time.monotonic() + 60 / self.endpoint.requests_per_minute
        key = f"the key in {self.endpoint.api_key_env}"
        try:
            return ask()
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            raise
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            there = "is refused" if os.environ.get(self.endpoint.api_key_env) else "is missing"
            raise self._failed(f"{key} {there}", f"set {self.endpoint.api_key_env} to a valid one") from None
        except openai.NotFoundError as error:
            raise self._failed(
                f"no such model or address ({self._safe(error)})", "correct teacher.model_name_or_path or api_base"
            ) from None
        except openai.APIConnectionError as error:  # time-outs too
            raise self._failed(
                f"cannot be reached ({self._safe(error)})", "is it running at teacher.api_base?"
            ) from None
        except openai.APIStatusError as error:
            if error.status_code == 413:
                raise
            remedy = "lower teacher.requests_per_minute" if error.status_code == 429 else "look at the server's log"
            raise self._failed(
                f"fails after {MAX_RETRIES} retries with status {error.status_code} ({self._safe(error)})", remedy
            ) from None
        except Exception as error:  # no JSON, or JSON of another kind
            raise self._failed(f"does not answer with embeddings ({self._safe(error)})") from None

    def _safe(self, error: Exception) -> str:
        """The message in one line, without the key, which some servers repeat."""
        cause = error.__cause__ if str(error) == "Connection error." and error.__cause__ else error
        text, key = str(cause) or type(cause).__name__, self._client.api_key
        return one_line(Exception(text if key == "EMPTY" else text.replace(key, "***")))  # before it is cut short

    def _failed(self, what: str, remedy: str = "is teacher.api_base that of an OpenAI-compatible server?") -> UserError:
        return UserError(f"teacher {self.endpoint.model} at {self.endpoint.host}: {what}: {remedy}")


def recorded_probe(path: Path) -> np.ndarray | None:
    """The probe's vector [d] that a run began with; None where there is none yet.

    Raises:
        UserError: the file is damaged.
    """
    try:
        probe = np.array(json.loads(path.read_text(encoding="utf-8"))["probe"], np.float32)
        if probe.ndim != 1 or not len(probe) or not np.isfinite(probe).all():
            raise ValueError("no vector")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({one_line(error)}): remove it, which scores every text anew") from None
    return probe


def _write_record(path: Path, endpoint: Endpoint, probe: np.ndarray) -> None:
    """Whole or not at all; workers that write at once write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    record = {"api_base": endpoint.api_base, "model": endpoint.model, "probe": [float(value) for value in probe]}
    draft.write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(draft, path)


def probe_fingerprint(endpoint: Endpoint, probe: np.ndarray) -> str:
    """32 hex digits that stand for the model's name and the probe's vector, rounded to 3 decimals."""
    rounded = np.round(probe.astype(np.float64), 3) + 0.0  # no negative zeros
    return hashlib.blake2b(f"{endpoint.name}\0{rounded.tolist()}".encode(), digest_size=16).hexdigest()
