"""`python -m medvision.search 'optimizer.lr=tag(log,interval(1e-4,1e-2))'`: the values that are best on validation."""

import json
import logging
import math
import shlex
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from medvision import cli
from medvision.configs import flat, portable, prepare, require_own
from medvision.errors import MedvisionError
from medvision.files import locked, writable_folder, write_json
from medvision.launchers import gpus
from medvision.launchers.jobs import LOG, Outcome, finished, run_job, share_of_cpus
from medvision.runs import RunFolder
from medvision.study import Dimension, Study, Trial, require_optuna
from medvision.terminal import command, print_rows, quoted

log = logging.getLogger("medvision.search")  # __name__ is __main__ here

SPACE = (
    "choice(a,b), range(start,stop,step), interval(low,high), int(interval(low,high)) or tag(log,interval(low,high))"
)
KILLED = "killed by signal"
"""How the reason begins why a process failed that did not end by itself."""
SHOWN = 10
"""Rows of the table at the end."""


def start(cfg: DictConfig, folder: Path, typed: list[str]) -> None:
    """Runs trials until there are as many as asked for, and ends with the best values, in figures and files as well.

    Raises:
        MedvisionError: If the space or an option is refused, before any trial; or at the end, if trials failed.
    """
    _check(cfg)
    words = [*as_words(typed), "test=false"]
    space = [word for word in words if isinstance(word, Dimension)]
    require_optuna()
    place = folder.expanduser().resolve()
    journal = place / "search.journal"
    require_own(journal)
    if not journal.exists():
        _probe(words, cfg)
    with locked(
        writable_folder(place, "hydra.sweep.dir=<folder> or MEDVISION_RUNS") / ".lock",
        busy=f"{place} is being searched by another process; wait for it, or stop it and ask for more search.workers",
    ):
        options, task = cfg.search, cfg.task
        rungs = (options.min_epochs, options.reduction_factor) if options.prune else None
        asked = {key: value for key, value in flat(portable(cfg)).items() if not key.startswith(("paths.", "search."))}
        asked |= {cli.parsed(o).get_key_element(): o.partition("=")[2] for o in typed if not _of_the_search(o)}
        asked |= {"search.seed": options.seed}
        asked["search.prune"] = "false" if rungs is None else f"after {rungs[0]} epochs, by {rungs[1]}"
        study = Study(journal, space, task.mode == "max", options.seed, rungs, asked)
        wanted, count = gpus.wish(cfg.trainer.accelerator, cfg.trainer.devices), gpus.processes(cfg.trainer.devices)
        search = Search(place, study, words, options.trials, options.workers, options.timeout, wanted, count)
        log.info("search folder: %s; %s goes on with it after any stop", place, search.again)
        search.run()
        report(search, task.monitor, task.mode == "max", cfg.data.spec.name)
    _complain(search)


