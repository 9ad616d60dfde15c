"""`visrl eval CONFIG` runs a model over a benchmark; score, judge, agree, compare and leaderboard run none.

Each prints what it read, what it left out and where the result lies. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from visrl.cli.verbs import ApiKeyEnv, ExtraBody, MaxTokensKey, OmitField, Verbs, json_object
from visrl.failures import MAX_FAILED
from visrl.progress import next_command
from visrl.prompts import JUDGE_TOKENS


class RunUnlessNamed(Verbs):
    """`visrl eval CONFIG.yaml key=value` is `visrl eval run CONFIG.yaml key=value`: the verb's form everywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and (Path(args[0]).suffix in (".yaml", ".yml") or "=" in args[0]):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunUnlessNamed,
    no_args_is_help=True,
    help="Run a model over a benchmark (`visrl eval CONFIG.yaml key=value`), score, judge and compare.",
)


class ProtocolName(StrEnum):
    """What a prediction file holds."""

    detection = "detection"
    refcoco = "refcoco"
    answers = "answers"
    lmms_eval = "lmms-eval"
    vlmevalkit = "vlmevalkit"


class ToolkitName(StrEnum):
    """Whose form results are exported in."""

    lmms_eval = "lmms-eval"
    vlmevalkit = "vlmevalkit"


