"""The command line: verbs that parse, then import what they need. A typo is refused before torch is loaded."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from visrl.cli.data import app as data_app
from visrl.cli.evaluate import app as eval_app
from visrl.cli.verbs import Verbs
from visrl.progress import next_command

app = typer.Typer(
    name="visrl",
    cls=Verbs,
    help="Teach a vision-language model where to look, by reinforced reasoning instead of box labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Verbs that users of other programs type, and where that is done here.
ELSEWHERE = {
    "chat": "visrl ask --model CHECKPOINT --image PICTURE QUESTION asks once; visrl api serves a page to ask on",
    "webchat": "visrl api CONFIG serves a page to ask on, at the address that it prints",
    "webui": "there is no page to train on: visrl train CONFIG trains, visrl report RUN draws it",
    "predict": "visrl eval CONFIG asks a model every question of a data set and scores what it says",
    "merge": "visrl export CONFIG merges adapters into their model",
    "infer": "visrl ask asks about one picture, visrl eval about a data set, visrl api serves",
    "serve": "visrl api CONFIG serves",
    "sft": "visrl train CONFIG with stage: sft",
    "dpo": "visrl train CONFIG with stage: dpo",
    "rlhf": "visrl train CONFIG with stage: dpo",
}

ConfigFile = Annotated[str | None, typer.Argument(help="a YAML file of flat `key: value` lines", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, over the file's", show_default=False)]


def _given(config: str | None, overrides: list[str] | None) -> tuple[Path | None, list[str]]:
    from visrl.config import split_arguments

    return split_arguments(config, overrides)


@app.command()
def demo(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Run the whole loop on synthetic scenes with the embedded model, and write a report."""
    from visrl.config import read_config
    from visrl.evolve.config import DemoConfig
    from visrl.evolve.demo import run_demo

    run_demo(read_config(DemoConfig, *_given(config, overrides)))


@app.command()
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print items, tokens, steps, unusable rows and peak memory; write nothing")
    ] = False,
) -> None:
    """Warm-up (stage: sft), or preference training of boxes (stage 1) and of boxes and answers (stage 2)."""
    from visrl.config import read_config
    from visrl.train.config import TrainConfig

    path, given = _given(config, overrides)
    settings = read_config(TrainConfig, path, [*given, *["dry_run=true"] * dry_run])
    from visrl.train.run import train as run

    run(settings)


@app.command()
def generate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    check: Annotated[int, typer.Option(metavar="N", min=0, help="Only check the critic, on N questions.")] = 0,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Make only the I-th of N parts.")] = None,
) -> None:
    """Roll out boxes and answers for every question, and let a critic score them."""
    from visrl.config import read_config
    from visrl.evolve.config import GenerateConfig
    from visrl.evolve.generate import generate as run

    path, given = _given(config, overrides)
    settings = read_config(GenerateConfig, path, [*given, *([f"shard={shard}"] if shard else [])])
    if check:
        from visrl.evolve.check import check_critic

        check_critic(settings, check)
        return
    run(settings)
    if settings.shard == "1/1":
        pairs = settings.output_dir.with_name(f"{settings.output_dir.name}-pairs")
        words = [f"input_dir={settings.output_dir}", *["losers=own"] * settings.looks_several_times]
        typer.echo(next_command("keep pairs", "visrl", "filter", *words, f"output_dir={pairs}"))