@dataclass
class Search:
    """Trials and the processes that train them.

    Attributes:
        folder: Of the search; trials lie below it by their numbers.
        study: What proposes and remembers them.
        words: The command line of a training, in which each dimension stands for the value of a trial.
        trials: How many there shall be.
        workers: How many at once.
        timeout: Seconds after which no trial is begun; None: never.
        wish: What each needs of the GPUs here, of which none has two trials.
        processes: How many each trains by.
    """

    folder: Path
    study: Study
    words: list[str | Dimension]
    trials: int
    workers: int
    timeout: float | None
    wish: gpus.Wish
    processes: int
    _stop: threading.Event = field(default_factory=threading.Event)
    _composing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def again(self) -> str:
        """The word with which the same command goes on, as the shell reads it."""
        return shlex.quote(f"hydra.sweep.dir={quoted(self.folder)}")

    def overrides(self, trial: Trial) -> list[str]:
        """The values of a trial among those that all have."""
        return [w if isinstance(w, str) else f"{w.name}={trial.params[w.name]}" for w in self.words]

    def place(self, trial: Trial) -> RunFolder:
        """Its run folder."""
        return RunFolder(self.folder / str(trial.number))

    def run(self) -> None:
        """Runs trials, those that an earlier process left first.

        Raises:
            MedvisionError: If it was interrupted; what was running is gone on with by the next start.
        """
        here = gpus.visible() if self.wish else []
        gpus.check(self.wish, here)
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._work, here, time.monotonic()) for _ in range(self.workers)]
            try:
                for future in futures:
                    future.result()
            except BaseException as error:
                self._stop.set()
                if isinstance(error, KeyboardInterrupt):
                    raise MedvisionError(f"interrupted; {self.again} goes on") from None
                raise

    def _work(self, here: list[str], began: float) -> None:
        while not self._stop.is_set() and (self.timeout is None or time.monotonic() < began + self.timeout):
            trial = self.study.next(self.trials)
            if trial is None:
                return
            self._train(trial, here)

    def _train(self, trial: Trial, here: list[str]) -> None:
        """Trains a trial, unless its folder tells that only the journal does not know of its end."""
        place, reason = self.place(trial), ""
        values = ", ".join(f"{name}={value}" for name, value in trial.params.items())
        if not (place.metrics.exists() or place.pruned.exists()):
            log.info("trial %d: %s%s", trial.number, values, " (going on)" if place.last.exists() else "")
            outcome = self._outcome(trial, here)
            if outcome.state == "failed" and outcome.reason.startswith(KILLED):
                outcome = self._outcome(trial, here)  # goes on; whoever kills all of us does so before it is a failure
            if outcome.state == "stopped" or self._stop.is_set():
                return
            reason = outcome.reason
        if (done := finished(place.path)) is not None and done.result is not None:
            self.study.complete(trial.number, done.result[1])
        elif place.pruned.exists():
            self.study.prune(trial.number)
        else:
            self.study.fail(trial.number, reason)
        self._tell(self.study.trials[trial.number])

    def _outcome(self, trial: Trial, here: list[str]) -> Outcome:
        try:
            self._prepare(trial)
        except MedvisionError as error:  # of values that do not go together
            return Outcome("failed", str(error))
        with gpus.held(self.wish, here, self._stop) as (seen, locks):
            values = [f"{name}={value}" for name, value in trial.params.items()]
            told = {"SWEEP": self.folder.name, "JOB": str(trial.number), "TAGS": json.dumps(values)}  # to trackers
            environment = share_of_cpus(self.workers * self.processes) | seen
            environment |= {f"MEDVISION_{name}": text for name, text in told.items()}
            return run_job(self.place(trial).path, environment, stop=self._stop, hold=locks)

    def _tell(self, trial: Trial) -> None:
        best = self.study.best
        if trial.state == "fail":
            log.warning("trial %d failed: %s", trial.number, trial.reason)
        elif trial.state == "pruned":
            log.info("trial %d: pruned after epoch %d at %s", trial.number, len(trial.epochs), _number(trial.value))
        elif best is not None:
            log.info("trial %d: %s, best so far trial %d", trial.number, _number(trial.value), best.number)

    def _prepare(self, trial: Trial) -> None:
        place = self.place(trial)
        if place.config.exists():
            return
        place.path.mkdir(parents=True, exist_ok=True)
        write_json(place.trial, {"journal": "../search.journal", "number": trial.number})
        with self._composing:  # Hydra composes one config at a time
            overrides = self.overrides(trial)
            prepare(cli.compose("train", overrides), place.path, overrides)


def as_words(typed: Sequence[str]) -> list[str | Dimension]:
    """The command line of a training, with what is searched for as dimensions.

    Raises:
        MedvisionError: If nothing is searched for, or a value is given twice.
    """
    words = [as_dimension(cli.parsed(o)) or o for o in typed if not _of_the_search(o)]
    names = [word.name if isinstance(word, Dimension) else cli.parsed(word).get_key_element() for word in words]
    for word in words:
        if isinstance(word, Dimension) and names.count(word.name) > 1:
            raise MedvisionError(f"{word.name} is given more than once; search for it, or fix it")
    if not any(isinstance(word, Dimension) for word in words):
        raise MedvisionError(f"nothing is searched for: give at least one value as {SPACE}")
    return words


def as_dimension(override: Override) -> Dimension | None:
    """What an override searches for; None if it fixes a value.

    Raises:
        MedvisionError: If Hydra can sweep over it, but it is no space.
    """
    if not override.is_sweep_override():
        return None
    name, typed, value = override.get_key_element(), override.input_line, override._value
    if not isinstance(value, ChoiceSweep | RangeSweep | IntervalSweep):
        raise MedvisionError(f"{typed}: expected {SPACE}")
    if unknown := value.tags - {"log"}:
        raise MedvisionError(f"{typed}: there is no tag {', '.join(sorted(unknown))}; expected tag(log,...)")
    if isinstance(value, ChoiceSweep):
        if value.tags:
            raise MedvisionError(f"{typed}: choices have no order of magnitude; leave tag(log,...) out")
        return Dimension(name, tuple(dict.fromkeys(override.sweep_string_iterator())))
    step = None
    if isinstance(value, RangeSweep):
        numbers = sorted(value.range())
        if not numbers:
            raise MedvisionError(f"{typed} holds no number")
        low, high, step = numbers[0], numbers[-1], abs(value.step)
    else:
        low, high = value.start, value.end
    if not -math.inf < low <= high < math.inf:
        raise MedvisionError(f"{typed}: expected interval(low,high) of finite numbers, the smaller one first")
    if value.tags and (low <= 0 or step not in (None, 1) or (step and isinstance(low, float))):
        raise MedvisionError(f"{typed}: tag(log,...) is of intervals above 0; of ints tag(log,int(interval(1,64)))")
    return Dimension(name, low=low, high=high, step=step, log=bool(value.tags))


