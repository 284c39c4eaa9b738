# One run of the workflow, from its first process to its last: none of its jobs outlives it.
import atexit

from dmir.runs import begin_run, end_run, join_run, tell_where_jobs_are

if is_users_run():
    for line in begin_run(Path(".snakemake"), os.environ["DMIR_COMMAND"]):
        print(line, file=sys.stderr)
    atexit.register(end_run)
elif not workflow.is_main_process:
    join_run()
