"""What every door shares: absl flags, the typed config beside them, and errors as one line and an exit status.

absl parses all flags but `--config.section.field=value`, which tyro checks against the dataclasses of `gptjax.config`.
Nothing here imports JAX. What surprises readers: both parsers end a usage error with status 2 before the door's own
slow imports have begun.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from gptjax import config as config_lib
from gptjax.allocator import restart_with_large_pages
from gptjax.config import Config, from_json, validate
from gptjax.errors import RunError, UsageError

FLAGS = flags.FLAGS
_PREFIX = "--config."


def define_config_flag() -> None:
    """Adds `--config`; the door then reads it with `load_config`."""
    flags.DEFINE_string(
        "config",
        None,
        "the experiment, FILE[:arg] where FILE defines get_config([arg]), or the config.json of a run; "
        "--config.section.field=value overrides a field",
    )


def run(main: Callable[[list[str]], Any]) -> None:
    """Runs the door `main(overrides)`, where overrides are the `--config.…` arguments, and exits.

    A UsageError ends with status 2 and a RunError with status 1, each with its one line on stderr.
    """
    restart_with_large_pages()
    overrides, rest = _split(sys.argv)
    doc = (sys.modules["__main__"].__doc__ or "").strip()

    def parse(argv: Sequence[str]) -> list[str]:
        if any(a in ("--help", "-h", "-help", "--helpfull") for a in argv[1:]):
            try:
                _print_help(doc)
            except BrokenPipeError:  # `--help | head` has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        try:
            positional = FLAGS(argv)
        except flags.Error as e:
            _fail(str(e).splitlines()[0], 2)
        if len(positional) > 1:
            _fail(f"unexpected argument {positional[1]!r}; flags are written --name=value", 2)
        if overrides and "config" not in FLAGS:
            _fail(f"{overrides[0]}: this command takes no config", 2)
        return positional

    def guarded(_: Sequence[str]) -> Any:
        # Libraries report each file they write; a user wants their warnings only.
        logging.set_verbosity(logging.WARNING)
        try:
            return main(overrides)
        except (UsageError, RunError) as e:
            _fail(" ".join(str(e).split()) if "\n" not in str(e) else str(e), e.exit_status)
        except KeyboardInterrupt:
            _fail("interrupted", 130)

    app.run(guarded, argv=rest, flags_parser=parse)


def load_config(spec: str | None, overrides: Sequence[str], base: Config | None = None) -> Config:
    """The config of `spec`, FILE[:arg], or else `base`, with `overrides` applied and checked.

    Raises UsageError for a file that is missing or defines no get_config; a bad override exits with status 2.
    """
    if spec is not None:
        base = _run_config_file(spec)
    if base is None:
        raise UsageError("--config is missing; give an experiment, such as --config=experiments/quickstart.py")
    config = override(base, overrides)
    validate(config)
    return config


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with each "--config.section.field=value" applied; exits with status 2, explaining, for a bad one."""
    if not overrides:
        return config
    return _tyro(config, list(overrides))


