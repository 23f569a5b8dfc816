"""What an evaluation worker does: load a checkpoint once, score shards of its documents, put the result together.

A shard's scores are written to a temporary name and renamed, so that whoever comes next finds whole shards or none:

    RUN/evals/work/KEY/shard-00003-of-00008.json
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import traceback
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longspan.errors import EXIT_UNEXPECTED, DataError, LongspanError
from longspan.trainer.evaluation.events import note
from longspan.trainer.evaluation.folders import read_result, work_folder
from longspan.trainer.evaluation.specs import parse_spec

MIN_SHARDS = 8  # of a small corpus, so that several workers share it
TRANSIENT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EROFS)


class EvaluationWorker:
    """Keeps the last checkpoint that it was asked about; torch is loaded where this runs, not where it is named."""

    def __init__(self) -> None:
        """Import everything, so that a task's time is its own."""
        from longspan.trainer.evaluation import run

        self._run = run
        self._device = run.default_device()
        self._prepared: Any = None

    def run(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        """Do one step of an evaluation; never raises.

        Args:
            method: `open`, `score` or `finish`.
            request: key, checkpoint, spec (JSON), out (RUN/evals), attempt; for `score` also shard.

        Returns:
            What the step found; on failure `reason`, `exit_code` and `transient` (worth another try as it is).
        """
        try:
            steps = {"open": self._open, "score": self._score, "finish": self._finish}
            return steps[method](request)
        except LongspanError as error:
            return {"reason": str(error), "exit_code": error.exit_code, "transient": False}
        except OSError as error:
            return {"reason": str(error), "exit_code": EXIT_UNEXPECTED, "transient": is_transient(error)}
        except Exception:
            return {"reason": traceback.format_exc(limit=-6), "exit_code": EXIT_UNEXPECTED, "transient": False}

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        """How many shards there are, and which are done."""
        shards = self._shards(self._load(request))
        out, key = Path(request["out"]), request["key"]
        done = [i for i in range(len(shards)) if _read_shard(_shard_file(out, key, i, len(shards)), key) is not None]
        return {"shards": len(shards), "done": done}

    def _score(self, request: dict[str, Any]) -> dict[str, Any]:
        """Score one shard and keep it."""
        started = time.monotonic()
        prepared = self._load(request)
        shards, number = self._shards(prepared), request["shard"]
        out, key = Path(request["out"]), request["key"]
        scores = [asdict(score) for score in prepared.score(shards[number])]
        content = {"key": key, "seconds": time.monotonic() - started, "scores": scores}
        _write_shard(_shard_file(out, key, number, len(shards)), content)
        note(out, "scored", key, shard=number, attempt=request["attempt"])
        return {}

    def _finish(self, request: dict[str, Any]) -> dict[str, Any]:
        """Put all shards together and publish the result; `missing` if shards are not there or damaged."""
        prepared = self._load(request)
        out, key = Path(request["out"]), request["key"]
        if read_result(out / key) is None:
            count = len(self._shards(prepared))
            parts = [_read_shard(_shard_file(out, key, i, count), key) for i in range(count)]
            missing = [i for i, part in enumerate(parts) if part is None]
            if missing:
                return {"missing": missing}
            scores = [prepared.score_type(**score) for part in parts if part for score in part["scores"]]
            scores.sort(key=lambda score: score.key)
            result = prepared.assemble(scores)
            result["seconds"] = round(sum(part["seconds"] for part in parts if part), 3)
            self._run.publish(out / key, result)
        shutil.rmtree(work_folder(out, key), ignore_errors=True)
        return {}

    def _load(self, request: dict[str, Any]) -> Any:
        """The evaluation laid out, its model in memory; the one of the last call if it is the same."""
        checkpoint = Path(request["checkpoint"])
        at_hand = self._prepared is not None and self._prepared.loaded.path == checkpoint  # not a copy elsewhere
        if not at_hand or self._prepared.key != request["key"]:
            spec = parse_spec(request["spec"])
            loaded = self._reuse(checkpoint)
            self._prepared = None  # free the memory of the model before, if it is another one
            loaded = loaded or self._run.load_model(checkpoint, self._device)
            reader = self._run.open_evaluated_corpus(spec, loaded)
            try:
                prepared = self._run.prepare(loaded, spec, reader, self._device)
            finally:
                reader.close()
            if prepared.key != request["key"]:
                raise DataError(
                    f"{checkpoint} or its corpus changed after this evaluation was submitted (its key was "
                    f"{request['key']}, is {prepared.key}). The next pass evaluates what is there now."
                )
            self._prepared = prepared
        return self._prepared

    def _reuse(self, checkpoint: Path) -> Any:
        """The model in memory, if it is of this checkpoint as it is now."""
        from longspan.trainer.checkpoint.verify import fingerprint

        loaded = self._prepared.loaded if self._prepared is not None else None
        same = loaded is not None and loaded.path == checkpoint and fingerprint(checkpoint) == loaded.fingerprint
        return loaded if same else None

    def _shards(self, prepared: Any) -> list[list[int]]:
        """Indices of the documents of each shard: neighbours in length, as many as stream together or fewer."""
        from longspan.trainer.evaluation.windows import STREAM_TOKENS

        lengths = [len(document.tokens) for document in prepared.documents]
        order = sorted(range(len(lengths)), key=lambda d: (lengths[d], d))
        size = min(max(1, prepared.spec.batch_tokens // STREAM_TOKENS), -(-len(order) // MIN_SHARDS))
        return [order[start : start + size] for start in range(0, len(order), size)]


def is_transient(error: OSError) -> bool:
    """Whether the machine is at fault rather than what was asked for, so that another try costs nothing."""
    return error.errno in TRANSIENT


def _shard_file(out: Path, key: str, number: int, count: int) -> Path:
    return work_folder(out, key) / f"shard-{number:05d}-of-{count:05d}.json"


def _read_shard(path: Path, key: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content if content["key"] == key and content["scores"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_shard(path: Path, content: dict[str, Any]) -> None:
    for folder in (path.parents[2], path.parents[1], path.parent):  # evals, work, KEY: a deleted run stays deleted
        folder.mkdir(exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
