"""`refreekv serve --python`: llama-cpp-python's server."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import typer

from refreekv_cpp import _option_text
from refreekv_cpp._extras import needs_extra
from refreekv_cpp.cli import common

_DESCRIPTION = """Serve models over HTTP with OpenAI's API: llama-cpp-python's server, with a KV policy for each model.
Options can be written with - or _, or as environment variables (MODEL, PORT, ...)."""
_SWITCHES = ("auto", "true", "false", "1", "0", "on", "off", "t", "f", "y", "n", "yes", "no")


@common.user_errors()
def serve_python(context: typer.Context) -> None:
    """Serve models over HTTP with OpenAI's API: llama-cpp-python's server, with a KV policy."""
    with needs_extra("server", "refreekv serve --python"):
        import uvicorn
        from pydantic import ValidationError

        from refreekv_cpp.server.app import create_app
        from refreekv_cpp.server.settings import explain

    try:
        server, models = _settings(context.args)
    except ValidationError as error:
        raise ValueError(explain(error.errors())) from None
    app = create_app(server, models)
    uvicorn.run(
        app, host=server.host, port=server.port, ssl_keyfile=server.ssl_keyfile, ssl_certfile=server.ssl_certfile
    )


def _settings(args: list[str]) -> tuple[Any, list[Any]]:
    """The ServerSettings, and the ModelSettings of each model."""
    from refreekv_cpp.server.settings import ModelSettings, ServerSettings, read_config_file

    given = _given(args)
    config_file = given.pop("config_file", None)
    server = {name: value for name, value in given.items() if name in ServerSettings.model_fields}
    model = {name: value for name, value in given.items() if name not in ServerSettings.model_fields}
    if config_file:
        if model:
            others = ", ".join(f"--{name}" for name in model)
            raise ValueError(f"{others}: with --config_file, the models in it have these settings")
        config = read_config_file(config_file, **server)
        return config, config.models
    return ServerSettings(**server), [ModelSettings(**model)]


def _given(args: list[str]) -> dict[str, Any]:
    """What the command line says, by the names of the settings."""
    from llama_cpp.server.cli import add_args_from_model

    from refreekv_cpp.server.settings import Settings

    parser = argparse.ArgumentParser(
        prog="refreekv serve --python",
        usage="%(prog)s (MODEL | --config_file PATH) [options]",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("MODEL", nargs="?", help="A GGUF file. (--model is the same.)")
    parser.add_argument(
        "--config_file",
        default=os.environ.get("CONFIG_FILE"),
        type=Path,
        help="JSON or YAML: these settings of the server, and those of each model in a list `models`.",
    )
    parser.add_argument("--gpu_layers", dest="n_gpu_layers", help="The same as --n_gpu_layers.")
    parser.add_argument("--threads", type=int, help="The same as --n_threads and --n_threads_batch.")
    parser.add_argument("--no_flash_attn", action="store_const", const=False, dest="flash_attn")
    parser.add_argument(
        "--option",
        action="append",
        metavar="NAME=VALUE",
        help="Any other option of Llama, such as kv_protect=system; the value is JSON, or else text. Repeatable.",
    )
    add_args_from_model(parser, Settings)
    given = {name: value for name, value in vars(parser.parse_args(_spelled(args))).items() if value is not None}

    if model := given.pop("MODEL", None):
        if "model" in given:
            raise ValueError("MODEL and --model: only one of them can be the model")
        given["model"] = model
    if threads := given.pop("threads", None):
        given = {"n_threads": threads, "n_threads_batch": threads, **given}
    options = given.pop("option", [])
    return {**given, **dict(map(_option_text.parse, options))}


def _spelled(args: list[str]) -> list[str]:
    """Options with underscores, and --flash_attn with a value: it needs none, but upstream's server has one."""
    spelled = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in args]
    for i, arg in enumerate(spelled):
        if arg == "--flash_attn" and (i + 1 == len(spelled) or spelled[i + 1].lower() not in _SWITCHES):
            spelled[i] = "--flash_attn=true"
    return spelled
