from __future__ import annotations

import dataclasses
import errno
import re
import socket
from typing import Annotated, Any

import typer
import typer.core

from refreekv_cpp import fit, llama_server
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import ModelArgument
from refreekv_cpp.cli.options import ChatOptions, takes_options
from refreekv_cpp.cli.serve_python import serve_python
from refreekv_cpp.models import resolve

# what a model cannot have a policy with
_NO_CACHE = ("--embedding", "--rerank")

_python = typer.Typer()
_python.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve_python
)


class ServeCommand(typer.core.TyperCommand):
    """--python anywhere makes it another command. Options can be written with - or _."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if "--python" in args:
            args.remove("--python")
            return typer.main.get_command(_python).make_context(info_name, args, parent, **extra)
        args = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), arg) for arg in args]
        return super().make_context(info_name, args, parent, **extra)


class UiCommand(ServeCommand):
    """serve --open."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return super().make_context(info_name, [*args, "--open"], parent, **extra)


@common.user_errors()
@takes_options
def serve(
    model: ModelArgument,
    options: ChatOptions,
    context: typer.Context,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at; 0: any that is free.")] = 8000,
    slots: Annotated[
        int, typer.Option("--parallel", min=1, max=64, help="Requests that are answered at the same time.")
    ] = 4,
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page that shows the cache at work in a browser (refreekv ui).")
    ] = False,
    python: Annotated[
        bool,
        typer.Option(
            "--python",
            help="Run llama-cpp-python's server in place of llama.cpp's, with options of its own (--python --help): "
            "it has configuration files, and answers one request at a time.",
        ),
    ] = False,
) -> None:
    """Serve a model over HTTP with OpenAI's API, to several clients at once: llama.cpp's own server, with a KV policy
    in each of its slots. All other options of llama-server can follow MODEL."""
    _check_others(context.args)
    if open_page and not port:
        raise ValueError("--open --port 0: the page's address is not known; --port must be one from 1 to 65535")
    if embedding := [arg for arg in context.args if arg.startswith(_NO_CACHE)]:
        common.print_note(f"{embedding[0]}: nothing stays in the cache between requests, so it has no policy")
        options = dataclasses.replace(options, kv_policy="full")
    load = {"n_ctx": 0} if options.n_ctx == "0" else {}
    path = resolve(model)
    fit.check_model(path)
    changed = any(arg.startswith("--override-kv") for arg in context.args)  # perhaps what the model was made for
    if options.n_ctx != "auto" and not changed and int(options.n_ctx) > (most := fit.n_ctx_train(path)):
        common.print_note(f"--n-ctx {options.n_ctx}: llama-server gives a request {most}, which the model was made for")
        options = dataclasses.replace(options, n_ctx=str(most))
    line = llama_server.arguments(
        path,
        options.with_library().llama_options(path, **load),
        slots=slots,
        shared=options.n_ctx == "auto",  # as much as memory has room for
        host=host,
        port=port,
    )
    if not any(arg in ("-a", "--alias") or arg.startswith("--alias=") for arg in context.args):
        line += ["--alias", path.stem]  # else the model's name would be its path on this machine
    if port:
        if "--reuse-port" not in context.args and not host.endswith(".sock"):  # a path has no port
            _check_port(host, port)
        address = llama_server.address(host, port)
        common.print_note(
            f"OpenAI's API is at {address}/v1 once the model is loaded; {address}/cache shows the cache; Ctrl-C ends it"
        )
        if open_page:
            llama_server.open_when_ready(address, "/cache")
    raise typer.Exit(llama_server.run([*line, *context.args]))


def _check_port(host: str, port: int) -> None:
    """
    Raises:
        ValueError: another program listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port}: another program uses it; --port must be one that is free") from None


def _check_others(args: list[str]) -> None:
    """
    Raises:
        ValueError: an option is one of llama-cpp-python's server, or does not belong here.
    """
    if any(arg.startswith("--config-file") for arg in args):
        raise ValueError(
            "--config_file: configuration files are those of llama-cpp-python's server, which --python runs; without "
            "it, options stand on the command line, and each model has a `refreekv serve` of its own"
        )
    if several := [arg for arg in args if arg.startswith(("--models-", "--no-models-"))]:
        raise ValueError(
            f"{several[0]}: one server has one model here, since its options depend on it; each model has a "
            "`refreekv serve` of its own, or `refreekv serve --python --config_file` has several"
        )
    if any(arg.startswith("--ssl") for arg in args):
        raise ValueError("--ssl_...: this llama-server is built without TLS; `refreekv serve --python` has it")