def report(search: Search, metric: str, maximise: bool, data: str) -> None:
    """Writes `search.json` and figures, and prints the best trials and what to do with the best."""
    from medvision.figures import study as figures

    study, trials = search.study, search.study.trials
    best, importance = study.best, study.importance()
    again = None if best is None else shlex.join(["python", "-m", "medvision.train", *search.overrides(best)[:-1]])
    states = [trial.state for trial in trials]
    count = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    write_json(
        search.folder / "search.json",
        {
            "metric": metric,
            "mode": "max" if maximise else "min",
            "space": {d.name: {key: v for key, v in vars(d).items() if key != "name"} for d in study.space},
            "best": None if best is None else best.number,
            "command": again,
            "importance": importance,
            "trials": [vars(trial) for trial in trials],
        },
    )
    title = f"{metric} on {data}: {len(trials)} trials, {count}"
    if importance:
        complete = f"importance for {metric} on {data} (fANOVA of {states.count('complete')} complete trials)"
        figures.importance(search.folder / "importance.png", importance, complete)
    if best is not None:
        figures.parallel(search.folder / "parallel.png", study.space, trials, metric, maximise, title)
    order, sign = ("complete", "pruned", "fail", "running"), -1 if maximise else 1
    names = [dimension.name for dimension in study.space]
    rows = []
    for trial in sorted(trials, key=lambda t: (order.index(t.state), sign * (t.value or 0.0)))[:SHOWN]:
        facts = [str(trial.number), trial.state, _number(trial.value), str(len(trial.epochs))]
        rows.append([*facts, *(trial.params.get(name, "-") for name in names)])
    print_rows(title, ["trial", "state", metric, "epochs", *names], rows, words=(1,))
    if len(trials) < search.trials:
        log.info("%d of %d trials; the same command goes on", len(trials), search.trials)
    if best is not None:
        print(
            f"the {metric} of the best trial flatters: it was chosen by it. Nobody has looked at test; to do so, once:"
        )
        print(f"  {command('evaluate', 'run', search.place(best).path)}")
        print(f"or train with these values again, perhaps with other seeds:\n  {again}")
    print(f"results: {search.folder / 'search.json'}")


def _complain(search: Search) -> None:
    failed = [trial for trial in search.study.trials if trial.state == "fail"]
    if failed:
        lines = [f"{search.place(trial).path / LOG}: {trial.reason}" for trial in failed]
        raise MedvisionError(f"{len(failed)} of {search.trials} trials failed:\n  " + "\n  ".join(lines))


def _probe(words: Sequence[str | Dimension], cfg: DictConfig) -> None:
    """Refuses what no trial could be, before there is one: each choice composes, the first of all is built.

    Args:
        words: The command line of a training.
        cfg: The config without what is searched for.

    Raises:
        MedvisionError: With the reason.
    """
    from medvision.build import build

    first = {word.name: word.first for word in words if isinstance(word, Dimension)}
    others = [{word.name: choice} for word in words if isinstance(word, Dimension) for choice in word.choices[1:]]
    for change in [*others, {}]:
        values = first | change
        overrides = [w if isinstance(w, str) else f"{w.name}={values[w.name]}" for w in words]
        trial = cli.compose("train", overrides)
        for measured in ("task.monitor", "task.mode", "data.spec.name"):
            if (now := OmegaConf.select(trial, measured)) != (wanted := OmegaConf.select(cfg, measured)):
                choice = ", ".join(f"{name}={value}" for name, value in (change or first).items())
                raise MedvisionError(
                    f"{measured} is {now} with {choice}, and {wanted} without what is searched for; trials that are "
                    "measured differently do not compare"
                )
    run = build(trial)
    run.check_monitor()
    run.data.prepare_data()


def _check(cfg: DictConfig) -> None:
    options = cfg.search
    for name, least in (("trials", 1), ("workers", 1), ("seed", 0), ("min_epochs", 1), ("reduction_factor", 2)):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise MedvisionError(f"search.{name}={value}: expected a whole number of {least} or more")
    if options.timeout is not None and not (isinstance(options.timeout, int | float) and options.timeout > 0):
        raise MedvisionError(f"search.timeout={options.timeout}: expected seconds, more than 0, or null")
    for word in ("resume", "repeat"):
        if cfg[word] is not None:
            raise MedvisionError(f"{word}={cfg[word]} is of one run; a search goes on with hydra.sweep.dir=<folder>")
    if not str(cfg.launcher._target_).endswith(".InTurn"):
        raise MedvisionError(
            "a search runs its trials on this machine, search.workers of them at once; leave out launcher"
        )
    if cfg.test or cfg.protocol == "paper":
        raise MedvisionError("a search looks at validation alone; leave out test=true and protocol=paper")


def _of_the_search(typed: str) -> bool:
    """Whether an override is of the search itself and not of its trainings."""
    key = cli.parsed(typed).key_or_group
    return key in ("test", "traceback") or key.startswith(("search.", "hydra.run.", "hydra.sweep."))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    cli.main("search", start, space=True)
