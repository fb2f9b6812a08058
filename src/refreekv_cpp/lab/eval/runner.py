"""Runs items with caches. The first cache is the reference: for every item it answers first, and each cache is then
compared on what it said.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refreekv_cpp.lab.divergence import Logits
from refreekv_cpp.lab.eval.data import Item
from refreekv_cpp.lab.eval.fidelity import compare, first_divergence
from refreekv_cpp.lab.eval.prompts import Prompt
from refreekv_cpp.lab.eval.records import Record, keep_settings, open_for_more, read_records
from refreekv_cpp.lab.eval.scores import score
from refreekv_cpp.lab.eval.session import Session
from refreekv_cpp.lab.eval.spec import Spec
from refreekv_cpp.lab.eval.turn import Answer, Mode, Settings, Turn
from refreekv_cpp.policies import Full


@dataclass(frozen=True)
class Task:
    item: Item
    prompt: Prompt


@dataclass(frozen=True)
class Job:
    task: Task
    spec: Spec
    mode: Mode

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task.item.id, self.spec.text, self.mode


def modes_of(item: Item, modes: Sequence[Mode]) -> list[Mode]:
    """A question can be hidden only where there is one, and a context to compress without it."""
    return list(modes) if item.context and not item.is_continuation else ["seen"]


class Run:
    """A folder with the records of one model on some items.

    A run that was stopped goes on where it was. Its records are the same as if it had not been, but for their seconds.
    It can go on with more items and other caches, too: what is recorded stays.

    Args:
        specs: caches; the first one is the reference.

    Raises:
        ValueError: the folder holds a run of another model or with other settings, or one of these items was another
            one when it was recorded.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        tasks: Sequence[Task],
        specs: Sequence[Spec],
        modes: Sequence[Mode],
        settings: Settings,
    ) -> None:
        self.folder, self.model, self.tasks, self.specs, self.settings = folder, model, tasks, specs, settings
        keep_settings(folder, {"model": model.name, "model_bytes": model.stat().st_size, **asdict(settings)})
        records = read_records(folder)
        hashes = {task.item.id: _hash(task.item) for task in tasks}
        for record in records:
            if record["item"] in hashes and record.get("item_sha256") != hashes[record["item"]]:
                raise ValueError(
                    f"{folder}: the item {record['item']} was another one when it was recorded, or an earlier version "
                    "recorded it; take another --out"
                )
        done = {(record["item"], record["cache"], record["mode"]) for record in records}
        jobs = [Job(task, spec, mode) for task in tasks for spec in specs for mode in modes_of(task.item, modes)]
        self.jobs = [job for job in jobs if job.key not in done]
        self.n_done = len(jobs) - len(self.jobs)
        # who reads a prompt for all caches of its type; a list that goes on must not depend on what was done before
        self._sources: dict[str, Spec] = {}
        for spec in specs:
            if self._is_full(spec):
                self._sources.setdefault(spec.cache_type, spec)

    def go(self, working: Callable[[str], None], done: Callable[[Job], None]) -> None:
        """Does what is left. `working` is told what comes next, for a person; `done` each job that has been written.

        Raises:
            ValueError: the model cannot have one of the caches.
        """
        n_ctx = max(task.prompt.n_tokens for task in self.tasks) + self.settings.n_continuation
        n_ctx += self.settings.n_second
        with ExitStack() as stack, open_for_more(self.folder) as out:
            sessions: dict[str, Session] = {}
            for spec in dict.fromkeys([*self._sources.values(), *(job.spec for job in self.jobs)] if self.jobs else []):
                working(f"loading the model for {spec.text}")
                session = Session(
                    self.model,
                    spec,
                    n_ctx=n_ctx,
                    n_threads=self.settings.n_threads,
                    flash_attn=self.settings.flash_attn,
                    n_gpu_layers=self.settings.n_gpu_layers,
                    kv_memory_limit=self._limit_of(spec),
                    **self.settings.options,
                )
                stack.callback(session.close)
                sessions[spec.text] = session
            for task in self.tasks:
                jobs = [job for job in self.jobs if job.task is task]
                if jobs:
                    self._run_item(task, jobs, sessions, working, lambda job, record: _write(out, record, job, done))

    def _limit_of(self, spec: Spec) -> int | None:
        return None if self._is_full(spec) else self.settings.kv_memory_limit

    def _is_full(self, spec: Spec) -> bool:
        return spec == self.specs[0] or isinstance(spec.policy, Full)

    def _run_item(
        self,
        task: Task,
        jobs: Sequence[Job],
        sessions: dict[str, Session],
        working: Callable[[str], None],
        write: Callable[[Job, Record], None],
    ) -> None:
        modes = list({job.mode for job in jobs})
        read: dict[str, Turn] = {}  # by type
        for cache_type, spec in self._sources.items():
            if spec == self.specs[0] or any(job.spec.cache_type == cache_type for job in jobs):
                working(f"{task.item.id}: {spec.text}")
                read[cache_type] = Turn(sessions[spec.text], task.prompt, "seen", self.settings, save=modes)
        reference = read[self.specs[0].cache_type]
        said = reference.answer()
        for job in jobs:
            working(f"{task.item.id}: {job.spec.text}, question {job.mode}")
            if job.spec == self.specs[0]:
                # once more: a difference from itself would show that something is wrong
                write(job, _record(job, reference, reference, said, reference.answer_again(said)))
                continue
            source = read.get(job.spec.cache_type)
            if self._limit_of(job.spec) is not None:
                source = None  # what the full cache has read would not fit
            if source is not None and source.session is sessions[job.spec.text]:
                turn = source  # nothing is pruned: whether a question is seen makes no difference
                turn.go_back()
            else:
                turn = Turn(sessions[job.spec.text], task.prompt, job.mode, self.settings, source=source)
            write(job, _record(job, turn, reference, said, turn.answer(said)))