def _run_config_file(spec: str) -> Config:
    # The longest existing prefix is the file, so that a path may hold a colon.
    path, arg = spec, None
    if not os.path.exists(spec) and ":" in spec:
        path, arg = spec.rsplit(":", 1)
    if not os.path.isfile(path):
        near = sorted(str(p) for p in pathlib.Path("experiments").glob("*.py"))
        raise UsageError(f"--config={spec}: no file {path}" + (f"; there are {', '.join(near)}" if near else ""))
    if path.endswith(".json"):
        return from_json(pathlib.Path(path).read_text(encoding="utf-8"), path)
    module_spec = importlib.util.spec_from_file_location("gptjax_experiment", path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"--config={spec}: not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(f"--config={spec}: {path} fails with {type(e).__name__}: {e}") from e
    if not hasattr(module, "get_config"):
        raise UsageError(f"--config={spec}: {path} defines no get_config(); see CONTRIBUTING.md")
    config = _call_get_config(module, spec, arg)
    if not isinstance(config, Config):
        raise UsageError(f"--config={spec}: get_config returns {type(config).__name__}, not gptjax.config.Config")
    return config


def _call_get_config(module: types.ModuleType, spec: str, arg: str | None) -> Any:
    try:
        return module.get_config() if arg is None else module.get_config(arg)
    except UsageError as e:
        raise UsageError(f"--config={spec}: {e}") from None
    except TypeError as e:
        unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(e))
        if unknown and unknown[1] in vars(config_lib):
            known = [field.name for field in dataclasses.fields(vars(config_lib)[unknown[1]])]
            near = difflib.get_close_matches(unknown[2], known, 1)
            did_you_mean = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"--config={spec}: {unknown[1]} has no field {unknown[2]}{did_you_mean}") from None
        if "get_config()" not in str(e):
            raise
        takes = "takes no argument" if arg is not None else "needs an argument"
        raise UsageError(f"--config={spec}: its get_config {takes} ({e})") from None


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the --config.… arguments as --name=value, all the others)."""
    overrides, rest = [], [argv[0]]
    arguments = iter(argv[1:])
    for argument in arguments:
        if not argument.startswith(_PREFIX):
            rest.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        else:
            value = next(arguments, None)
            if value is None:
                _fail(f"{argument}: no value; write {argument}=VALUE", 2)
            overrides.append(f"{argument}={value}")
    return overrides, rest


def _tyro(config: Config, arguments: list[str]) -> Config:
    # Imported here: a door that overrides nothing starts 0.15 s sooner.
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def tuples_as_one_word(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        # tyro's own form, "--window 0 256", does not fit "--name=value".
        kinds = typing.get_args(info.type)
        if typing.get_origin(info.type) is not tuple or len(kinds) != 2 or kinds[1] is not Ellipsis:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{kinds[0].__name__.upper()},…",
            instance_from_str=lambda words: tuple(kinds[0](w) for w in words[0].strip("()[]").split(",") if w.strip()),
            is_instance=lambda x: isinstance(x, tuple) and all(isinstance(v, kinds[0]) for v in x),
            str_from_instance=lambda x: [",".join(map(str, x))],
        )

    @registry.primitive_rule
    def booleans_in_any_case(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if info.type is not bool:
            return None
        values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

        def parse(words: list[str]) -> bool:
            if words[0].lower() not in values:
                raise ValueError(f"{words[0]!r} is not true or false")
            return values[words[0].lower()]

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{true,false}",
            instance_from_str=parse,
            is_instance=lambda x: isinstance(x, bool),
            str_from_instance=lambda x: [str(x).lower()],
        )

    # A class around the config gives every option its "config." prefix.
    around = dataclasses.make_dataclass("Options", [("config", Config)], frozen=True)
    parsed = tyro.cli(
        around,
        prog=f"python -m {_door_name()}",
        default=around(config),
        args=arguments,
        use_underscores=True,
        registry=registry,
        config=(tyro.conf.FlagConversionOff,),
    )
    return parsed.config


def _door_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else pathlib.Path(sys.argv[0]).stem


def _print_help(doc: str) -> None:
    """The door's docstring, its flags, then every config field with type, default and meaning."""
    print(doc, end="\n\nflags:\n")
    own = FLAGS.get_key_flags_for_module(sys.argv[0])
    from_cli = [FLAGS[name] for name in ("config",) if name in FLAGS]
    for flag in sorted({f.name: f for f in [*own, *from_cli]}.values(), key=lambda f: f.name):
        default = "" if flag.default in (None, "") else f" (default: {flag.default_as_str})"
        print(f"  --{flag.name}  {flag.help}{default}")
    if "config" in FLAGS:
        print("\nconfig fields, each with the default that an experiment may replace:\n")
        sys.stdout.flush()
        _tyro(Config(), ["--help"])


def _fail(message: str, status: int) -> typing.NoReturn:
    print(f"{_door_name()}: {message}", file=sys.stderr)
    sys.exit(status)