@app.command(name="filter")
def filter_(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Keep the best and the worst trajectory of every question as preferences."""
    from visrl.config import read_config
    from visrl.evolve.config import FilterConfig
    from visrl.evolve.filter import filter_pairs

    settings = read_config(FilterConfig, *_given(config, overrides))
    filter_pairs(settings)
    pairs = settings.output_dir / "preferences.jsonl"
    typer.echo(next_command("train on them", "visrl", "train", "configs/train_rl.yaml", f"dataset={pairs}"))


@app.command()
def evolve(
    config: ConfigFile = None,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only print the plan.")] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Make only this part of the next generation.")
    ] = None,
) -> None:
    """Iterate generate → filter → stage 1 → stage 2; prints the plan first, and resumes."""
    from visrl.config import read_config
    from visrl.evolve.config import EvolveConfig
    from visrl.evolve.loop import run_evolve

    run_evolve(read_config(EvolveConfig, *_given(config, overrides)), shard=shard, plan_only=plan)


@app.command()
def export(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Merge an adapter into its base model, and check the result."""
    from visrl.config import read_config
    from visrl.train.export import ExportConfig
    from visrl.train.export import export as run

    settings = read_config(ExportConfig, *_given(config, overrides))
    run(settings)
    typer.echo(next_command("serve it", "visrl", "api", f"model_name_or_path={settings.export_dir}"))


@app.command()
def api(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Serve a checkpoint behind the OpenAI protocol; a model name ending in `:focus` looks before it answers."""
    from visrl.config import read_config
    from visrl.serve.config import ServeConfig

    settings = read_config(ServeConfig, *_given(config, overrides))
    from visrl.serve.runner import serve

    serve(settings)


@app.command()
def ask(
    questions: Annotated[
        list[str],
        typer.Argument(help="one or more questions about the image; key=value sets a key of the policy"),
    ],
    model: Annotated[str, typer.Option(help="a checkpoint folder")],
    image: Annotated[str, typer.Option(help="the path of an image, or scene:POOL/INDEX for a synthetic scene")],
    compare: Annotated[list[str] | None, typer.Option(help="another checkpoint to ask the same; may repeat")] = None,
    policy_url: Annotated[
        list[str] | None,
        typer.Option(help="address of a server of --model, up to /v1, instead of loading it here; may repeat"),
    ] = None,
    out: Annotated[Path, typer.Option(help="the picture with boxes, crops and answers")] = Path("ask.png"),
) -> None:
    """Ask about an image: where each checkpoint looks, the crop it sees and what it answers.

    `policy_url=http://…/v1` (or --policy-url) asks a server; `policy_served_name`, `box_codec` and others go with it.
    """
    from visrl.engines.open import PolicyConfig
    from visrl.evaluate.ask import ask_models

    given = [text for text in questions if text.partition("=")[0].strip() in PolicyConfig.known_keys() and "=" in text]
    asked = [text for text in questions if text not in given]
    if not asked:
        raise typer.BadParameter("ask a question about the picture", param_hint="QUESTIONS")
    if policy_url:
        given.append(f"policy_url={json.dumps(policy_url)}")
    ask_models([model, *(compare or [])], image, asked, out, given)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="the folder of a run, finished or not")]) -> None:
    """Write one HTML page for a run: scores, loop, learning curves, controls, gallery."""
    from visrl.report.page import report as write

    write(run)


@app.command()
def version() -> None:
    """Print the version."""
    from visrl.environment import version_line

    typer.echo(version_line())


@app.command()
def env(
    model: Annotated[str | None, typer.Option("--model", help="A checkpoint: say what its model takes.")] = None,
) -> None:
    """Print versions, machine, devices and paths for a bug report; no secrets."""
    from visrl.environment import environment_lines, model_lines

    typer.echo("\n".join([*environment_lines(), *(model_lines(model) if model else ())]))


@app.command(name="help", hidden=True)
def help_(context: typer.Context) -> None:
    """The same as --help."""
    assert context.parent is not None
    typer.echo(context.parent.get_help())


def _elsewhere(verb: str) -> None:
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    @app.command(name=verb, hidden=True, context_settings=settings)
    def say() -> None:
        from visrl.config import ConfigError

        raise ConfigError(f"`visrl {verb}` is no verb here: {ELSEWHERE[verb]}")


for _verb in ELSEWHERE:
    _elsewhere(_verb)


@app.callback(invoke_without_command=True)
def options(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    if show_version:
        version()
        raise typer.Exit()


app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")


def main(arguments: list[str] | None = None, defaults: list[str] | None = None) -> None:
    """The program `visrl` (and `visrl-cli`)."""
    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks is told as its escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    if defaults and given and given[0] == "train":
        given = [*given, *defaults]
    app(given)


def main_stage2() -> None:
    """The program `visrl-cli-stage2`: `train` with rl_stage=2."""
    main(defaults=["rl_stage=2"])
