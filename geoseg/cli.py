"""The command line: a few lines for each command; what is heavy is imported inside them."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from geoseg import __version__

if TYPE_CHECKING:
    from geoseg.predict.record import RunReport


_INTERRUPTED = "geoseg: interrupted; what is finished stays, the same command goes on from there"


class _Group(click.Group):
    """Turns errors of ours into one sentence and an exit code; others keep their traceback, without secrets."""

    def invoke(self, ctx: click.Context) -> Any:
        import signal
        import traceback

        from geoseg.errors import GeosegError
        from geoseg.redaction import redact

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as schedulers end what a person interrupts
        try:
            return super().invoke(ctx)
        except GeosegError as error:
            if ctx.params.get("debug"):
                click.echo(redact(traceback.format_exc()), err=True)
            click.echo(f"geoseg: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(_INTERRUPTED, err=True)
            sys.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click tells these
        except Exception:  # noqa: BLE001 - whatever it is, its text may hold a token
            click.echo(redact(traceback.format_exc()), err=True, nl=False)
            sys.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="geoseg")
@click.option("--debug", is_flag=True, help="Show where an error came from.")
def main(debug: bool) -> None:
    """Roads and buildings from imagery, at any scale.

    \b
      geoseg demo                           see it work: no bucket, no GPU, about a minute
      geoseg check scene.tif                what geoseg sees in a file, and what it would refuse
      geoseg predict scene.tif --out out    masks of a file, a folder, a glob or s3://bucket/prefix
      geoseg train train.toml               a bundle from your own labels
      geoseg view out                       image, mask, polygons and roads on a map in the browser
      geoseg vectorize out                  buildings as polygons, roads as a graph: GeoParquet beside the masks
      geoseg worth-labelling out --to F     the squares of which the network is least certain
      geoseg catalogue out                  a STAC collection, items.parquet, one layer for QGIS
      geoseg reproduce out/SCENE            make a published mask again from its item, and compare
      geoseg evaluate EVALUATE.toml         scores, error maps and pictures of labelled scenes
      geoseg verify out                     read everything published again and check it
      geoseg nightly JOB.toml               what is new or changed in the sources, and nothing else
      geoseg canary JOB.toml --bundle NEW   what a new bundle would change, on a sample of what is published
      geoseg status | why | retry           how an output stands; one scene's story; the failed ones again
      geoseg models                         the networks, and what each costs
    geoseg tune                           measure this device once, for later runs

    Exit codes: 0 done, 1 some scenes failed, 2 usage or config, 3 nothing readable, 4 access denied, 5 another run
    holds the output, 130 interrupted.
    """
    del debug


def _numbers(kind: type) -> Any:
    def parse(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        del ctx
        if value is None:
            return None
        try:
            return tuple(kind(part) for part in value.split(","))
        except ValueError as error:
            raise click.BadParameter(f"wants numbers with commas between them, got {value!r}", param=param) from error

    return parse


def _resolution(ctx: click.Context, param: click.Parameter, value: str | None) -> str | float | None:
    del ctx
    if value in (None, "bundle", "native"):
        return value
    try:
        return float(value or "")
    except ValueError as error:
        raise click.BadParameter("wants 'bundle', 'native' or metres", param=param) from error


_HOW_TO_READ = (
    click.option("--bundle", help="Bundle to run: a name or a URI.  [default: roads-buildings]"),
    click.option("--bands", callback=_numbers(int), help="Bands to take for the bundle's, from 1: 4,3,2."),
    click.option("--scale", callback=_numbers(float), help="Raw values for the ends of the bundle's range: 0,2047."),
    click.option("--resolution", callback=_resolution, help="'bundle', 'native' or metres.  [default: bundle]"),
    click.option("--assume-crs", help="CRS of scenes that name none: EPSG:25832."),
    click.option("--nodata", type=float, help="Nodata value of scenes that name none."),
    click.option("--sidecar-mask", is_flag=True, default=None, help="Allow <scene>.msk to say which pixels are valid."),
    click.option(
        "--stack-by", help="Group scenes into stacks: regular expression with (?P<stack>...) and (?P<date>...)."
    ),
    click.option("--warp-stacks", is_flag=True, default=None, help="Read scenes of a stack on the grid of its first."),
    click.option("--aoi", help="GeoJSON file of polygons; outside them the mask is nodata."),
)


def _how_to_read(command: Any) -> Any:
    for option in reversed(_HOW_TO_READ):
        command = option(command)
    return command


@main.command()
@click.argument("scenes", nargs=-1)
@click.option("--out", help="Folder or prefix for masks and items.")
@click.option("--config", type=click.Path(dir_okay=False), help="Job file (TOML); options here overrule it.")
@_how_to_read
@click.option("--prune", type=int, help="Run a unet++ at this smaller depth.")
@click.option("--flips-and-turns", is_flag=True, default=None, help="Mean logits of the eight ways to look at a scene.")
@click.option("--pyramid", callback=_numbers(int), help="Mean logits of the scene at 1/1, 1/2 and so on: 1,2,4.")
@click.option("--resampling", type=click.Choice(["bilinear", "nearest"]), help="Of a pyramid.  [default: bilinear]")
@click.option("--tile", type=int, help="Side of the squares that a network from outside is run on.")
@click.option("--max-seam-score", type=float, help="Do not publish a scene whose blended tiles show more than this.")
@click.option("--probabilities", is_flag=True, default=None, help="Also publish the probability of each class.")
@click.option("--uncertainty", type=click.Choice(["entropy", "margin"]), help="Also publish how unsure each pixel is.")
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16"]), help="Of the network.  [default: as the device has it]"
)
@click.option("--coarse", type=int, help="Look at 1/2, 1/4 or 1/8 of the resolution first, closer where that pays.")
@click.option("--coarse-threshold", type=float, help="Probability of a class from which on it does.  [default: 0.05]")
@click.option("--window", type=int, help="Side of a window in pixels: 512, 1024, 2048, 4096 or 8192.")
@click.option("--batch", type=int, help="Windows per forward pass.")
@click.option("--workers", type=int, help="Workers of the cluster.")
@click.option("--address", help="Ray cluster to use; without one a private Ray is started when needed.")
@click.option("--engine", type=click.Choice(["auto", "local", "ray"]), help="A plain loop or Ray.  [default: auto]")
@click.option("--read", type=click.Choice(["actor", "tasks"]), help="Read in the workers or in tasks before them.")
@click.option("--plan", is_flag=True, help="Tell what would be done; write nothing.")
@click.option("--quiet", is_flag=True, help="No progress.")
def predict(
    scenes: tuple[str, ...], out: str | None, config: str | None, plan: bool, quiet: bool, **options: Any
) -> None:
    """Predict masks for SCENES (files, folders, globs, prefixes, or a .txt list) and publish them."""
    from geoseg.config import load_job
    from geoseg.run import plan_job, run_job

    job = load_job(config, _sections(options, scenes=list(scenes) or None, out=out))
    if plan:
        for line in plan_job(job).lines():
            click.echo(line)
        return
    report = run_job(job, quiet=quiet)
    for scene in report.scenes:
        told = scene.sentence or scene.mask
        click.echo(f"{scene.status}: {scene.id}" + (f": {told}" if told else ""))
    for sentence in report.remarks:
        click.echo(sentence, err=True)
    _end(report)


def _sections(options: dict[str, Any], **top: Any) -> dict[str, Any]:
    from geoseg.config import ClusterConfig

    cluster = {key: options.pop(key) for key in list(options) if key in ClusterConfig.model_fields}
    top |= {"bundle": options.pop("bundle", None), "stack_by": options.pop("stack_by", None)}
    return {**top, "predict": options, "cluster": cluster}


@main.command()
@click.argument("job", type=click.Path(dir_okay=False))
@click.option("--bundle", help="Bundle to judge: a name or a URI.  [default: roads-buildings]")
@click.option("--out", help="Folder or prefix for the report, error maps and pictures.")
@click.option("--workers", type=int, help="Workers of the cluster.")
@click.option("--address", help="Ray cluster to use; without one a private Ray is started for several workers.")
def evaluate(job: str, bundle: str | None, out: str | None, **cluster: Any) -> None:
    """Judge a bundle by the labelled scenes of JOB (TOML): scores of each source and class, error maps, pictures."""
    from geoseg.config import load_settings
    from geoseg.evaluate.job import EvaluationJob
    from geoseg.run import run_evaluation

    evaluation = run_evaluation(load_settings(EvaluationJob, job, {"bundle": bundle, "out": out, "cluster": cluster}))
    for line in evaluation.lines():
        click.echo(line)
    sys.exit(evaluation.exit_code)


@main.command()
@click.argument("scenes", nargs=-1, required=True)
@_how_to_read
def check(scenes: tuple[str, ...], **options: Any) -> None:
    """Tell what geoseg sees in SCENES and what it would refuse; reads headers alone."""
    from geoseg.config import load_job
    from geoseg.run import check_job

    checked = check_job(load_job(None, _sections(options, scenes=list(scenes), out=".")))
    for told in checked:
        click.echo(told.text)
    refused = sum(told.refused for told in checked)
    sys.exit(0 if not refused else 1 if refused < len(checked) else 3)


@main.command()
@click.option("--window", default=512, show_default=True, help="Side of a window in pixels.")
@click.option("--dates", default=4, show_default=True, help="Dates of a stack.")
@click.option("--bundle", help="A bundle to list too: a name or a URI.")
def models(window: int, dates: int, bundle: str | None) -> None:
    """List the networks: parameters, stride, margin, and what a pixel and a window cost.

    kFLOP/px: thousands of operations for a pixel in an endless image; in window: for a pixel of a window with its share of the
    margin; padded: the same when the border that is thrown away is computed too. Peak: tensors that stand at once.
    """
    from geoseg.model.costs import costs_table, family_costs

    costs = family_costs(core=window, dates=dates)
    if bundle is not None:
        from geoseg.predict.bundles import bundle_costs

        costs |= bundle_costs(bundle, core=window)
    for line in costs_table(costs):
        click.echo(line)


@main.command()
@click.option("--bundle", default="roads-buildings", show_default=True, help="A name or a URI.")
@click.option("--threads", default=1, show_default=True, help="Threads of the network on a CPU, as each worker has.")
def tune(bundle: str, threads: int) -> None:
    """Measure which windows and batches this device is fastest with, and remember them for later runs of this user.

    The masks stay the same to the last bit. In a cluster run it on a worker's node, or put the lines it ends with into the job.
    """
    import torch

    from geoseg.predict.bundles import load_bundle
    from geoseg.predict.measure import tune_device

    torch.set_num_threads(threads)
    for line in tune_device(load_bundle(bundle)):
        click.echo(line)


@main.command("bundle")
@click.argument("description", type=click.Path(dir_okay=False))
@click.argument("weights")
@click.option("--out", required=True, help="Folder or prefix for the bundle.")
def make_bundle(description: str, weights: str, out: str) -> None:
    """Make a bundle of DESCRIPTION (a model.json) and WEIGHTS (the URI of a safetensors file).

    The margin of a network from outside is measured, which takes seconds, and written into the description.
    """
    from geoseg.predict.bundles import describe_network, put_together

    bundle = put_together(description, weights, out)
    click.echo(f"{out}: {describe_network(bundle)}")


@main.command()
@click.argument("job", type=click.Path(dir_okay=False))
@click.option("--out", help="Folder or prefix for checkpoints, bundles, logs and pictures.")
@click.option("--seed", type=int, help="Decides the first weights and all chips.")
@click.option("--workers", type=int, help="Workers that train together.")
@click.option("--address", help="Ray cluster to use; without one a private Ray is started when needed.")
@click.option(
    "--engine", type=click.Choice(["auto", "local", "ray"]), help="One process or Ray Train.  [default: auto]"
)
@click.option("--quiet", is_flag=True, help="No progress.")
def train(job: str, out: str | None, seed: int | None, quiet: bool, **cluster: Any) -> None:
    """Train a bundle as the TRAIN.toml file JOB says, or go on with a training that was interrupted."""
    from geoseg.run_training import run_training
    from geoseg.train.job import load_train_job

    loaded = load_train_job(job, {"out": out, "seed": seed, "cluster": cluster})
    report = run_training(loaded, warn=lambda sentence: click.echo(f"warning: {sentence}", err=True), quiet=quiet)
    for line in report.lines():
        click.echo(line)


@main.command()
@click.argument("job", type=click.Path(dir_okay=False))
@click.option("--cron", required=True, help="When: minute, hour, day, month, weekday: '0 2 * * *'.")
@click.option("--timezone", required=True, help="Of that time: Europe/Zurich.")
@click.option(
    "--as",
    "scheduler",
    type=click.Choice(["kubernetes", "systemd", "crontab", "airflow"]),
    default="kubernetes",
    show_default=True,
)
@click.option("--image", help="Of the pods (kubernetes).")
@click.option("--namespace", default="geoseg", show_default=True, help="Of the pods (kubernetes).")
@click.option(
    "--address", help="Submit to this Ray cluster (http://head:8265) instead of running on the machine itself."
)
def schedule(job: str, cron: str, timezone: str, scheduler: str, **where: Any) -> None:
    """Print what makes a scheduler run `geoseg nightly JOB` at that time; nothing is changed anywhere."""
    import shutil
    from datetime import datetime
    from pathlib import Path

    from geoseg.jobfile import load_job_file
    from geoseg.schedule import SCHEDULERS, Night, When

    when = When(cron, timezone)
    program = shutil.which("geoseg") or "geoseg"
    night = Night(job=load_job_file(job), path=Path(job).resolve(), when=when, program=program, **where)
    click.echo(SCHEDULERS[scheduler](night), nl=False)
    jumped = when.skipped(datetime.now())  # noqa: DTZ005 - the clock on the wall
    if jumped is not None:
        click.echo(
            f"warning: in {timezone} there is no {jumped:%H:%M on %Y-%m-%d}; that night may be left out", err=True
        )


@main.command("start-rayjob", hidden=True)
@click.argument("template")
@click.option("--job", required=True, type=click.Path(dir_okay=False), help="Job file; with the day it makes the name.")
@click.option("--timezone", required=True, help="Decides which day it is.")
def start_rayjob(template: str, job: str, timezone: str) -> None:
    """In a pod: copy the suspended RayJob TEMPLATE under tonight's name and follow it to its end."""
    import os
    from datetime import datetime
    from zoneinfo import ZoneInfo

    from geoseg.jobfile import load_job_file
    from geoseg.kubernetes import ApiServer, start_ray_job

    environment = dict(os.environ)
    owner = (environment["OWNER_NAME"], environment["OWNER_UID"]) if environment.get("OWNER_UID") else None
    name = load_job_file(job).submission_id("nightly", datetime.now(ZoneInfo(timezone)).date())
    sys.exit(start_ray_job(ApiServer.of_this_pod(environment), template, name, owner=owner, tell=click.echo))


