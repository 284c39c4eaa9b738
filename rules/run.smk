# One run of the workflow: what it asks of the machine before its first job, and that none of its jobs outlives it.
import atexit

from snakemake.settings.types import DeploymentMethod

from dmir.cohorts.duplicates import require_distinct
from dmir.runs import begin_run, end_run, join_run, tell_where_jobs_are
from dmir.storage import require_past, require_writable, settle_times


def begin():
    """Do what must be done before Snakemake looks at files and locks them."""
    deployment = workflow.deployment_settings
    if deployment and DeploymentMethod.APPTAINER in deployment.deployment_method:
        checked(session.require_image)
    checked(require_past, run.users_files())
    checked(looked_at, require_distinct, run.scans, configuration.train_on)
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
    try:
        require_writable(configuration.results)
        if is_users_run():
            session.keep_configuration(run)
    except DmirError as error:
        # on a line of its own: what Snakemake says meanwhile comes from another thread
        refuse(f"\nError: {error}")
    tell_where_jobs_are(workflow.local_exec)


def finish():
    """Do what must be done after the last job."""
    if is_users_run():
        session.show_studies(run, workflow.main_snakefile)
        session.write_snakemake_report(run, workflow.main_snakefile)


if is_users_run():
    begin()
elif not workflow.is_main_process:
    join_run()
