"""The command line, `looped VERB ...`; each verb is a class in the module of the same name.

Config settings are flags `--section.key value`, and are separated before the other flags are parsed. Bad input gives
one sentence on stderr and exit code 2; a warning is also one line on stderr.
"""

import contextlib
import errno
import gc
import importlib
import io
import keyword
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from looped import __version__
from looped.errors import UserError, did_you_mean
from looped.notices import plain_notices
from looped.output import leave_stdout

if TYPE_CHECKING:
    from looped.cli.verb import Verb

VERBS = ("train", "prepare", "import", "export", "merge", "eval", "generate", "bench", "compare", "reproduce", "plot",
         "plan", "info", "configs", "settings")

HELP = """looped {version}: recurrent-depth Transformers, trained by unrolling or by denoising, measured over depth

usage: looped VERB [arguments]

  train CONFIG       train a config, or resume an interrupted run
  prepare CONFIG     tokenize the text of a config ahead of training, or say that it is done
  import MODEL       convert a pretrained model, from a folder or the Hugging Face hub, into a run
  export RUN         write the model of a run as a folder that transformers can load
  merge RUN RUN ..   merge runs of single blocks into one run of the whole model
  eval RUN           evaluate a trained run at every depth: table, JSONL and plots
  generate RUN       continue a text, or generate images, at any depth
  bench WHAT CONFIG  measure the cost of a training step (step), the FLOP/s it reaches (flops), or the memory to train
                     one block alone (memory)
  compare CONFIG     train several objectives at one budget over seeds: table, plots, HTML report
  reproduce [NAME]   reproduce a published table, with the published values alongside; without a name, list the tables
  plot RUN [RUN ..]  plot the depth curves of several runs together
  plan CONFIG        memory, bytes sent and hours of a run on several devices, before it is run
  configs [NAME]     list the shipped configs; each can be used by name, as in looped train smoke
  settings [SECTION] list all settings, section by section
  info [RUN|CONFIG]  show versions, devices and attention backends, or describe a run or config

a first try, in half a minute:
  looped train smoke
  looped eval runs/smoke

any setting is a flag:
  looped train stdlib-denoise --run runs/wide --model.width 256 --training.budget 600
  looped train stdlib-denoise --dry-run     show what it would train, and the cost

`looped VERB --help` shows all flags of a verb; `looped settings` lists every setting.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _print_anything()
    try:
        with plain_notices(), _rarely_collected():
            code = _dispatch(arguments)
            print(end="", flush=True)  # what a full disk refuses is said here, not at exit
            return code
    except UserError as error:
        print(f"looped: {' '.join(str(error).split())}", file=sys.stderr)  # names in it may contain line breaks
        return error.exit_code
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "looped":
            raise
        print(f"looped: {error.name} is not installed, which this command needs; install looped with its dependencies "
              f"(pip without --no-deps)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has closed the pipe, as `head` does
        leave_stdout()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        leave_stdout()
        print(f"looped: {error.filename or 'the standard output'}: no space left on the disk; free some, then run the "
              f"same command again", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _rarely_collected() -> Iterator[None]:
    """Look for reference cycles more rarely, by the thresholds of mypy's command line.

    By Python's own, an eighth of the time of a short command goes into walks through the objects of torch's modules,
    none of which is garbage. A training step leaves no cycles behind, so no tensor waits for the collector.
    """
    before = gc.get_threshold()
    gc.set_threshold(200_000, 30, 30)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _print_anything() -> None:
    """Escape characters that the terminal's encoding lacks, as in Windows code pages, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(version=__version__), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"looped {__version__}")
        return 0
    if arguments[0] not in VERBS:
        raise UserError(f"'{arguments[0]}' is not a verb{did_you_mean(arguments[0], VERBS)}")
    rest, settings = split_settings(arguments[1:])
    verb = _parse(verb_class(arguments[0]), arguments[0], rest)
    return verb(settings) or 0 if verb is not None else 0


def verb_class(name: str) -> type["Verb"]:
    """The class of a verb: `Train` in looped/cli/train.py, `Import` in import_.py."""
    module = f"{name}_" if keyword.iskeyword(name) else name
    return getattr(importlib.import_module(f"looped.cli.{module}"), name.capitalize())


def split_settings(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(the other arguments, {setting: value}): a setting is `--objective`, `--seed`, or a flag with a dot in it."""
    rest, settings, met, queue = [], {}, set(), list(arguments)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        is_setting = "." in name or name in ("objective", "seed")
        if word.startswith("--"):
            if (flag := name.replace("-", "_")) in met:
                values = "[a, b]" if is_setting else "a,b"
                raise UserError(f"--{name} is given twice; keep one, and write several values as one list, "
                                f"\"{values}\"")
            met.add(flag)
        if not word.startswith("--") or not is_setting:
            rest.append(word)
            continue
        if not equals and (not queue or queue[0].startswith("--")):
            raise UserError(f"--{name} has no value; write --{name} VALUE")
        settings[name] = value if equals else queue.pop(0)
    return rest, settings


def _parse(verb: type, name: str, arguments: list[str]):
    """The verb with its flags filled in; None if only help was requested."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(verb, args=arguments, prog=f"looped {name}", config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as end:
        if end.code:
            raise UserError(f"{name}: {_one_sentence(said.getvalue())}; see looped {name} --help") from None
        if name == "train":
            from looped.cli.settings import sections

            print(f"\nsettings, as --section.name value or in the YAML file (details: looped settings SECTION):\n\n"
                  f"{sections()}")
        return None


def _one_sentence(box: str) -> str:
    """The text of tyro's boxed error message."""
    lines = [" ".join(re.sub("[╭╮╰╯│─•]", " ", line).split()) for line in box.splitlines()[1:]]
    text = re.split("For full helptext|Argument helptext", " ".join(filter(None, lines)))[0]
    return text.strip().rstrip(".") or "invalid arguments"
