# What every stage asks: `run` knows the scans, the pairs, the files and parameters of each job (src/dmir/workflow).
import os
import shlex
import sys
import warnings
from pathlib import Path

# the library of this checkout, here and in every job, whatever environment a job runs in; before what the user has there
source = Path(workflow.basedir, "src").resolve()
sys.path.insert(0, str(source))
others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
os.environ.update(
    PYTHONPATH=os.pathsep.join(dict.fromkeys(filter(None, [str(source), *others])))
)
if (source / "dmir").is_dir():
    for name in [name for name in sys.modules if name.split(".")[0] == "dmir"]:
        # a plugin of Snakemake may have imported an installed one, before this file is read
        if not Path(sys.modules[name].__file__).resolve().is_relative_to(source):
            del sys.modules[name]

from snakemake.io import flag

from dmir.config import parse_config
from dmir.config.reading import read_yaml
from dmir.doubts import Doubt, told_doubts
from dmir.errors import DmirError
from dmir.provenance import code_hash
from dmir.workflow import Run, session
from dmir.workflow.facts import one_of
from dmir.workflow.resources import growing

# what the report says it was made by; jobs, which read this file again, have both from the first process
os.environ.setdefault("DMIR_COMMAND", shlex.join(["snakemake", *sys.argv[1:]]))
if "DMIR_REVISION" not in os.environ:
    os.environ.update(DMIR_REVISION=session.revision(workflow.basedir))


def refuse(message):
    """End the workflow with a message alone."""
    print(message, file=sys.stderr)
    sys.exit(1)


def checked(function, *arguments, **parameters):
    """Call a function; a user's mistake ends the workflow with its message alone."""
    try:
        return function(*arguments, **parameters)
    except DmirError as error:
        refuse(f"Error: {error}")


def is_users_run():
    """Tell whether this is the process that the user started: neither a job nor what a hook runs."""
    return workflow.is_main_process and session.AGAIN not in os.environ


def looked_at(function, *arguments, **parameters):
    """Call a function that looks at the data; what is doubtful is told in the run that the user started alone."""
    told = told_doubts(configuration.preprocess.strict)
    silent = warnings.catch_warnings(action="ignore", category=Doubt)
    with told if is_users_run() else silent:
        return function(*arguments, **parameters)


# of two equal keys Snakemake's own reader takes the last
for path in workflow.configfiles:
    checked(read_yaml, path)
configuration = checked(
    parse_config,
    dict(config),
    ", ".join(map(str, workflow.configfiles)) or "configuration",
)
run = checked(looked_at, Run, configuration)
paths = run.patterns


wildcard_constraints:
    **run.constraints,


def turn_of_shard(wildcards):
    """Return the file that a registration waits for; what waits for nothing gets one that is always there.

    In Snakemake's records it has one name, whatever it is: else a registration that is done would run anew when the
    quota is set, changed or taken away. A file of Snakemake's own cache is recorded in this way.
    """
    path = run.turn_of_shard(wildcards) or workflow.main_snakefile
    return flag(ancient(path), "sourcecache_entry", "room for the fields")


def fields_folder(path):
    """Declare a folder of fields; it is deleted after use unless the configuration keeps fields."""
    return directory(path) if configuration.keep_fields else temp(directory(path))


def shown_in_report(products):
    """Declare the files of tables and figures; Snakemake's own report shows the first of each."""
    for its in products:
        first, *others = map(paths.product, its.files)
        caption = f"../workflow/report/{its.text}.rst" if its.text else None
        yield report(first, caption=caption, category=its.category, labels=its.labels)
        yield from others
