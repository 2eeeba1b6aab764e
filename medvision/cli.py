"""The command line: Hydra's words, quick answers, one message for what is refused. Imports no torch."""

import difflib
import errno
import itertools
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from medvision.errors import MedvisionError
from medvision.terminal import quoted

RANK = int(os.environ.get("LOCAL_RANK", "0"))
"""Which of the processes of a training this is; those above 0 are started by the first and say nothing."""

Action = Callable[[Any, Path, list[str]], None]
Sweep = Callable[[list[list[str]], list[DictConfig], list[str]], None]

TRACEBACK = "traceback=true"


def config_folder() -> Path:
    """`conf/` inside the installed package, or beside it in a checkout and an editable install."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())


def main(
    verb: str, action: Action, several: str | None = None, sweep: Sweep | None = None, space: bool = False
) -> None:
    """Runs a verb.

    Args:
        verb: Its module below `medvision` and its primary config.
        action: Called with the composed config, the folder that `hydra.run.dir` gives, and the overrides as typed,
            `--config-dir` as Hydra's override `hydra.searchpath`.
        several: A group of which a list of choices may be typed; `action` is then called with a list of configs.
        sweep: Called in the place of `action`, with `-m` or if the config says so, with the overrides and the composed
            config of each job, and the words after the verb with which it is called again; without it Hydra sweeps.
        space: Whether choices, ranges and intervals may be typed, which the config is composed without.
    """
    arguments = get_args_parser().parse_args()
    with _refusals(TRACEBACK in arguments.overrides):
        _set_up_logging()
        spread = [o for o in arguments.overrides if space and parsed(o).is_sweep_override()]
        sys.argv = [word for word in sys.argv if word not in spread]  # Hydra reads them
        ours = {"overrides", "config_dir", "run", "experimental_rerun", *(["multirun"] if sweep or space else [])}
        if any(value for name, value in vars(arguments).items() if name not in ours):
            _hand_to_hydra(verb, arguments.overrides)
            return
        typed = [*arguments.overrides, *_searchpath(arguments.config_dir)]
        fixed = [override for override in typed if override not in spread]
        first = fixed if sweep is None else expand(typed)[0]
        configs = [compose(verb, overrides) for overrides in variants(first, several)]
        cfg = configs[0]
        if space and (arguments.multirun or str(cfg.hydra.mode).endswith("MULTIRUN")):
            raise MedvisionError(f"{verb} is no sweep: leave out -m and hydra.mode, and type what it shall choose from")
        if sweep and (arguments.multirun or str(cfg.hydra.mode).endswith("MULTIRUN")):
            jobs = expand(typed, cfg.hydra.sweeper.params or {})
            sweep(jobs, [compose(verb, job) for job in jobs], [*(["-m"] if arguments.multirun else []), *typed])
            return
        if first != fixed:
            compose(verb, typed)  # refuses choices where no sweep was asked for
        if str(cfg.hydra.mode).endswith("MULTIRUN"):
            _hand_to_hydra(verb, arguments.overrides)
            return
        folder = Path(cfg.hydra.run.dir)
        for config in configs:
            with open_dict(config):
                del config["hydra"]
        action(configs if several else cfg, folder, typed)


def parsed(override: str) -> Override:
    """An override as Hydra reads it.

    Raises:
        MedvisionError: If it is none.
    """
    try:
        result: Override = OverridesParser.create().parse_override(override)
    except HydraException as error:
        name, _, value = override.partition("=")
        wants_quotes = value not in ("", quoted(value)) and "while evaluating" not in str(error)
        hint = f'; a value with such signs is quoted: "{name}={quoted(value)}"' if wants_quotes else ""
        raise MedvisionError(f"{override}: {error}{hint}") from error
    return result


def variants(overrides: list[str], group: str | None) -> list[list[str]]:
    """The overrides once for each choice in `group=a,b` or `group=[a,b]`, which comes last."""
    listed = [o for o in overrides if group and o.startswith(f"{group}=")]
    if not listed:
        return [overrides]
    choices = listed[-1].partition("=")[2].strip("[]").split(",")
    rest = [o for o in overrides if o not in listed]
    return [[*rest, f"{group}={choice.strip()}"] for choice in dict.fromkeys(choices)]


def expand(overrides: Sequence[str], params: Mapping[str, Any] | None = None) -> list[list[str]]:
    """The overrides of each job of a sweep: all combinations of the choices in them, the last varying fastest.

    Args:
        overrides: As typed; choices as Hydra has them: `seed=1,2`, `seed=range(1,4)`, `model=glob(unet*)`.
        params: More of them, as `hydra.sweeper.params`; what was typed wins.

    Raises:
        MedvisionError: If they cannot be read.
    """
    words = [*(f"{key}={value}" for key, value in (params or {}).items()), *overrides]
    choices: dict[str, list[str]] = {}
    try:
        path = create_config_search_path(str(config_folder()))
        for override in map(parsed, words):
            if override.key_or_group == "hydra.searchpath":
                for place in cast(list[str], override.value()):
                    path.append("typed", place)
        for override in OverridesParser.create(ConfigLoaderImpl(path)).parse_overrides(words):
            key, value = override.get_key_element(), cast(Any, override.value())
            if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
                value.exclude.append("_*")  # parts of choices
            if not override.is_sweep_override():
                choices[key] = [str(override.input_line)]
                continue
            found = override.sweep_string_iterator() if override.is_discrete_sweep() else ()
            choices[key] = [f"{key}={value}" for value in found]
            if not choices[key]:
                raise MedvisionError(f"{override.input_line} holds no choice; a sweep needs some, as 1,2 or range(1,4)")
    except HydraException as error:
        raise MedvisionError(str(error)) from error
    return [[*job] for job in itertools.product(*choices.values())]


def compose(verb: str, overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """The config of a verb, with its `hydra` node.

    Raises:
        MedvisionError: If an override is misspelled, with the nearest name.
    """
    overrides = [*overrides, *_searchpath(config_dir)]
    try:
        return _name_phantoms(_compose(verb, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise MedvisionError(_explain(error, verb, overrides)) from error


def choices(group: str, overrides: Sequence[str] = ()) -> list[str]:
    """The choices of a group, sorted: its configs but for parts, which begin with `_`.

    Args:
        group: Its name.
        overrides: Of which `hydra.searchpath` adds folders.
    """
    paths = [o for o in overrides if o.startswith("hydra.searchpath=")]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        found = GlobalHydra.instance().config_loader().get_group_options(group, config_name=None, overrides=paths)
    return sorted(name for name in found if not name.startswith("_"))


def _searchpath(config_dir: str | None) -> list[str]:
    """`--config-dir` as an override."""
    if not config_dir:
        return []
    if not Path(config_dir).is_dir():
        raise MedvisionError(f"--config-dir {config_dir} is no folder")
    return [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]


def _compose(verb: str, overrides: Sequence[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose(verb, list(overrides), return_hydra_config=True)


def _name_phantoms(cfg: DictConfig) -> DictConfig:
    """Lets no run on phantoms look like one on the real images: their name says so, and no challenge scores them."""
    data = cfg.get("data")
    if data and data.get("phantom") and not data.spec.name.startswith("phantom"):
        data.spec.name = f"phantom_{data.spec.name}"
        if "challenge" in data.spec:
            data.spec.challenge = None
    return cfg


def _hand_to_hydra(verb: str, overrides: list[str]) -> None:
    """Help, printing of configs, completion and sweeps of other verbs are Hydra's own."""

    def job(_: DictConfig) -> None:
        # a job of a sweep is a process of its own: its memory is freed, its trackers see one run
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir).resolve()
        typed = [*settings.overrides.task, f"hydra.run.dir='{folder}'", "hydra.mode=RUN"]
        if subprocess.run([sys.executable, "-m", f"medvision.{verb}", *typed], check=False).returncode:
            raise MedvisionError(f"the job in {folder} failed; its reason stands above")

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us, who speak of them
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=verb)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise MedvisionError(_explain(error, verb, overrides)) from error