@main.command()
@click.argument("job", type=click.Path(dir_okay=False), required=False)
@click.option(
    "--address", required=True, envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster: http://head:8265."
)
@click.option(
    "--run", "kind", type=click.Choice(["nightly", "predict", "train", "evaluate"]), help="[default: nightly]"
)
@click.option("--name", help="Id of the job.  [default: day and settings, so that a night is submitted once]")
@click.option("--no-wait", is_flag=True, help="Hand the job in and return; else its log is followed to its end.")
@click.option("--status", metavar="ID", help="Tell how a job stands.")
@click.option("--stop", metavar="ID", help="End a job; what it has published stays.")
def submit(job: str | None, address: str, status: str | None, stop: str | None, **how: Any) -> None:
    """Run JOB (TOML) on a Ray cluster through its job API; exits as the job does.

    Small files that JOB names by relative paths travel with it. A token is taken from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.
    """
    from geoseg.cluster.submit import Cluster, submit_and_follow
    from geoseg.jobfile import load_job_file

    if sum(each is not None for each in (job, status, stop)) != 1:
        raise click.UsageError("name one of: a JOB to submit, --status ID, --stop ID")
    if job is None:
        cluster = Cluster(address)
        told = cluster.status(status) if status else cluster.stop(stop or "")
        click.echo(told.line())
        sys.exit(told.exit_code if status else 0)
    ended = submit_and_follow(
        load_job_file(job),
        address,
        kind=how["kind"] or "nightly",
        name=how["name"],
        wait=not how["no_wait"],
        tell=lambda text: click.echo(text, nl=False),
    )
    click.echo(ended.line(), err=True)
    sys.exit(ended.exit_code or 0)


