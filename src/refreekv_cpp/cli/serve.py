from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import typer

from refreekv_cpp.cli import common

_DESCRIPTION = """Serve models over HTTP with OpenAI's API: llama-cpp-python's server, with a KV policy for each model.
Options can be written with - or _, or as environment variables (MODEL, PORT, ...)."""


@common.user_errors()
def serve(context: typer.Context) -> None:
    """Serve models over HTTP with OpenAI's API: llama-cpp-python's server, with a KV policy."""
    try:
        import uvicorn
        from pydantic import ValidationError

        from refreekv_cpp.server.app import create_app
        from refreekv_cpp.server.settings import explain
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: install what the server needs with `pip install 'refreekv-cpp[server]'`") from error

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
    from llama_cpp.server.cli import add_args_from_model, parse_model_from_args
    from llama_cpp.server.settings import ServerSettings

    from refreekv_cpp.server.settings import ModelSettings, Settings, read_config_file

    parser = argparse.ArgumentParser(
        prog="refreekv serve",
        usage="%(prog)s (--model PATH | --config_file PATH) [options]",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config_file",
        default=os.environ.get("CONFIG_FILE"),
        type=Path,
        help="JSON or YAML: these settings of the server, and those of each model in a list `models`.",
    )
    add_args_from_model(parser, Settings)
    # --kv-policy is --kv_policy
    arguments = parser.parse_args([re.sub(r"^--[^=]+", lambda name: _underscores(name[0]), arg) for arg in args])
    if arguments.config_file:
        given = {name: value for name, value in vars(arguments).items() if value is not None and name != "config_file"}
        if others := [f"--{name}" for name in given if name not in ServerSettings.model_fields]:
            raise ValueError(f"{', '.join(others)}: with --config_file, the models in it have these settings")
        config = read_config_file(arguments.config_file)
        return config.model_copy(update=given), config.models
    return parse_model_from_args(ServerSettings, arguments), [parse_model_from_args(ModelSettings, arguments)]


def _underscores(option: str) -> str:
    return "--" + option[2:].replace("-", "_")