def _write(out: Any, record: Record, job: Job, done: Callable[[Job], None]) -> None:
    out.write(json.dumps(record) + "\n")
    out.flush()
    done(job)


def _hash(item: Item) -> str:
    return hashlib.sha256(json.dumps(item.as_dict()).encode()).hexdigest()


def _record(job: Job, turn: Turn, reference: Turn, said: Answer, answer: Answer) -> Record:
    """A line of records.jsonl; docs/reference/files.md describes it."""
    item, session, stats = job.task.item, turn.session, turn.stats
    # a pruning that comes after the question leaves the first prediction as it was
    skip = 1 if job.mode == "seen" else 0

    def fidelity(full: Logits, pruned: Logits, tokens: Sequence[int]) -> dict[str, Any]:
        return asdict(compare(full[skip:], pruned[skip:], tokens[skip:]))

    text = session.text(answer.tokens)
    record: Record = {
        "item": item.id,
        "item_sha256": _hash(item),
        "dataset": item.dataset,
        "cache": job.spec.text,
        "mode": job.mode,
        "meta": {name: item.meta[name] for name in ("depth", "length") if name in item.meta},
        "n_tokens": stats.n_tokens,
        "budget": stats.budget,
        "cells_kept": list(stats.cells_kept),
        "bytes": turn.n_bytes,
        "bytes_reference": reference.stats.bytes,
        "greedy": fidelity(said.logits, answer.logits, said.tokens),
        "real": fidelity(said.real_logits, answer.real_logits, turn.real),
        "divergence": first_divergence(answer.tokens, said.tokens),
        "n_answer": len(answer.tokens),
        "answer": text,
        "score_name": None if item.is_continuation else item.score,
        "score": None if item.is_continuation else score(item.score, text, item.question.answers),
        "seconds": {
            "prefill": turn.prefill_s,
            "prune": turn.prune_s,
            "decode": statistics.median(turn.decode_s) if turn.decode_s else None,
        },
    }
    if item.second is not None and answer.second_tokens is not None:
        second = session.text(answer.second_tokens)
        record |= {"second_answer": second, "second_score": score(item.score, second, item.second.answers)}
    return record
