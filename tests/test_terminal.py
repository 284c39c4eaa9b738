"""What a run says: a bar and a line a stage on a terminal, a few lines in a file, and everything when asked for."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from workflow_runs import hear_ctrl_c

from dmir.terminal import duration, followed, waiting
from snakemake_logger_plugin_dmir.progress import Job, Progress, stages_of
from snakemake_logger_plugin_dmir.screen import Screen

ROOT = Path(__file__).parents[1]
STAGES = {"prepare": "preprocess", "learn": "train", "draw": "report"}
SNAKEFILE = """
include: "rules/preprocess.smk"
include: "rules/train.smk"
rule all:
    default_target: True
    input: "learned.txt"
    localrule: True
"""
PREPARE = """
rule prepare:
    output: "{scan}.txt"
    log: "{scan}.log"
    wildcard_constraints: scan=r"s\\d+"
    shell: "echo {wildcards.scan} | tee {output} > {log}"
use rule prepare as prepare_otherwise with:
    output: "other/{scan}.txt"
"""
LEARN = """
rule learn:
    input: expand("s{number}.txt", number=range(4))
    output: "learned.txt"
    log: "learn.log"
    shell: "for i in $(seq 30); do echo step $i; done > {log}; echo 'Error: no such thing' >> {log}; COMMAND"
"""


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def workflow(tmp_path):
    (tmp_path / "rules").mkdir()
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "rules" / "preprocess.smk").write_text(PREPARE)
    write_learning(tmp_path, "touch {output}")
    return tmp_path


def write_learning(folder, words):
    (folder / "rules" / "train.smk").write_text(LEARN.replace("COMMAND", words))


def command(*arguments):
    return [str(Path(sys.executable).parent / "snakemake"), "--cores", "1", "--logger", "dmir", *arguments]


def environment(**variables):
    without = {name: value for name, value in os.environ.items() if name != "DMIR_VERBOSE"}
    return {**without, "PYTHONPATH": str(ROOT / "src"), **variables}


def told_to_a_file(folder, *arguments, status=0, **variables):
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**variables),
        timeout=120,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def told_to_a_terminal(folder, columns, *arguments):
    """Return everything that a terminal of so many columns was sent."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        command(*arguments),
        cwd=folder,
        stdin=its,
        stdout=its,
        stderr=its,
        env=environment(TERM="xterm", COLUMNS=str(columns)),
    )
    os.close(its)
    sent = received(ours)
    assert process.wait(timeout=60) == 0
    return sent


def received(ours, until=""):
    """Return all that comes through a terminal, until its other side is closed or some words have come."""
    sent = b""
    while not until or until not in sent.decode(errors="replace"):
        try:
            part = os.read(ours, 4096)
        except OSError:
            break
        if not part:
            break
        sent += part
    if not until:
        os.close(ours)
    return sent.decode(errors="replace")


def test_a_file_gets_a_line_a_stage_and_the_log_has_everything(workflow):
    lines = told_to_a_file(workflow).splitlines()
    assert lines[0] == "6 jobs: preprocess 4, train 1"
    assert [line.split(" in ")[0] for line in lines if "✓" in line] == ["✓ preprocess: 4 jobs", "✓ train: 1 job"]
    assert re.fullmatch(r"All 6 jobs done in \d+ s\.", lines[-1]) and len(lines) <= 6
    assert not any("\x1b" in line for line in lines)
    (log,) = (workflow / ".snakemake" / "log").iterdir()
    assert f"The full log: .snakemake/log/{log.name}" in lines
    assert "rule learn:" in log.read_text() and "reason: Missing output files: learned.txt" in log.read_text()
    assert "Nothing to be done" in told_to_a_file(workflow)


def test_a_failure_is_told_once_with_the_end_of_its_log_and_what_is_left(workflow):
    write_learning(workflow, "false")
    text = told_to_a_file(workflow, status=1)
    lines = text.splitlines()
    place = lines.index("✗ learn failed; the end of learn.log:")
    assert lines[place + 12] == "    Error: no such thing" and lines[place + 1] == "    step 20"
    assert text.count("failed") == 2 and "non-zero exit status" not in text and "Exiting" not in text
    assert "- train: 0 of 1 jobs done" in lines
    assert lines[-1].startswith("4 of 6 jobs done, 1 failed, after ")


def test_a_failure_without_a_log_tells_what_snakemake_knows(workflow):
    write_learning(workflow, "rm {log}; exit 3")
    text = told_to_a_file(workflow, status=1)
    assert "✗ learn failed." in text and "returned non-zero exit status 3" in text


def test_a_job_that_is_tried_again_counts_once(workflow):
    write_learning(workflow, "[ -e again ] && touch {output} || {{ touch again; false; }}")
    text = told_to_a_file(workflow, "--retries", "1")
    assert "✗ learn failed" in text and "✓ train: 1 job" in text and "All 6 jobs done" in text


def test_errors_of_the_workflow_itself_are_told(workflow):
    write_learning(workflow, "touch {nothing}")
    assert "nothing" in told_to_a_file(workflow, status=1)


@pytest.mark.parametrize("asked", [{"DMIR_VERBOSE": "1"}, {}], ids=["everything", "dry run"])
def test_everything_is_told_when_asked_for_and_in_a_dry_run(workflow, asked):
    text = told_to_a_file(workflow, *([] if asked else ["-n"]), **asked)
    assert "rule learn:" in text and "Building DAG" in text and "reason: Missing output files: learned.txt" in text
    assert "✓" not in text


