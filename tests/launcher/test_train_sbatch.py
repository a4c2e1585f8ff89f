"""launch/train.sbatch against programs of our own in the place of Slurm's: what it does after each end of a start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.long import mostly_long

REPOSITORY = Path(__file__).parents[2]

# Each does what a file of the test says (bash), and notes what it was asked for.
SRUN = """#!/usr/bin/env bash
for word in "$@"; do
    case "$word" in --nodelist=*) export NODES=${word#--nodelist=} ;; */node.sh) found=yes ;; *)
        if [ "${found:-}" = yes ]; then what=$word; break; fi ;;
    esac
done
export NODES=${NODES//,/ } REPORT=$LOG_DIR/preflight
echo "$what $NODES" >>"$FAKE/calls"
command -p sleep 0.05 # the files of a start are newer than the start
source "$FAKE/$what"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") tr ',' '\\n' <<<"$3" ;;
    "show job") cat "$FAKE/job" ;;
    requeue*) echo "$*" >>"$FAKE/calls"; source "$FAKE/requeue" ;;
    *) echo "$*" >>"$FAKE/calls" ;;
esac
"""
HEALTHY = """
echo "$PWD/runs/tiny" >"$REPORT/run_dir"
tr ' ' '\\n' <<<"$NODES" >"$REPORT/nodes"
: >"$REPORT/bad"
: >"$REPORT/problems"
"""


class FakeSlurm:
    """One job; `start()` runs the batch script as Slurm does at each start of the job."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.fake = directory, directory / "fake"
        programs = directory / "bin"
        programs.mkdir()
        self.fake.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sleep": "#!/bin/sh\n"}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (directory / "launch").symlink_to(REPOSITORY / "launch")
        (directory / "runs" / "tiny" / "checkpoints").mkdir(parents=True)
        self.run_dir = directory / "runs" / "tiny"
        self.log_dir = directory / "logs" / "7"
        self.restarts = 0
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "FAKE": str(self.fake),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1,n2",
        }
        self.does(preflight=HEALTHY, train="exit 0", requeue="", job="JobState=RUNNING ExcNodeList=(null)")

    def does(self, **files: str) -> None:
        for name, text in files.items():
            (self.fake / name).write_text(text)

    def popen(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["launch/train.sbatch", "tiny.yaml"],
            cwd=self.directory,
            env={**self.environment, "SLURM_RESTART_COUNT": str(self.restarts), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start(self, **environment: str) -> tuple[int, str]:
        """(exit code, what it said) of one start."""
        process = self.popen(**environment)
        output, _ = process.communicate(timeout=60)
        self.restarts += 1
        return process.returncode, output

    def calls(self, word: str = "") -> list[str]:
        path = self.fake / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(word)]


@pytest.fixture
def slurm(tmp_path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def test_a_run_that_finishes(slurm):
    code, output = slurm.start()
    assert code == 0 and output.splitlines()[-1].endswith("done")
    assert slurm.calls() == ["preflight n1 n2", "train n1 n2"]


def test_the_output_of_the_job_lies_beside_its_logs(slurm, tmp_path):
    """As Slurm opens it: a file, for both streams unless --error gives another."""
    (tmp_path / "train-7.out").write_text("slurmstepd: error: DUE TO TIME LIMIT\n")
    with open(tmp_path / "train-7.out", "a") as file:
        environment = {**slurm.environment, "SLURM_RESTART_COUNT": "0"}
        words = ["launch/train.sbatch", "tiny.yaml"]
        for _ in range(2):
            subprocess.run(
                words, cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT, check=True
            )
    assert (slurm.log_dir / "job.out").resolve() == (tmp_path / "train-7.out").resolve()
    text = (slurm.log_dir / "job.out").read_text()
    assert text.startswith("slurmstepd") and text.count(": training on n1 n2") == 2


def asks(cause: str) -> str:
    """What the ranks do that end to be started again."""
    return f"""echo '{{"cause": "{cause}", "reason": "in any words"}}' >runs/tiny/requeue; exit 1"""


@pytest.mark.parametrize("cause", ["stop_file", "interrupted"])
def test_a_persons_wish_ends_the_job(slurm, cause):
    slurm.does(train=asks(cause))
    code, output = slurm.start()
    assert code == 0 and "stopped as asked (in any words)" in output, output
    assert slurm.calls("train") == ["train n1 n2"] and not slurm.calls("requeue")


def test_a_problem_of_all_nodes_is_the_runs_is_counted_and_excludes_nobody(slurm):
    slurm.does(preflight=HEALTHY + 'echo "less than 5 GiB are free" >"$REPORT/problems"; exit 1')
    outputs = [slurm.start() for _ in range(3)]
    assert [code for code, _ in outputs] == [1, 1, 1]
    assert "problem of the run: less than 5 GiB are free" in outputs[0][1]
    assert "giving up" in outputs[2][1] and "giving up" not in outputs[1][1]
    assert len(slurm.calls("requeue")) == 2 and not slurm.calls("update") and not slurm.calls("train")


def test_a_file_that_is_missing_on_all_nodes_ends_the_job_with_2(slurm):
    slurm.does(
        preflight=HEALTHY + 'echo "missing corpus.bin" >"$REPORT/problems"; touch "$REPORT/wrong-n1"; exit 2'
    )
    code, output = slurm.start()
    assert code == 2 and "missing corpus.bin" in output and not slurm.calls("requeue")


def test_a_configuration_that_is_wrong_on_all_nodes_ends_the_job_with_2(slurm):
    slurm.does(preflight='touch "$REPORT"/wrong-n1 "$REPORT"/wrong-n2; exit 2')
    assert slurm.start()[0] == 2 and not slurm.calls("requeue")


def test_one_node_that_cannot_read_the_configuration_is_a_bad_node(slurm):
    slurm.does(
        preflight='touch "$REPORT/wrong-n2"; echo "$PWD/runs/tiny" >"$REPORT/run_dir"; echo n1 >"$REPORT/nodes"\n'
        'echo "n2 no answer" >"$REPORT/bad"; exit 2'
    )
    code, output = slurm.start(TRAIN_NODES="1")
    assert code == 0 and "bad node: n2 no answer" in output and slurm.calls("train") == ["train n1"]


def test_a_preflight_that_fails_on_every_node_is_tried_again_and_counted(slurm):
    slurm.does(preflight='touch "$REPORT"/unfinished-n1 "$REPORT"/unfinished-n2; exit 3')
    outputs = [slurm.start()[1] for _ in range(3)]
    assert all("the pre-flight failed on every node" in output for output in outputs)
    assert len(slurm.calls("requeue")) == 2 and "giving up" in outputs[2]
    assert not slurm.calls("update") and "bad node" not in "".join(outputs)


def test_a_preflight_that_failed_once_does_not_stop_the_run(slurm):
    slurm.does(preflight='touch "$REPORT"/unfinished-n1 "$REPORT"/unfinished-n2; exit 3')
    slurm.start()
    slurm.does(preflight=HEALTHY)
    assert slurm.start()[0] == 0


def test_the_first_node_is_bad_where_it_alone_gives_no_verdict(slurm):
    slurm.does(preflight='[ "$NODES" = "n2" ] || { touch "$REPORT/unfinished-n1"; exit 3; }\n' + HEALTHY)
    code, output = slurm.start(TRAIN_NODES="1")
    assert code == 0 and "bad node: n1 pre-flight ended with exit code 3" in output
    assert slurm.calls() == ["preflight n1 n2", "preflight n2", "train n2"]


EXCLUDED = {"(null)": "n1", "old[1-3]": "old[1-3],n1", "old": "old,n1"}


@pytest.mark.parametrize("excluded", mostly_long(EXCLUDED, "(null)", "old[1-3]"))
def test_a_bad_node_is_excluded_beside_those_that_were(slurm, excluded):
    slurm.does(
        job=f"JobId=7\n   JobState=RUNNING\n   ReqNodeList=(null) ExcNodeList={excluded}\n   NumNodes=1",
        preflight=HEALTHY + ': >"$REPORT/nodes"; echo "n1 no memory" >"$REPORT/bad"; exit 1',
    )
    code, output = slurm.start(SLURM_JOB_NODELIST="n1")  # a job of one node is no other case
    assert code == 1 and "bad node: n1 no memory" in output
    assert slurm.calls("requeue") == ["requeue 7"]
    assert slurm.calls("update") == [f"update JobId=7 ExcNodeList={EXCLUDED[excluded]}"]


@pytest.mark.long
def test_bad_nodes_without_end_are_counted(slurm):
    slurm.does(
        preflight=HEALTHY + ': >"$REPORT/nodes"; for n in $NODES; do echo "$n bad"; done >"$REPORT/bad"'
    )
    outputs = [slurm.start(SLURM_JOB_NODELIST=f"a{number}")[1] for number in range(3)]
    assert "giving up" in outputs[2] and len(slurm.calls("requeue")) == 2


def test_requeueing_is_tried_again_while_the_controller_is_away(slurm):
    slurm.does(train=asks("terminated"), requeue='[ "$(wc -l <"$FAKE/calls")" -gt 5 ]')
    code, _ = slurm.start()
    assert code == 1 and len(slurm.calls("requeue")) == 4


def test_a_crash_is_tried_again_until_nothing_comes_of_it(slurm):
    slurm.does(train="exit 1")
    code, output = slurm.start()
    assert code == 1 and len(slurm.calls("train")) == 3 and "giving up" in output
    assert "No such file" not in output


def test_a_crash_after_a_new_checkpoint_counts_from_one(slurm):
    slurm.does(
        train='n=$(grep -c train "$FAKE/calls"); [ $n != 2 ] || echo step_1 >runs/tiny/checkpoints/latest\nexit 1'
    )
    assert slurm.start()[0] == 1 and len(slurm.calls("train")) == 4


def test_failures_are_counted_where_the_runs_disk_is_full(slurm):
    (slurm.run_dir / "launch_failures").mkdir()  # cannot be written
    slurm.does(train="exit 1", preflight=HEALTHY)
    assert slurm.start(CHAINED="yes")[0] == 1 and len(slurm.calls("train")) == 3


def test_failures_that_cannot_be_counted_end_the_job(slurm):
    (slurm.run_dir / "launch_failures").mkdir()
    slurm.does(train='mkdir -p "$LOG_DIR/failures"; exit 1')
    code, output = slurm.start(CHAINED="yes")
    assert code == 1 and len(slurm.calls("train")) == 1 and "cannot be counted" in output


def test_a_chain_gives_up_once_and_a_person_may_try_again(slurm):
    slurm.does(train="exit 1")
    slurm.start()
    slurm.environment["SLURM_JOB_ID"] = "8"
    slurm.restarts = 0
    code, output = slurm.start(CHAINED="yes")
    assert code == 1 and "the chain has given up" in output and len(slurm.calls("train")) == 3
    slurm.environment["SLURM_JOB_ID"], slurm.restarts = "9", 0
    slurm.start()
    assert len(slurm.calls("train")) == 6


def mistake(cause: str, message: str) -> str:
    return f"""echo '{{"cause": "{cause}", "message": "{message}"}}' >"$LOG_DIR/user_error"; exit 1"""


def test_a_mistake_that_only_the_ranks_find_ends_the_job_with_2(slurm):
    slurm.does(train=mistake("user_error", "4 heads are not divisible by 3"))
    code, output = slurm.start()
    assert code == 2 and "4 heads are not divisible by 3" in output and len(slurm.calls("train")) == 1


def test_a_directory_in_use_by_what_is_left_of_an_earlier_start_is_tried_again(slurm):
    slurm.does(train=mistake("in_use", "in any words"))
    assert slurm.start()[0] == 1 and len(slurm.calls("train")) == 3


@pytest.mark.parametrize("exit_code", mostly_long([1, 2], 2))
def test_a_run_that_has_given_up_is_not_tried_again_however_its_file_is_spaced(slurm, exit_code):
    status = f'{{"state":"failed",  "reason": "in any words","exit_code":{exit_code}}}'
    slurm.does(train=f"echo '{status}' >runs/tiny/status.json; exit 1")
    code, output = slurm.start()
    assert code == exit_code and "in any words" in output and len(slurm.calls("train")) == 1


@pytest.mark.long
def test_the_files_of_an_earlier_start_say_nothing_of_this_one(slurm):
    (slurm.run_dir / "status.json").write_text('{"state": "failed", "exit_code": 2}')
    (slurm.run_dir / "requeue").write_text('{"cause": "stop_file", "reason": "x"}')
    slurm.does(train="exit 1")
    assert slurm.start()[0] == 1 and len(slurm.calls("train")) == 3


def test_a_run_that_hung_is_started_again_and_counted(slurm):
    slurm.does(train=asks("hang"))
    code, output = slurm.start()
    assert code == 1 and "in any words" in output and len(slurm.calls("train")) == 3


LINES = ("PATH[$(touch${IFS}pwned)] none", "9999999999999999999999 none", "-1 none", "08 none")


@pytest.mark.parametrize("line", mostly_long(LINES, LINES[0], LINES[-1]))
def test_a_count_of_failures_that_another_wrote_is_a_number_or_nothing(slurm, line):
    """bash evaluates the subscripts in what it takes for a number."""
    (slurm.run_dir / "launch_failures").write_text(line + "\n")
    slurm.does(train="exit 1")
    code, output = slurm.start(CHAINED="yes", CHAIN_REST="0")
    assert not (slurm.directory / "pwned").exists() and code == 1
    assert ("the chain has given up" in output) is (line == "08 none")


# A rank that never ends, so that only the batch script can act; it takes its children with it.
SAVES_FOR_EVER = """trap : USR1 TERM
touch "$FAKE/ready"
while [ ! -e "$FAKE/end" ]; do read -r -t 0.05 _ <> <(:) || true; done
exit 1
"""


def until(condition, what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def saving(slurm):
    """saving(**environment) → the batch script while its ranks (or the pre-flight) do not come to an end."""
    processes = []

    def start(during: str = "train", **environment: str) -> subprocess.Popen[str]:
        slurm.does(**{during: SAVES_FOR_EVER})
        processes.append(slurm.popen(**environment))
        until((slurm.fake / "ready").exists, "the ranks run")
        return processes[-1]

    yield start
    slurm.does(end="")
    for process in processes:
        process.communicate(timeout=30)


def test_at_the_time_limit_the_job_is_requeued_while_the_ranks_still_save(slurm, saving):
    process = saving()
    process.send_signal(10)  # USR1: the limit is near
    until((slurm.run_dir / "stop").exists, "the ranks are asked to stop")
    assert json.loads((slurm.run_dir / "stop").read_text()) == {"job": "7", "cause": "time_limit"}
    slurm.does(job="JobState=COMPLETING Reason=TimeLimit ExcNodeList=(null)")
    process.terminate()
    until(lambda: slurm.calls("requeue"), "requeued")
    assert re.match(r"1 none", (slurm.run_dir / "launch_failures").read_text())  # no checkpoint came of it


def test_a_job_of_a_chain_leaves_the_rest_to_the_next(slurm, saving):
    process = saving(CHAIN_REST="1")
    slurm.does(job="JobState=COMPLETING Reason=TimeLimit ExcNodeList=(null)")
    process.terminate()
    until((slurm.run_dir / "stop").exists, "the ranks are asked to stop")
    slurm.does(end="")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "the next job of the chain goes on" in output
    assert not slurm.calls("requeue")


@pytest.mark.parametrize("chain_rest", ["0", "1"])
def test_a_time_limit_during_the_preflight_ends_as_one_after_it_does(slurm, saving, chain_rest):
    process = saving("preflight", CHAIN_REST=chain_rest)
    process.send_signal(10)  # USR1: the limit is near
    slurm.does(end="")
    output, _ = process.communicate(timeout=30)
    is_last = chain_rest == "0"
    assert process.returncode == int(is_last) and bool(slurm.calls("requeue")) is is_last, output
    assert ("the next job of the chain goes on" in output) is not is_last
    assert not slurm.calls("train")


def test_a_cancelled_job_stays_cancelled(slurm, saving):
    process = saving()
    slurm.does(job="JobState=COMPLETING Reason=None ExcNodeList=(null)")
    process.terminate()
    until((slurm.run_dir / "stop").exists, "the ranks are asked to stop")
    assert process.poll() is None  # they have until Slurm kills them
    slurm.does(end="")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "cancelled" in output and not slurm.calls("requeue")