Predictions = Annotated[Path, typer.Option(help="Prediction file, or a folder of them by data set.")]
Truth = Annotated[Path | None, typer.Option(help="The data set's own file (or the folder of them).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Out = Annotated[Path | None, typer.Option(help="Write the result rows here, for `visrl eval compare`.")]


@app.command()
def run(
    config: Annotated[str | None, typer.Argument(help="A YAML file of flat `key: value` lines.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, over the file's.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first N questions of each data set, as max_samples=N.", metavar="N")
    ] = None,
) -> None:
    """Run a model over a benchmark and score its boxes and answers; `run` may be left out."""
    from visrl.config import read_config, split_arguments
    from visrl.evaluate.config import EvalConfig
    from visrl.evaluate.run import evaluate

    path, given = split_arguments(config, overrides)
    settings = read_config(EvalConfig, path, [*given, *([f"max_samples={limit}"] if limit else [])])
    evaluate(settings)
    if not settings.dry_run:
        typer.echo(next_command("look at them", "visrl", "report", settings.output_dir))


@app.command()
def score(
    predictions: Predictions,
    protocol: Annotated[ProtocolName, typer.Option(help="What the file holds.")],
    truth: Truth = None,
    judgements: Annotated[Path | None, typer.Option(help="Answers: what `visrl eval judge` wrote.")] = None,
    box_codec: Annotated[
        str | None,
        typer.Option("--box-codec", "--codec", help="Boxes: the codec that our rule reads their text with."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="lmms-eval, VLMEvalKit: their name of the task, if the file's does not say it.")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="lmms-eval, VLMEvalKit: the published rule to score by, in place of theirs.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Score prediction files of other programs, by the published rule and by ours."""
    _refuse_unused(protocol, truth=truth, judgements=judgements, box_codec=box_codec, task=task, rule=rule)
    if protocol is ProtocolName.answers:
        _score_answers(predictions, truth, judgements, out, as_json)
    elif protocol in _TOOLKITS:
        _score_toolkit(predictions, protocol, task, rule, out, as_json)
    else:
        _score_boxes(predictions, truth, box_codec, out, as_json)


@app.command()
def export(
    results: Annotated[Path, typer.Argument(help="A result file, or a folder of `visrl eval`.")],
    out: Annotated[Path, typer.Argument(help=".jsonl of lmms-eval; .xlsx, .tsv or .json of VLMEvalKit.")],
    to: Annotated[ToolkitName, typer.Option(help="Whose form.")],
) -> None:
    """Write results as lmms-eval logs its samples or VLMEvalKit its predictions."""
    from visrl.evaluate.results import read_results
    from visrl.evaluate.toolkit_export import export_results

    toolkit: Any = str(to)
    counts = export_results(read_results(results), out, toolkit)
    left_out = f", {counts['skipped']:,} left out that the mode did not apply to" if counts["skipped"] else ""
    typer.echo(f"{counts['written']:,} rows{left_out}: {out}")


@app.command()
def judge(
    predictions: Predictions,
    out: Annotated[Path, typer.Option(help="File of the judgements; a stopped run resumes from it.")],
    model: Annotated[str, typer.Option(help="The judge's name on its server.")],
    base_url: Annotated[list[str], typer.Option(help="Address of an OpenAI-compatible server, up to /v1; may repeat.")],
    truth: Truth = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds for one try.")] = 60.0,
    attempts: Annotated[int, typer.Option(min=1, help="Tries before a judgement counts as failed.")] = 6,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="The most a judge may write; raise it for a reasoning model.")
    ] = JUDGE_TOKENS,
    max_tokens_key: MaxTokensKey = None,
    omit_field: OmitField = None,
    extra_body: ExtraBody = None,
    api_key_env: ApiKeyEnv = None,
    max_failed: Annotated[
        float, typer.Option(min=0, max=1, help="The share that may fail; beyond it the command ends with status 1.")
    ] = MAX_FAILED,
) -> None:
    """Ask an LLM judge about every answer, with the published prompt."""
    from visrl.evaluate.answers import score_answer_files
    from visrl.evaluate.judging import format_judged, judge_answers

    rows, _ = score_answer_files(predictions, truth)
    answered = sum(row.get("prediction") is not None for row in rows)
    said = {
        "max_tokens_key": max_tokens_key,
        "omit_fields": omit_field,
        "extra_body": json_object(extra_body, "--extra-body"),
        "api_key_env": api_key_env,
    }
    with typer.progressbar(length=answered, label=f"{model} judges") as bar:
        counts = judge_answers(
            rows,
            out,
            model=model,
            base_url=base_url,
            concurrency=concurrency,
            timeout_s=timeout,
            attempts=attempts,
            max_tokens=max_tokens,
            max_failed=max_failed,
            on_judgement=lambda _: bar.update(1),
            **{key: value for key, value in said.items() if value},
        )
    typer.echo(format_judged(counts))
    if answered < len(rows):
        typer.echo(f"{len(rows) - answered} questions without an answer were not shown to the judge")
    typer.echo(f"judgements: {out}")


@app.command()
def agree(a: Path, b: Path, as_json: AsJson = False) -> None:
    """Agreement of two judges on the same answers: equal scores, correlation, kappa."""
    from visrl.evaluate.judging import agree as agree_on

    result = agree_on(a, b)
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"{result['n']} answers that both scored")
    typer.echo(f"left out: {result['unread']} unread by one of them, {result['not_shared']} that one alone judged")
    for name in ("same", "mean_absolute", "mean_a", "mean_b", "pearson", "kappa"):
        typer.echo(f"{name:14} {'–' if result[name] is None else format(result[name], '.3f')}")


@app.command()
def compare(a: Path, b: Path, seed: int = 0, as_json: AsJson = False) -> None:
    """Compare two runs on the same questions: B − A with its interval, McNemar's test, and what B gains and harms."""
    from visrl.evaluate.compare import compare as compare_results
    from visrl.evaluate.results import mode_of, read_results
    from visrl.evaluate.tables import comparison_lines
    from visrl.rewards.crop_effects import BASELINES

    result = compare_results(read_results(a), read_results(b), seed)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        modes = [mode_of(path) for path in (a, b)]
        name_a, name_b = (
            f"{path} (mode {mode})" if mode else str(path) for path, mode in zip((a, b), modes, strict=True)
        )
        is_crop = modes[0] in BASELINES and modes[1] is not None and modes[1] not in BASELINES
        typer.echo("\n".join(comparison_lines(result, name_a, name_b, is_crop)))


@app.command()
def leaderboard(
    results: Annotated[
        list[Path], typer.Argument(help="Result files or folders of one checkpoint each; NAME=PATH names it.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("leaderboard.html"),
    judge_name: Annotated[str, typer.Option("--judge", help="Who judged these results.")] = "not said",
    benchmark: Annotated[
        str | None, typer.Option(help="What files are results of (viscot, if left out); folders say it.")
    ] = None,
    picture_limit: Annotated[
        str | None, typer.Option(help="How large images were shown, for files; folders say it.")
    ] = None,
) -> None:
    """Write one page with your results among the published ones; only what came about alike is ranked together."""
    from visrl.errors import UserError
    from visrl.evaluate.leaderboard import read_entry, write_leaderboard
    from visrl.evaluate.results import facts_of

    split = [str(given).partition("=") for given in results]
    named = [(name, path) if equals else (Path(name).stem, name) for name, equals, path in split]
    said = [option for option, value in (("--benchmark", benchmark), ("--picture-limit", picture_limit)) if value]
    if said and all(facts_of(path) for _, path in named):
        raise UserError(f"{' and '.join(said)}: for files alone; every folder here says it itself, so leave it out")
    entries = [
        read_entry(name, path, judge_name, benchmark or "viscot", picture_limit or "not said") for name, path in named
    ]
    write_leaderboard(out, entries)
    typer.echo(f"leaderboard: {out}")


# --- Pieces -----------------------------------------------------------------------------------------------------------

_TOOLKITS = (ProtocolName.lmms_eval, ProtocolName.vlmevalkit)
_BOXES = (ProtocolName.detection, ProtocolName.refcoco)
_USED_BY = {
    "truth": (*_BOXES, ProtocolName.answers),
    "judgements": (ProtocolName.answers,),
    "box_codec": _BOXES,
    "task": _TOOLKITS,
    "rule": _TOOLKITS,
}


def _refuse_unused(protocol: ProtocolName, **given: Any) -> None:
    """Refuse an option that this protocol has no use for."""
    from visrl.errors import UserError

    for name, value in given.items():
        if value is not None and protocol not in _USED_BY[name]:
            option, fitting = f"--{name.replace('_', '-')}", ", ".join(_USED_BY[name])
            raise UserError(f"{option} has no use for --protocol {protocol}; it is for {fitting}")


def _score_toolkit(
    predictions: Path, protocol: ProtocolName, task: str | None, rule: str | None, out: Path | None, as_json: bool
) -> None:
    from visrl.evaluate.tables import choice_lines, logged_lines, summary_lines
    from visrl.evaluate.toolkits import score_toolkit

    toolkit: Any = str(protocol)
    scores = score_toolkit(predictions, toolkit, task, rule)
    _write(out, scores.rows, quiet=as_json)
    summary = scores.summary()
    if as_json:
        typer.echo(json.dumps(summary, ensure_ascii=False))
        return
    rules = dict.fromkeys(rule for rule in scores.rules.values() if rule)
    told = {"reading": f"{toolkit} has it and as ours", "rule": "; ".join(rules) or "no rule of theirs is known"}
    typer.echo("\n".join([*summary_lines(summary), "", *choice_lines({**summary, **told}), *logged_lines(summary)]))


def _score_boxes(predictions: Path, truth: Path | None, codec: str | None, out: Path | None, as_json: bool) -> None:
    from visrl.evaluate.boxfiles import score_box_files
    from visrl.evaluate.tables import summary_lines
    from visrl.rewards.results import summarise

    rows, totals = score_box_files(predictions, truth, codec)
    _write(out, rows, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(totals))
        return
    typer.echo("\n".join(summary_lines(summarise(rows))))
    typer.echo("")
    for name, value in totals.items():
        typer.echo(f"{name}: {json.dumps(value)}")


def _score_answers(
    predictions: Path, truth: Path | None, judgements: Path | None, out: Path | None, as_json: bool
) -> None:
    from visrl.evaluate.answers import score_answer_files, with_averages, with_judgements
    from visrl.evaluate.tables import summary_lines
    from visrl.records import RecordError
    from visrl.rewards.judge import read_judgements
    from visrl.rewards.results import summarise

    rows, missing = score_answer_files(predictions, truth)
    if judgements is not None:
        if not judgements.is_file():
            raise RecordError(f"no judgements at {judgements}; make them with `visrl eval judge`")
        rows = with_judgements(rows, list(read_judgements(judgements)))
    _write(out, rows, quiet=as_json)
    summary = with_averages({**summarise(rows), "missing": len(missing)})
    if as_json:
        typer.echo(json.dumps(summary, ensure_ascii=False))
        return
    if missing:
        typer.echo(
            f"{len(missing)} questions of the truth are not answered, {missing[0]} the first: not in these figures"
        )
    typer.echo("\n".join(summary_lines(summary)))
    if summary["missing_datasets"]:
        typer.echo(f"\nno answers to: {', '.join(summary['missing_datasets'])}; the means above are over the others")
    if summary["average_published"] is not None:
        typer.echo(f"\naverage as published, missing data sets counted 0: {summary['average_published']:.3f}")


def _write(out: Path | None, rows: list[dict[str, Any]], quiet: bool) -> None:
    from visrl.records import write_records

    if out is not None:
        write_records(out, rows)
        if not quiet:
            typer.echo(f"result rows: {out}")
