# One run of the workflow: what it asks of the machine before its first job, and that none of its jobs outlives it.
import atexit

from snakemake.settings.types import DeploymentMethod

from dmir.errors import InputError
from dmir.runs import begin_run, end_run, join_run, tell_where_jobs_are
from dmir.storage import require_past, require_writable, settle_times

IMAGE = "envs/dmir.sif"


def require_image():
    """Refuse to begin where jobs are to run in an image that is not there; Apptainer would say so of every job."""
    deployment = workflow.deployment_settings
    wanted = deployment and DeploymentMethod.APPTAINER in deployment.deployment_method
    if wanted and not Path(IMAGE).is_file():
        raise InputError(
            IMAGE,
            found="no such file",
            expected="the image that --sdm apptainer runs the jobs in",
            remedy=f"Make it: `apptainer build {IMAGE} envs/dmir.def`.",
        )


def users_files():
    """Return the files of all scans that no job makes."""
    own = [name for name in used_cohorts if name not in made_cohorts]
    return [
        row[key]
        for name in own
        for row in rows_of_scans[name].values()
        for key in ("image", "labels", "mask")
        if row[key]
    ]


def begin():
    """Do what must be done before Snakemake looks at files and locks them."""
    checked(require_image)
    checked(require_past, users_files())
    notes = begin_run(Path(".snakemake"), os.environ.get("DMIR_COMMAND", ""))
    atexit.register(end_run)
    ahead = checked(settle_times, configuration.results)
    if ahead:
        notes.append(
            f"Note: files such as {ahead[0]} ({len(ahead)} in all) had times of change in the future, as after a clock"
            " that was ahead; they have the present one now, in the same order."
        )
    for note in notes:
        print(note, file=sys.stderr)


def begin_jobs():
    """Do what must be done before the first job, and not in a dry run."""
    checked(require_writable, configuration.results)
    checked(keep_configuration)
    tell_where_jobs_are(workflow.local_exec)


if is_users_run():
    begin()
elif not workflow.is_main_process:
    join_run()