def _explain(error: Exception, verb: str, overrides: Sequence[str]) -> str:
    """The message of a failed composition, with the nearest name for what was misspelled."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        choices = [name for name in error.options if not name.startswith("_")]  # parts of choices
        return f"{group}={option}: there is no such choice{_near(option, choices)}. Choices: {', '.join(choices)}"
    if bare := [o for o in overrides if "=" not in o and not o.startswith("~")]:
        return f"{bare[0]}: expected <name>=<value>, as seed=1 or run=<folder>"
    for override in overrides:
        parsed(override)  # refuses what Hydra cannot read
    kept, unknown, reason = list[str](), None, error
    for override in overrides:
        try:
            _compose(verb, [*kept, override])
            kept.append(override)
        except (HydraException, OmegaConfBaseException) as one:
            if "Could not override" in str(one) and unknown is None:
                unknown, reason = override, one
    if unknown is None:
        return f"{error}" + (f" ({error.__cause__})" if error.__cause__ else "")
    key = parsed(unknown).key_or_group
    config = OmegaConf.to_container(_compose(verb, kept))
    groups = [folder.name for folder in config_folder().iterdir() if folder.is_dir()]
    if key in (known := {*_keys(config), *groups}):
        return f"{unknown}: {str(reason.__cause__ or reason).splitlines()[0]}"
    near = _near(key, known)
    return f"{unknown}: there is no option {key!r}{near}. To add it on purpose: +{unknown}"


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def _near(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


@contextmanager
def _refusals(with_traceback: bool) -> Iterator[None]:
    """Says what was refused in one message and ends with code 1; any other error keeps its traceback."""
    try:
        yield
    except (MedvisionError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if with_traceback or not (full or isinstance(error, MedvisionError)):
            raise
        cure = "; make room where runs and the cache lie, and go on" if full else ""
        print(
            f"error{f' in process {RANK}' if RANK else ''}: {error}{cure}\n({TRACEBACK} shows where)", file=sys.stderr
        )
        sys.exit(1)
    except KeyboardInterrupt:
        if with_traceback:
            raise
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def _set_up_logging() -> None:
    """Our own messages on standard output; what libraries whisper only into a run's log file."""
    handler = _Printing()
    handler.setFormatter(_Plain())
    logger = logging.getLogger("medvision")
    logger.handlers, logger.propagate = [handler] if RANK == 0 else [], True
    logger.setLevel(logging.INFO)
    logging.getLogger().handlers = [logging.NullHandler()]
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    warnings.filterwarnings("ignore", r"It is recommended to use .self\.log")  # of numbers that are the same everywhere
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


class _Printing(logging.Handler):
    """Prints, so that a progress bar, which takes the place of standard output, keeps the line above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"
