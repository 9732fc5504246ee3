"""`grm-jax serve`: the judge as an HTTP service."""

import argparse
import importlib.util
import ipaddress
import os
import signal
import sys
from pathlib import Path

from grm_jax.cli.judge import adapter_of, add_sampling_flags, mesh_of, say_default
from grm_jax.errors import UsageError
from grm_jax.judge import GRM
from grm_jax.prompts import load_template

TOKEN_VARIABLE = "GRM_JAX_TOKEN"
_CONNECTIONS = 1024


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `serve` to the subcommands."""
    parser = commands.add_parser(
        "serve",
        help="the judge as an HTTP reward service",
        description="Serves one judge over HTTP; /docs describes the routes. The sampling flags "
        "set what requests leave out. It ends on SIGTERM when all it has accepted is answered.",
    )
    add_sampling_flags(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    add("--port", type=int, default=8000, help="default 8000; 0 picks a free one")
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"clients must send its content as a bearer token; or set {TOKEN_VARIABLE}",
    )
    add("--queue", type=int, default=256, metavar="N", help="judgements that may wait")
    add("--timeout", type=float, default=300, metavar="S", help="seconds a request may take")
    add("--max-body", type=int, default=4 << 20, metavar="BYTES", help="default 4 MiB")
    add("--group", type=int, default=4, metavar="N", help="responses judged side by side")
    add(
        "--gather",
        type=float,
        default=0,
        metavar="S",
        help="seconds that /get_reward waits for other completions of a prompt (default 0)",
    )
    add("--drain", type=float, default=600, metavar="S", help="seconds to finish in on SIGTERM")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> bool:
    """Serves until it is told to end; returns whether all that was accepted was answered."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise UsageError("serving needs further packages: pip install 'grm_jax[serve]'")
    import uvicorn  # only this command needs it

    from grm_jax.serving import Defaults, ModelEngine, Options, Service, create_app

    options = Options(
        model=args.model,
        token=read_token(args.token_file),
        queue=args.queue,
        timeout=args.timeout,
        max_body=args.max_body,
        group=args.group,
        gather=args.gather,
        defaults=Defaults(
            samples=args.samples,
            temperature=args.temperature,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
            orders=args.orders,
            constrain=args.constrain,
            seed=args.seed,
        ),
    )
    if options.token is None and not _is_loopback(args.host):
        print(
            f"grm-jax: anybody who reaches {args.host} can use this service; set {TOKEN_VARIABLE} "
            "or --token-file",
            file=sys.stderr,
        )
    template = load_template(args.template)
    mesh = mesh_of(args)
    grm = GRM.from_pretrained(args.model, adapter=adapter_of(args), mesh=mesh)
    # It checks the settings now, rather than at the first request.
    meta = None if args.meta_model is None else GRM.meta_model(args.meta_model, mesh=mesh)
    grm.judge_batch(
        [],
        **vars(options.defaults),
        top_k=args.top_k,
        template=template,
        meta_model=meta,
        k_meta=args.k_meta,
        scores=args.scores,
    )
    say_default(args)
    engine = ModelEngine(
        grm=grm,
        template=template,
        top_k=args.top_k,
        meta_model=meta,
        k_meta=args.k_meta,
        scores=args.scores,
    )
    service = Service(engine.plan, template=template, options=options)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            host=args.host,
            port=args.port,
            log_level="warning",
            limit_concurrency=_CONNECTIONS,
            # Longer than any `Retry-After`, so that no client finds its connection closed on it.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(args.drain) or 1,
            server_header=False,
        )
    )
    address = f"http://{args.host}:{args.port}"
    print(f"grm-jax: serving {args.model} at {address}, described at {address}/docs", flush=True)
    # The server takes the signal, ends, and raises it once more.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    server.run()
    # What clients still wait for, the server has waited for; this ends the thread.
    return service.batcher.drain(timeout=args.drain)


def read_token(file: Path | None) -> str | None:
    """The bearer token from a file or the environment; None if neither names one.

    Raises:
      UsageError: If the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the token from {file}") from error
    if not token:
        raise UsageError(f"{file} holds no token")
    return token


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
