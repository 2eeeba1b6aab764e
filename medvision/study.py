"""Hyper-parameter search: a space, what Optuna proposes in it, and the journal in a file that processes share.

TPE: Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011. ASHA: Li et al., A System for
Massively Parallel Hyperparameter Tuning, MLSys 2020. Optuna is imported when a study is opened.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medvision.errors import MedvisionError
from medvision.files import locked

if TYPE_CHECKING:
    import optuna

NAME, ASKED, RUNGS, REASON = "search", "asked", "rungs", "reason"
"""Of the study in the journal, of its attributes, and of that of a failed trial."""


@dataclass(frozen=True)
class Dimension:
    """One value that is searched for.

    Attributes:
        name: Its key.
        choices: The values to choose from, as typed; empty for a number.
        low: The smallest number; an int where only ints are wanted.
        high: The largest number, itself included.
        step: The distance between numbers; None: any float, each int.
        log: Whether orders of magnitude are equally likely; without `step`.
    """

    name: str
    choices: tuple[str, ...] = ()
    low: int | float = 0
    high: int | float = 0
    step: int | float | None = None
    log: bool = False

    @property
    def first(self) -> str:
        """The first choice or the smallest number, as typed."""
        return self.text(self.choices[0] if self.choices else self.low)

    def text(self, value: str | int | float) -> str:
        """A value as it is typed; a float with six digits."""
        if not isinstance(value, float):
            return str(value)
        text = f"{value:.6g}"
        return text if set(text) & set(".e") else f"{text}.0"

    def suggest(self, trial: "optuna.Trial") -> None:
        """Has a value proposed, unless the trial has one."""
        if self.choices:
            trial.suggest_categorical(self.name, self.choices)
        elif isinstance(self.low, int):
            trial.suggest_int(self.name, self.low, int(self.high), step=int(self.step or 1), log=self.log)
        else:
            trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)


@dataclass(frozen=True)
class Trial:
    """What became of one proposal.

    Attributes:
        number: From 0; its folder has the same name.
        state: `running`, `complete`, `pruned` or `fail`.
        params: The values, as typed.
        value: The monitored metric of the best epoch, of a pruned trial that of its last; None where there is none.
        epochs: The metric after each epoch, counted from 1.
        reason: Why it failed.
    """

    number: int
    state: str
    params: dict[str, str]
    value: float | None = None
    epochs: dict[int, float | None] = field(default_factory=dict)
    reason: str | None = None


class Study:
    """The trials of a search. What is proposed depends on the seed, the number and the trials before, and on no more.

    Args:
        journal: A file, made if it is missing; processes share it.
        space: What is searched for.
        maximise: Whether the metric is the better the larger.
        seed: Of the sampler, 0 or more.
        rungs: Epochs before a trial may be pruned, and the reduction factor; None: none is pruned.
        asked: What has to be the same whenever the journal is opened.

    Raises:
        MedvisionError: If Optuna is missing, or the journal is of another search.
    """

    def __init__(
        self,
        journal: Path,
        space: Sequence[Dimension],
        maximise: bool,
        seed: int,
        rungs: tuple[int, int] | None,
        asked: Mapping[str, object],
    ) -> None:
        optuna = require_optuna()
        self.study = optuna.create_study(
            study_name=NAME,
            storage=_storage(journal),
            direction="maximize" if maximise else "minimize",
            load_if_exists=True,
        )
        self.space, self._seed, self._lock = tuple(space), seed, threading.Lock()
        if ASKED not in self.study.user_attrs:
            self.study.set_user_attr(RUNGS, rungs)
            self.study.set_user_attr(ASKED, dict(asked))
        before = self.study.user_attrs[ASKED]
        changes = [
            f"{key}: {before.get(key, 'not there')} -> {asked.get(key, 'not there')}"
            for key in sorted(before.keys() | asked.keys())
            if before.get(key) != asked.get(key)
        ]
        if changes:
            raise MedvisionError(
                f"{journal.parent} holds a search for something else:\n  " + "\n  ".join(changes) + "\nType the same "
                "again to go on with it, or choose another folder with hydra.sweep.dir=<folder>"
            )
        self._left = [trial.number for trial in self.trials if trial.state == "running"]

    @property
    def trials(self) -> list[Trial]:
        """All of them."""
        return [self._plain(trial) for trial in self.study.get_trials(deepcopy=False)]

    def next(self, trials: int) -> Trial | None:
        """The next trial to be run: first those that a process left when it ended, then new ones.

        Args:
            trials: How many there shall be; once there are, the answer is None.
        """
        import optuna

        with self._lock:
            if self._left:
                left = self.study.get_trials(deepcopy=False)[self._left.pop(0)]
                trial = optuna.Trial(self.study, left._trial_id)
            elif len(self.study.get_trials(deepcopy=False)) < trials:
                trial = self.study.ask()
            else:
                return None
            # one sampler for all trials would begin with the same draws again in each process
            seed = int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0])
            self.study.sampler = optuna.samplers.TPESampler(seed=seed)
            for dimension in self.space:
                dimension.suggest(trial)
            return self.trials[trial.number]

    def complete(self, number: int, value: float) -> None:
        """Ends a trial with the metric of its best epoch."""
        self._tell(number, value)

    def prune(self, number: int) -> None:
        """Ends a trial that was stopped early."""
        self._tell(number, state="PRUNED")

    def fail(self, number: int, reason: str) -> None:
        """Ends a trial that has no result."""
        with self._lock:
            trial = self.study.get_trials(deepcopy=False)[number]
            self.study._storage.set_trial_user_attr(trial._trial_id, REASON, reason)
        self._tell(number, state="FAIL")

    def _tell(self, number: int, value: float | None = None, state: str = "COMPLETE") -> None:
        import optuna

        with self._lock:
            self.study.tell(number, value, state=optuna.trial.TrialState[state])

    @property
    def best(self) -> Trial | None:
        """The complete trial with the best value; of equal ones the first."""
        sign = -1 if self.study.direction.name == "MAXIMIZE" else 1
        complete = [t for t in self.trials if t.state == "complete" and t.value is not None]
        return min(complete, key=lambda t: sign * (t.value or 0.0), default=None)

    def importance(self) -> dict[str, float]:
        """The share of the variance of complete trials' values that each dimension explains (fANOVA), largest first.

        Hutter et al., An Efficient Approach for Assessing Hyperparameter Importance, ICML 2014. Empty below four
        trials, or where all are equally good.
        """
        import optuna

        values = [t.value for t in self.trials if t.state == "complete"]
        if len(values) < 4 or len(set(values)) == 1:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self._seed)
        found = optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}

    def _plain(self, trial: "optuna.trial.FrozenTrial") -> Trial:
        dimensions = [d for d in self.space if d.name in trial.params]
        epochs = {n: None if math.isnan(v) else v for n, v in sorted(trial.intermediate_values.items())}
        return Trial(
            trial.number,
            trial.state.name.lower(),
            {d.name: d.text(trial.params[d.name]) for d in dimensions},
            trial.value,
            epochs,
            trial.user_attrs.get(REASON),
        )


class Report:
    """One trial, seen from the process that runs it.

    Args:
        journal: That of the study.
        number: Of the trial.
    """

    def __init__(self, journal: Path, number: int) -> None:
        optuna = require_optuna()
        if not journal.exists():
            raise MedvisionError(f"{journal}, the journal of the search of which this run is a trial, is missing")
        study = optuna.load_study(study_name=NAME, storage=_storage(journal))
        rungs = study.user_attrs[RUNGS]
        study.pruner = optuna.pruners.SuccessiveHalvingPruner(*rungs) if rungs else optuna.pruners.NopPruner()
        self._trial = optuna.Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)
        self._last = max(study.get_trials(deepcopy=False)[number].intermediate_values, default=0)

    def __call__(self, epoch: int, value: float) -> bool:
        """Reports the metric after an epoch; whether the trial shall be stopped.

        An epoch that a resumed run repeats keeps its first value, and is decided upon only if it was the last.
        """
        if epoch > self._last:
            self._trial.report(value, epoch)
            self._last = epoch
        return epoch == self._last and self._trial.should_prune()


class _Lock:
    """Of a journal: the system lets go of it when the process ends, however it ends. Optuna's would stay behind.

    A line that a process could not finish is taken away, so that the next begins a line of its own.
    """

    def __init__(self, journal: Path) -> None:
        self._journal, self._held = journal, ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(locked(self._journal.with_name(f".{self._journal.name}.lock")))
        with self._journal.open("r+b") as handle:
            handle.seek(max(0, handle.seek(0, 2) - 1))
            if handle.read(1) not in (b"\n", b""):
                handle.seek(0)
                handle.truncate(handle.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._held.close()


def _storage(journal: Path) -> Any:
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    return JournalStorage(JournalFileBackend(str(journal), lock_obj=_Lock(journal)))  # type: ignore[arg-type]


def require_optuna() -> Any:
    """Optuna, whose messages go where ours go, warnings alone.

    Raises:
        MedvisionError: If it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise MedvisionError("a search needs Optuna, which is not installed: pip install optuna") from None
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