def test_a_terminal_of_60_columns_has_a_bar_that_fits(workflow):
    write_learning(workflow, "sleep 2; touch {output}")
    sent = told_to_a_terminal(workflow, 60)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent).replace("\r", "\n")
    assert re.search(r"━+ *4 of 6 jobs", plain) and re.search(r"now: learn \(\d s\)", plain)
    # what is drawn fits; a path is left whole, to be copied
    wide = [line for line in plain.split("\n") if len(line) > 60]
    assert all(line.startswith("The full log: ") for line in wide), wide
    assert sent.rstrip().splitlines()[-1].endswith("s.") and "\x1b[?25h" in sent  # the cursor is back


def test_ctrl_c_ends_with_what_is_done_and_gives_the_cursor_back(workflow):
    write_learning(workflow, "sleep 60; touch {output}")
    ours, its = pty.openpty()
    process = subprocess.Popen(
        command(),
        cwd=workflow,
        stdin=its,
        stdout=its,
        stderr=its,
        env=environment(TERM="xterm", COLUMNS="80"),
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    os.close(its)
    sent = received(ours, until="now: learn")
    os.killpg(process.pid, signal.SIGINT)
    sent = received(ours)
    assert process.wait(timeout=60) == 1
    assert "4 of 6 jobs done" in sent and "The same command goes on from here." in sent
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l") if "\x1b[?25l" in sent else "\x1b[?25h" in sent


def test_the_stage_of_every_rule_of_the_workflow_is_known():
    done = subprocess.run(
        [Path(sys.executable).parent / "snakemake", "--list-rules"], cwd=ROOT, capture_output=True, text=True
    )
    stages = stages_of(ROOT)
    progress = Progress({line.split()[0]: 1 for line in done.stdout.splitlines() if line}, stages)
    told = {"cohort", "preprocess", "train", "register", "evaluate", "report"}
    alone = {"all", "ablation", "lambda_study"} | {f"{stage}_all" for stage in told}
    assert {progress.stage(rule) for rule in progress.counts if rule not in alone} == told
    assert {progress.stage(rule) for rule in alone} == {""} and len(progress.counts) > 20


def test_rules_that_a_loop_makes_are_of_its_file(tmp_path):
    (tmp_path / "Snakefile").write_text("rule all:\n    input: []\n")
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "train.smk").write_text("rule learn:\n    output: 'a'\n")
    loop = "for one in several:\n\n    rule:\n        name:\n            {name}\n"
    (tmp_path / "rules" / "report.smk").write_text(loop.format(name="one"))
    (tmp_path / "rules" / "cohort.smk").write_text(loop.format(name='f"make_scans_{one}"'))
    progress = Progress({"make_scans_a_train000": 1, "learn": 1, "any_table": 2, "all": 1}, stages_of(tmp_path))
    assert progress.announcement() == "5 jobs: cohort 1, train 1, report 2"


def test_the_time_left_follows_what_has_ended_and_weighs_stages():
    clock = Clock()
    progress = Progress({"prepare": 2, "learn": 1, "draw": 1}, STAGES, clock)
    assert progress.left() is None
    progress.begin(1, Job("prepare", "prepare a"))
    clock.now = 11.0
    assert progress.end(1) == []
    # 11 for the other scan, and as its stage's weight is to this one's: 60 for the training, 2 for the picture
    assert progress.left() == pytest.approx(73)
    progress.begin(2, Job("prepare", "prepare b"))
    progress.begin(3, Job("learn", "learn x"))
    clock.now = 22.0
    assert progress.end(2) == ["✓ preprocess: 2 jobs in 22 s"]
    # 49 of the training and 2 are left, 1.5 jobs ran at once so far
    assert progress.left() == pytest.approx((49 + 2) / 1.5)
    assert progress.now() == "learn x (11 s)"
    assert progress.fail(3)[0].label == "learn x"
    assert progress.state().startswith("2 of 4 jobs, 1 failed, ")
    assert progress.summary()[:2] == ["- train: 0 of 1 jobs done", "- report: 0 of 1 jobs done"]


def test_a_file_is_told_how_far_it_is_in_tenths(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    stream = io.StringIO()
    screen, progress = Screen(stream), Progress({"prepare": 1000}, STAGES, clock)
    screen.start(progress)
    for number in range(1000):
        progress.begin(number, Job("prepare", f"prepare {number}"))
        clock.now += 1
        progress.end(number)
        screen.changed()
    assert len(stream.getvalue().splitlines()) == 9
    assert stream.getvalue().startswith("100 of 1000 jobs, about 15 min left\n")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (3 * 3600 + 1200, "3 h 20 min"), (2.5 * 86400, "2.5 days")],
)
def test_durations_are_said_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def test_a_bar_is_nothing_in_a_file_and_gives_every_item(capsys):
    assert list(followed(iter("abc"), "letters", total=3)) == [*"abc"]
    with waiting("thinking", 3.0):
        print("found")
    assert capsys.readouterr() == ("found\n", "")


def test_a_terminal_sees_what_is_waited_for_and_a_file_keeps_what_is_printed(tmp_path):
    code = (
        "import time\nfrom dmir.terminal import followed, waiting\n"
        "for letter in followed('abc', 'letters'):\n    print(letter)\n    time.sleep(0.15)\n"
        "with waiting('thinking', 3.0):\n    print('found')\n    time.sleep(0.3)\n"
    )
    ours, its = pty.openpty()
    with (tmp_path / "out").open("w") as out:
        done = subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=its, env=environment(TERM="xterm"))
        os.close(its)
        sent = received(ours)
    assert done.wait(timeout=60) == 0
    assert (tmp_path / "out").read_text().split() == ["a", "b", "c", "found"]
    assert re.search(r"letters .*[123]/3", sent) and re.search(r"thinking .* s of at most 3 s", sent)
