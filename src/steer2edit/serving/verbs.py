"""The verbs of the command line that serve a model; heavy imports stand inside the functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..progress import be_quiet

Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's folder.")]


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command()(serve)
    app.command()(chat)


def serve(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, embedded:…, or a finished run.")],
    edits: Annotated[
        list[str] | None, typer.Argument(metavar="EDIT", help="Edit files or runs, each as PATH or NAME=PATH.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; by default only this machine reaches it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="NAME", help="The environment variable that holds the token.")
    ] = None,
    rows: Annotated[int, typer.Option(help="How many requests run at once.", min=1)] = 32,
    waiting: Annotated[int, typer.Option(help="How many more may wait before they get status 429.", min=0)] = 128,
    context: Annotated[int, typer.Option(help="The most tokens of a prompt and its answer.", min=2)] = 8192,
    max_tokens: Annotated[
        int, typer.Option(help="The most tokens of an answer, if the request names no number.", min=1)
    ] = 1024,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only errors.")] = False,
) -> None:
    """Serve a model and its edits to OpenAI's clients: every edit is a model name, and NAME@0.5 a strength."""
    from .server import key_of, listening, opened, require, serve_on
    from .sources import open_sources, section_of
    from .worker import one_team

    be_quiet(quiet)
    for package in ("fastapi", "uvicorn"):
        require(package, "serve")
    key = key_of(api_key, host)
    is_run = (Path(model) / "edit.safetensors").is_file()
    with one_team() as threads:
        sources = open_sources([*([model] if is_run else []), *(edits or [])])
        section = section_of(None if is_run else model, sources, dtype, device, trust_remote_code)
        limits = {"rows": rows, "waiting": waiting, "context": context, "tokens": max_tokens, "threads": threads}
        with listening(host, port) as bound, opened(section, sources, **limits) as (worker, catalogue):
            serve_on(worker, catalogue, bound, key)


def chat(
    sources: Annotated[
        list[str], typer.Argument(metavar="RUN|EDIT", help="A finished run or an edit file; more edits are mixed in.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Hub id, folder, .gguf file or embedded:…, if not the edit's own.")
    ] = None,
    system: Annotated[str, typer.Option(help="A system prompt.")] = "",
    strength: Annotated[float, typer.Option(help="The first edit's strength.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    tokens: Annotated[int, typer.Option(help="The most tokens of an answer.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the draws at a temperature above 0.", min=0)] = 0,
    web: Annotated[bool, typer.Option("--web", help="In a browser: all answers side by side, and sliders.")] = False,
    host: Annotated[str, typer.Option(help="With --web: the address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="With --web; 0 takes a free one.", min=0, max=65535)] = 7860,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No messages about the work.")] = False,
) -> None:
    """Talk to a model with an edit: in the terminal, or in a browser beside the original and the steered model."""
    from dataclasses import replace

    from ..engines.base import Sampling
    from .conversation import Conversation
    from .server import opened, require
    from .sources import open_sources, section_of
    from .worker import one_team

    be_quiet(quiet)
    if web:
        require("gradio", "chat")
    with one_team() as threads:
        opened_sources = open_sources(sources)
        section = section_of(model, opened_sources, dtype, device, trust_remote_code)
        with opened(section, opened_sources, rows=32, threads=threads) as (worker, _):
            conversation = Conversation(worker, opened_sources)
            if web:
                from .playground import serve_playground

                first = Path(sources[0].rpartition("=")[2])
                serve_playground(conversation, first if first.is_dir() else Path(), section.name, host, port)
                return
            from .terminal import chat_here

            settings = conversation.defaults()
            first_name = opened_sources[0].name
            settings = replace(
                settings,
                strengths={**settings.strengths, first_name: strength},
                sampling=Sampling(temperature),
                tokens=tokens,
                seed=seed,
            )
            chat_here(conversation, settings, system)