@main.command("watch-notices", hidden=True)
@click.option("--metadata", default="http://169.254.169.254", show_default=True, help="The instance metadata service.")
@click.option("--address", help="GCS of the Ray cluster: head:6379.  [default: that of this node]")
@click.option("--node-id", help="Ray's id of the node to drain.  [default: this one's]")
def watch(metadata: str, address: str | None, node_id: str | None) -> None:
    """On a spot node of EC2: wait for the notice that it is taken back, then have Ray drain it."""
    from functools import partial

    from geoseg.cluster.notices import Metadata, drain_node, watch_notices

    notice = watch_notices(Metadata(metadata), partial(drain_node, address=address, node_id=node_id))
    click.echo(f"{notice.action} in {notice.seconds_left:.0f} s: this node is drained")


@main.command()
@click.argument("out")
def verify(out: str) -> None:
    """Read every object published under OUT again and check it against its item."""
    from geoseg.predict.verify import verify_output

    result = verify_output(out)
    for sentence in result.faults:
        click.echo(f"fault: {sentence}")
    click.echo(result.summary())
    sys.exit(1 if result.faults else 0)


@main.command()
@click.argument("job", type=click.Path(dir_okay=False))
@click.option("--out", help="Folder or prefix for masks and items.")
@click.option("--remove-gone", is_flag=True, help="Remove what was published of scenes whose source is gone.")
@click.option("--workers", type=int, help="Workers of the cluster.")
@click.option("--address", help="Ray cluster to use; without one a private Ray is started when needed.")
@click.option("--engine", type=click.Choice(["auto", "local", "ray"]), help="A plain loop or Ray.  [default: auto]")
@click.option("--json", "as_json", is_flag=True, help="The run's summary as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
def nightly(job: str, out: str | None, remove_gone: bool, as_json: bool, quiet: bool, **cluster: Any) -> None:
    """Predict what is new or changed in the sources of JOB (TOML) since it was published, and nothing else."""
    from geoseg.config import load_job
    from geoseg.nightly import run_nightly

    report = run_nightly(load_job(job, {"out": out, "cluster": cluster}), remove_gone=remove_gone, quiet=quiet)
    _tell(report, as_json)


@main.command()
@click.argument("job", type=click.Path(dir_okay=False))
@click.option("--bundle", required=True, help="Bundle to try: a name or a URI.")
@click.option(
    "--scenes", type=click.IntRange(1), default=20, show_default=True, help="How many published scenes at most."
)
@click.option("--to", help="Folder or prefix for its masks and report.  [default: in the output, apart from results]")
@click.option("--out", help="Folder or prefix of the job's masks and items.")
@click.option("--workers", type=int, help="Workers of the cluster.")
@click.option("--address", help="Ray cluster to use; without one a private Ray is started when needed.")
@click.option("--engine", type=click.Choice(["auto", "local", "ray"]), help="A plain loop or Ray.  [default: auto]")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def canary(
    job: str, bundle: str, scenes: int, to: str | None, out: str | None, as_json: bool, quiet: bool, **cluster: Any
) -> None:
    """Try another bundle on a sample of what JOB (TOML) has published, and tell what differs; results stay as they are."""
    from geoseg.canary import run_canary
    from geoseg.config import load_job

    loaded = load_job(job, {"out": out, "cluster": cluster})
    told = run_canary(loaded, bundle=bundle, scenes=scenes, to=to, quiet=quiet)
    click.echo(told.to_json() if as_json else "\n".join(told.lines()))
    sys.exit(told.exit_code)


@main.command()
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="The run's summary as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
def retry(out: str, as_json: bool, quiet: bool) -> None:
    """Try the scenes again that failed or were refused in the last run on OUT, alone, with that run's job."""
    from geoseg.nightly import run_retry

    report = run_retry(out, quiet=quiet)
    if report is None:
        click.echo("null" if as_json else "nothing to retry: no scene failed in the last run")
        return
    _tell(report, as_json)


@main.command()
@click.argument("out")
@click.argument("scenes", nargs=-1)
@click.option("--all", "all_held", is_flag=True, help="Every scene that is held back.")
@click.option("--json", "as_json", is_flag=True, help="The run's summary as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
def release(out: str, scenes: tuple[str, ...], all_held: bool, as_json: bool, quiet: bool) -> None:
    """Publish SCENES (ids or URIs) that were held back in OUT; without any, list them, why, and their masks in colours."""
    from geoseg.nightly import run_release
    from geoseg.status import list_held

    if not scenes and not all_held:
        held = list_held(out)
        told = [line for one in held.values() for line in one.lines()] or ["no scene is held back"]
        click.echo(
            json.dumps({name: one.scene for name, one in held.items()}, indent=1) if as_json else "\n".join(told)
        )
        return
    report = run_release(out, scenes, quiet=quiet)
    if report is None:
        click.echo("null" if as_json else "no scene is held back")
        return
    _tell(report, as_json)


def _tell(report: RunReport, as_json: bool) -> None:
    """What a run did, and its exit code."""
    from geoseg.predict.record import read_record

    if as_json:
        click.echo(json.dumps(read_record(report.out, report.run_id), indent=1))
    else:
        for scene in report.scenes:
            why = f" ({', '.join(scene.reasons)})" if scene.reasons else ""
            click.echo(f"{scene.status}: {scene.id}{why}" + (f": {scene.sentence}" if scene.sentence else ""))
        for gone in report.gone:
            click.echo(
                f"{'removed' if gone.removed else 'gone'}: {gone.id}: its source {gone.sources[0]} is not there any more"
            )
        for sentence in (*report.remarks, *report.next_steps()):
            click.echo(sentence)
    _end(report)


def _end(report: RunReport) -> None:
    """The last lines of a run, and its exit code."""
    click.echo(report.summary(), err=True)
    if report.page:
        click.echo(f"page: {report.page}", err=True)
    if report.num_left:
        click.echo(_INTERRUPTED, err=True)
    sys.exit(report.exit_code)


@main.command()
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout.")
def status(out: str, as_json: bool) -> None:
    """Tell how OUT stands: published, held, failed and unfinished scenes, the last run, who holds the lease."""
    from dataclasses import asdict

    from geoseg.status import output_status

    told = output_status(out)
    click.echo(json.dumps(asdict(told), indent=1) if as_json else "\n".join(told.lines()))


@main.command()
@click.argument("out")
@click.argument("scene")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout.")
def why(out: str, scene: str, as_json: bool) -> None:
    """Tell why SCENE (its id in OUT, or its URI) was done, skipped or refused, and what the next run would do."""
    from geoseg.status import explain_scene

    told = explain_scene(out, scene)
    click.echo(json.dumps(told.to_json(), indent=1) if as_json else "\n".join(told.lines()))


@main.command()
@click.option("--out", default="demo-out", show_default=True, help="Folder for the scene, its mask and the picture.")
@click.option("--size", default=2048, show_default=True, help="Side of the generated scene in pixels.")
@click.option("--seed", default=2001, show_default=True, help="Seed of the generated scene.")
@click.option(
    "--scenes", type=click.IntRange(1), help="Only write so many scenes, of the seeds from --seed on, with truth."
)
def demo(out: str, size: int, seed: int, scenes: int | None) -> None:
    """Generate a scene, predict it on Ray, and show image, mask and truth side by side."""
    from geoseg.demo import run_demo, write_scenes

    lines = write_scenes(out, count=scenes, size=size, seed=seed) if scenes else run_demo(out, size=size, seed=seed)
    for line in lines:
        click.echo(line)


@main.command()
@click.argument("uris", nargs=-1)
def doctor(uris: tuple[str, ...]) -> None:
    """Check this machine, and read and write access to URIS."""
    from geoseg.doctor import examine

    findings = examine(uris)
    for finding in findings:
        click.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.text}")
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


@main.command()
@click.argument("out")
@click.argument("scenes", nargs=-1)
@click.option(
    "--config", type=click.Path(dir_okay=False), help="Job file (TOML) whose [vectors] say how; options here overrule."
)
@click.option("--join", is_flag=True, help="Neighbouring scenes as one, in one file for each layer.")
@click.option(
    "--overlap", type=click.Choice(["newest", "oldest"]), help="Whose mask counts with --join.  [default: newest]"
)
@click.option("--to", help="Folder or prefix for joined layers.  [default: in the output, apart from results]")
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(["fgb", "gpkg", "pmtiles"]), help="Beside GeoParquet."
)
@click.option("--min-area", type=float, help="Smallest building in square metres.  [default: 10]")
@click.option("--square", is_flag=True, default=None, help="Give buildings right angles.")
@click.option("--window", type=int, help="Side of a window in pixels: 512, 1024, 2048, 4096 or 8192.  [default: 2048]")
@click.option("--workers", type=int, help="Workers of the cluster.")
@click.option("--address", help="Ray cluster to use; without one a private Ray is started when needed.")
@click.option("--engine", type=click.Choice(["auto", "local", "ray"]), help="A plain loop or Ray.  [default: auto]")
@click.option("--json", "as_json", is_flag=True, help="What was traced as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
def vectorize(out: str, scenes: tuple[str, ...], config: str | None, as_json: bool, quiet: bool, **how: Any) -> None:
    """Trace buildings as polygons and roads as a graph from the masks in OUT, as GeoParquet beside them; all, or SCENES alone.

    What stands already is left alone. Confidence comes from --probabilities of the prediction.
    """
    from geoseg.vectorize import load_vectors_job, run_vectorize

    report = run_vectorize(load_vectors_job(out, scenes, config, how), quiet=quiet)
    for line in [report.to_json()] if as_json else report.lines():
        click.echo(line)
    sys.exit(report.exit_code)


@main.command()
@click.argument("out")
@click.option("--id", "name", help="Id of the collection.  [default: the last part of OUT]")
@click.option("--title", help="Title of the collection.")
@click.option("--description", help="What the collection holds, in a sentence.")
@click.option("--licence", "--license", "licence", help="SPDX identifier: CC-BY-4.0.  [default: other]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def catalogue(out: str, quiet: bool, **texts: str | None) -> None:
    """Write a catalogue of OUT: a STAC collection, the items as GeoParquet, and mosaics that a GIS opens as one layer."""
    from geoseg.catalogue import make_catalogue

    made = make_catalogue(out, quiet=quiet, **texts)
    click.echo("\n".join(made.lines()))
    sys.exit(made.exit_code)


@main.command()
@click.argument("item")
@click.option(
    "--windows", type=click.IntRange(1), help="Make so many windows again, chosen by their places.  [default: all]"
)
@click.option("--aoi", help="The area of interest that the mask was cut to, in the same version.")
@click.option("--picture", help="PNG of the window that differs most: image, published mask, the one made again.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def reproduce(item: str, windows: int | None, aoi: str | None, picture: str | None, as_json: bool, quiet: bool) -> None:
    """Make the mask of ITEM (its item.json, or OUT/SCENE) again from what it says, and compare; exits 1 when they differ."""
    from geoseg.reproduce import reproduce_item

    told = reproduce_item(item, windows=windows, aoi=aoi, picture=picture, quiet=quiet)
    click.echo(json.dumps(told.to_json(), indent=1) if as_json else "\n".join(told.lines()))
    sys.exit(told.exit_code)


@main.command("worth-labelling")
@click.argument("out")
@click.option("--to", required=True, help="GeoParquet file to write: a path or a URI that ends in .parquet.")
@click.option("--top", default=50, show_default=True, help="How many squares.")
@click.option("--chip", default=256, show_default=True, help="Side of a square in pixels of its scene.")
@click.option("--chip-m", type=float, help="Side in metres instead, for scenes with pixels of different sizes.")
@click.option("--spacing", default=1, show_default=True, help="Least pixels between squares of a scene; 0: may touch.")
@click.option("--scene-share", default=0.2, show_default=True, help="Most that one of several scenes gives.")
@click.option("--min-valid", default=0.5, show_default=True, help="Least share of a square's pixels that are valid.")
@click.option("--picture", help="Also draw the first twelve: image, mask, uncertainty (.jpg or .png).")
def worth_labelling(out: str, to: str, picture: str | None, **wanted: Any) -> None:
    """List the squares of OUT of which the network is least certain; it was predicted with --uncertainty."""
    from geoseg.evaluate.worth_labelling import Wanted, list_worth_labelling

    worth = list_worth_labelling(out, Wanted(**wanted), to=to, picture=picture)
    click.echo("\n".join(worth.lines()))
    for sentence in worth.remarks:
        click.echo(sentence, err=True)
    sys.exit(worth.exit_code)


@main.command()
@click.argument("out")
@click.option(
    "--port", default=0, type=click.IntRange(0, 65535), help="Port on this machine; by default one that is free."
)
@click.option("--no-open", is_flag=True, help="Only print the address; open no browser.")
def view(out: str, port: int, no_open: bool) -> None:
    """Show a published output (a folder or prefix) on a map in the browser of this machine, until Ctrl-C."""
    from geoseg.view.server import view as serve

    serve(out, port=port, tell=click.echo, open_browser=not no_open)


@main.command("config-schema")
def config_schema() -> None:
    """Print the JSON Schema of a job file."""
    from geoseg.config import job_schema

    click.echo(job_schema())
