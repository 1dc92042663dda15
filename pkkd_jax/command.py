"""How a command of the package reads its configuration and its flags."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict, config_flags

from pkkd_jax import config as config_lib
from pkkd_jax import names


def parse(
    argv: list[str], define: Callable[[flags.FlagValues], None], usage: str, description: str
) -> tuple[ConfigDict, flags.FlagValues, str]:
    """Reads `--config=FILE[:ARG]`, `--config.LEAF=VALUE` and the flags of a command.

    Args:
      argv: as in `sys.argv`.
      define: adds the command's own flags to the values that it is given.
      usage: one line, shown with a mistake.
      description: shown for --help, with flags and leaves, which ends the program.
    Returns:
      The configuration, the values of the flags, and a name for file and argument.
    Raises:
      UserError: for a mistake in them.
    """
    values = flags.FlagValues()
    define(values)
    if "--config" in argv[:-1]:  # written in two words
        place = argv.index("--config")
        argv = [*argv[:place], f"--config={argv[place + 1]}", *argv[place + 2 :]]
    given = [item for item in argv[1:] if re.match(r"--?config=", item)]
    path, _, argument = (given or [""])[-1].partition("=")[2].partition(":")
    config = _load(path, argument) if given else None
    if {"--help", "-h", "--helpfull"} & set(argv):
        print(f"{description}\nFlags:\n")
        print("\n".join(f"  --{name}: {values[name].help}" for name in values))
        if given:
            print(f"\nLeaves of {path}:\n")
            print("\n".join(f"  --config.{k}={v!r}" for k, v in _leaves(config).items()))
        else:
            print("\nTogether with --config=FILE, --help lists its leaves.")
        raise SystemExit(0)
    if not given:
        raise names.UserError(f"--config is missing: {usage}")
    words = [argv[0], *(item for item in argv[1:] if item not in given)]
    try:
        sys.argv = words  # where config_flags reads the leaves, when the flag is defined
        flag = config_flags.DEFINE_config_dict("config", config, flag_values=values)
        rest = values(words)
    except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
        leaves = _leaves(config)
        for item in words[1:]:
            leaf = re.match(r"--config\.([^=]+)", item)
            if leaf and leaf.group(1) in config_lib.PARTS:
                part, _, value = item.removeprefix("--config.").partition("=")
                raise names.UserError(
                    f"{item}: a part is swapped by --config={path}:{part}={value or 'NAME'}"
                ) from error
            if leaf and leaf.group(1) not in leaves:
                raise names.unknown("config leaf", leaf.group(1), leaves) from error
        text = " ".join(str(error).split())
        raise names.UserError(f"{text}: mend that argument; usage: {usage}") from error
    if len(rest) > 1:
        raise names.UserError(f"unexpected argument {rest[1]!r}: {usage}")
    name = Path(path).stem + (f"-{re.sub('[^A-Za-z0-9]+', '-', argument)}" if argument else "")
    return flag.value, values, name


def _load(path: str, argument: str):
    """What `get_config` of the file at `path` returns."""
    if not Path(path).is_file():
        folders = {Path(path).parent, Path("configs")}
        found = (str(file) for folder in folders for file in folder.glob("*.py"))
        raise names.unknown("config file", path, found)
    try:
        config = runpy.run_path(path)["get_config"](argument or None)
        if not isinstance(config, ConfigDict):
            raise TypeError(f"get_config returned {type(config).__name__}, not a ConfigDict")
        return config
    except names.UserError:
        raise
    except Exception as error:
        missing = re.search(r'Key "([^"]+)" does not exist', str(error))
        if missing:  # in the locked configuration that `config.base` returns
            leaves = _leaves(config_lib.base())
            raise names.unknown(f"leaf of config file {path!r},", missing[1], leaves) from error
        text = " ".join(str(error).split())
        raise names.UserError(
            f"config file {path!r} cannot be read: {type(error).__name__}: {text}; it must define"
            " get_config(arg=None)"
        ) from error


def _leaves(config: ConfigDict) -> dict:
    return traverse_util.flatten_dict(config.to_dict(), sep=".")
