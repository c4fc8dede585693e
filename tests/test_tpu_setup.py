"""The TPU scripts, with a gcloud that records what it is given and answers as told. Nothing reaches the network."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from sora_jax.commands import train
from sora_jax.parallel.mesh import check_batch_size, mesh_shape

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ("create", "install", "launch", "follow", "resume", "delete")
SLICE = ["--name", "my-slice", "--project", "my-project", "--zone", "us-west4-a"]
CHIPS = ["--accelerator-type", "v5litepod-16", "--runtime-version", "v2-alpha-tpuv5-lite"]
RUN = ["--workdir", "gs://my-bucket/runs/xl"]
TRAINING = ["--", "sora_xl", "--data.path", "../data"]
PLACE = ["--project=my-project", "--zone=us-west4-a"]
NEEDED = {
    "create": SLICE + CHIPS,
    "install": SLICE,
    "launch": SLICE + RUN + TRAINING,
    "follow": SLICE,
    "resume": SLICE + CHIPS + RUN + TRAINING,
    "delete": SLICE,
}
AWKWARD = ["a frog's hat", "$HOME `id` $5 100%", 'two\n"lines"', "", "*", "\\n"]

# Each kind of answer is a file with a line for each call; the last line answers all later calls.
FAKE_GCLOUD = r"""#!/usr/bin/env bash
{ printf '%s\0' "$@"; printf '\036'; } >>"$FAKE/calls"
answer() {
  head -n 1 "$FAKE/$1" 2>/dev/null
  [[ ! -f $FAKE/$1 || $(wc -l <"$FAKE/$1") -lt 2 ]] || sed -i 1d "$FAKE/$1"
}
listed() {
  local state=$(answer "$1")
  [[ $state != error ]] || exit 1
  printf 'my-slice-2,%s\n' OTHER
  [[ $state == gone ]] || printf 'my-slice,%s\n' "$state"
}
case "$*" in
  "storage ls"*)
    case $(answer done) in
      yes) exit 0 ;;
      no) echo "ERROR: (gcloud.storage.ls) One or more URLs matched no objects." >&2 ;;
      *) echo "ERROR: (gcloud.storage.ls) HTTPError 503" >&2 ;;
    esac
    exit 1 ;;
  *"tpu-vm list"*) listed slice ;;
  *"queued-resources list"*) listed request ;;
  *"echo state="*) echo "state=$(answer job)" ;;
  *" create "*)
    problem=$(answer create)
    [[ -z $problem ]] || { echo "ERROR: $problem" >&2; exit 1; } ;;
  *" scp "*) [[ ! -d $FAKE/home ]] || cp "$5" "$FAKE/home/sora_jax.tar.gz" ;;
  *" ssh "*)
    [[ ! -f $FAKE/ssh-fails ]] || exit 1
    if [[ -d $FAKE/home ]]; then
      for word in "$@"; do [[ $word != --command=* ]] || command=${word#--command=}; done
      cd "$FAKE/home" && HOME=$FAKE/home bash -c "$command"
    fi ;;
esac
"""
FAKES = {
    "gcloud": FAKE_GCLOUD,
    "sleep": "#!/bin/sh\nexit 0\n",
    "systemctl": "#!/bin/sh\n[ -f $FAKE/active ]\n",
    "sudo": '#!/bin/sh\nexec "$@"\n',
    # runs what stands after the options, as systemd would
    "systemd-run": '#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    # makes the environment's Python, which records what it is given
    "uv": """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKE/uv"
[[ $1 == pip ]] && exit
mkdir -p venv/bin
printf '#!/bin/bash\\npwd >"$FAKE/cwd"\\nprintf "%%s\\\\0" "$@" >"$FAKE/python"\\n' >venv/bin/python
chmod +x venv/bin/python
""",
}


class Machine:
    """A machine with a checkout of the scripts, the fakes on its path and no settings."""

    def __init__(self, checkout, folder):
        self.checkout, self.fake = checkout, folder / "fake"
        programs = folder / "bin"
        programs.mkdir()
        self.fake.mkdir()
        for name, text in FAKES.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SORA_")}
        self.environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "FAKE": str(self.fake)}

    def __call__(self, script, *arguments, **environment):
        return subprocess.run(
            [self.checkout / "tpu_setup" / f"{script}.sh", *arguments],
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def answers(self, **lines):
        for name, values in lines.items():
            (self.fake / name).write_text("".join(f"{value}\n" for value in values))

    def calls(self):
        """Returns the command lines that gcloud has got."""
        path = self.fake / "calls"
        return [c.split("\0")[:-1] for c in path.read_text().split("\x1e")[:-1]] if path.exists() else []

    def actions(self):
        """Returns what was done to the slice: the calls that change something."""
        names = []
        for call in self.calls():
            line = " ".join(call)
            if "systemd-run" in line:
                names.append("launch")
            elif " scp " in line:
                names.append("install")
            elif match := re.search(r" (create|delete) ", line):
                names.append(match[1])
        return names


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a checkout")
    shutil.copytree(ROOT / "tpu_setup", folder / "tpu_setup")
    (folder / "experiments").mkdir()
    (folder / "experiments" / "train.py").write_text("")
    git = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--no-gpg-sign", "-m", "scripts"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return folder


@pytest.fixture
def machine(checkout, tmp_path):
    return Machine(checkout, tmp_path)


def commands(result):
    """Returns the command lines that a dry run has printed, as a shell reads them."""
    assert result.returncode == 0, result.stderr
    text = "".join(line for line in result.stdout.splitlines(keepends=True) if not line.startswith("# "))
    found, rest = [], ""
    for line in text.splitlines(keepends=True):
        rest += line
        try:
            found.append(shlex.split(rest))
            rest = ""
        except ValueError:  # an open quote: the word goes on in the next line
            continue
    assert not rest
    return found


@pytest.mark.parametrize("name", [*SCRIPTS, "settings"])
def test_syntax(name):
    assert subprocess.run(["bash", "-n", ROOT / "tpu_setup" / f"{name}.sh"], check=False).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option_and_has_examples(machine, script):
    result = machine(script, "--help")
    assert result.returncode == 0 and "Examples:" in result.stdout and "set -euo" not in result.stdout
    if script != "resume":  # which names those of the others by naming the others
        text = (ROOT / "tpu_setup" / f"{script}.sh").read_text()
        accepted = re.search(r'^read_settings "([^"]*)"', text, re.M)[1].split()
        missing = [option for option in accepted if option != "rest" and f"--{option}" not in result.stdout]
        assert not missing


def test_the_trainings_of_the_examples_fit_pixels_and_eight_chips():
    files = [ROOT / "tpu_setup" / name for name in ("README.md", "launch.sh", "resume.sh")]
    text = "\n".join(path.read_text() for path in files)
    found = re.findall(r"(?:-- |train\.py )(sora_\w+(?: --[\w.-]+(?: [\w./]+)?)*)", text)
    assert len(found) == 8
    for command in set(found):
        config = train.parse([*shlex.split(command), "--dry-run"]).config
        assert config.patch.channels == 3
        check_batch_size(config.data.batch_size, mesh_shape(config.mesh, 8))
    example = (ROOT / "tpu_setup" / "config.env.example").read_text()
    assert set(re.findall(r"v5litepod-\d+", text + example)) == {"v5litepod-8"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_runs_nothing(machine, script):
    before = sorted(machine.checkout.rglob("*"))
    printed = commands(machine(script, "--dry-run", *NEEDED[script]))
    assert printed and all(words[0] in ("gcloud", "git") for words in printed)
    assert machine.calls() == [] and sorted(machine.checkout.rglob("*")) == before


@pytest.mark.parametrize(
    ("provisioning", "expected"),
    [
        ("on-demand", ["tpu-vm", "create", "my-slice", *PLACE, "--version=v2-alpha-tpuv5-lite"]),
        ("spot", ["tpu-vm", "create", "my-slice", *PLACE, "--version=v2-alpha-tpuv5-lite"]),
        ("queued", ["queued-resources", "create", "my-slice", "--node-id=my-slice", *PLACE]),
        ("queued-spot", ["queued-resources", "create", "my-slice", "--node-id=my-slice", *PLACE]),
    ],
)
def test_create(machine, provisioning, expected):
    (words,) = commands(machine("create", *NEEDED["create"], "--provisioning", provisioning, "--dry-run"))
    assert words[:3] == ["gcloud", "compute", "tpus"]
    assert words[3 : 3 + len(expected)] == expected
    assert "--accelerator-type=v5litepod-16" in words
    assert ("--spot" in words) == provisioning.endswith("spot")
    assert ("--runtime-version=v2-alpha-tpuv5-lite" in words) == provisioning.startswith("queued")


def test_options_reach_gcloud_whole(machine):
    options = ["--network", "my net", "--subnetwork=it's", "--service-account", "a@b", "--valid-until", "6h"]
    arguments = [*NEEDED["create"], *options, "--internal-ips", "--provisioning", "queued"]
    (words,) = commands(machine("create", *arguments, "--dry-run"))
    expected = {"--network=my net", "--subnetwork=it's", "--service-account=a@b", "--valid-until-duration=6h"}
    assert expected | {"--internal-ips"} <= set(words)
    assert machine("create", *arguments).returncode == 0
    assert [["gcloud", *call] for call in machine.calls()] == [words]  # printed is what runs
    (words,) = commands(machine("follow", *SLICE, "--internal-ips", "--dry-run"))
    assert "--internal-ip" in words


def test_follow_and_delete(machine):
    (words,) = commands(machine("follow", *SLICE, "--worker", "all", "--lines=5", "--directory", "my dir", "--dry-run"))
    assert words[3:6] == ["tpu-vm", "ssh", "my-slice"] and "--worker=all" in words
    assert shlex.split(words[-1].removeprefix("--command=")) == ["tail", "-n", "5", "-F", "my dir/train.log"]
    stop, delete = commands(machine("delete", *SLICE, "--dry-run"))
    assert "systemctl stop sora-train" in stop[-1] and "--worker=all" in stop
    assert delete[3:] == ["tpu-vm", "delete", "my-slice", *PLACE, "--quiet"]
    (delete,) = commands(machine("delete", *SLICE, "--now", "--provisioning", "queued", "--dry-run"))
    assert delete[3:] == ["queued-resources", "delete", "my-slice", *PLACE, "--force", "--quiet"]


def test_delete_asks_and_waits_for_the_training_to_save(machine):
    result = machine("delete", *SLICE)  # nobody is there to answer
    assert result.returncode == 2 and "--yes" in result.stderr and machine.calls() == []
    machine.answers(**{"ssh-fails": ["yes"]})
    result = machine("delete", *SLICE, "--yes")
    assert result.returncode == 1 and "--now" in result.stderr and machine.actions() == []
    assert machine("delete", *SLICE, "--yes", "--now").returncode == 0 and machine.actions() == ["delete"]


def without(arguments, option):
    """Returns the command line without an option and its value."""
    at = arguments.index(option)
    return arguments[:at] + arguments[at + 2 :]


@pytest.mark.parametrize(
    ("script", "option"),
    [
        (script, option)
        for script in SCRIPTS
        for option in NEEDED[script]
        if option.startswith("--") and option not in ("--", "--data.path")
    ],
)
def test_missing_argument(machine, script, option):
    result = machine(script, *without(NEEDED[script], option))
    variable = "SORA_" + option[2:].upper().replace("-", "_")
    assert result.returncode == 2 and result.stdout == "" and machine.calls() == []
    assert result.stderr.startswith(f"{script}.sh: {option} (or {variable}) is needed")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("create", ["--nme", "x"], "no option --nme"),
        ("create", ["x"], "unexpected argument 'x'"),
        ("create", ["--name"], "--name needs a value"),
        ("create", ["--name", "--zone"], "--name needs a value"),
        ("create", ["--wait=1"], "--wait takes no value"),
        ("create", ["--", "x"], "takes nothing after --, got 'x'"),
        ("create", [*NEEDED["create"], "--provisioning", "cheap"], "on-demand spot queued queued-spot, got 'cheap'"),
        ("create", [*NEEDED["create"], "--poll-seconds", "0"], "at least 1, got '0'"),
        ("create", ["--config", "no such file"], "no file 'no such file'"),
        ("install", [*SLICE, "--revision", "no-such"], "no commit 'no-such'"),
        ("install", [*SLICE, "--data", "data/mine"], "got 'data/mine'"),
        ("launch", [*SLICE, *RUN], "needed after --"),
        ("launch", [*SLICE, *RUN, "--", "--data.path", "x"], "CONFIG"),
        ("launch", [*SLICE, *RUN, *TRAINING, "--workdir=x"], "give it before --"),
        ("follow", [*SLICE, "--worker", "first"], "got 'first'"),
        ("follow", ["--rest", "x"], "no option --rest"),
        ("resume", [*SLICE, *CHIPS, "--workdir", "runs/xl", *TRAINING], "got 'runs/xl'"),
        ("resume", [*SLICE, *CHIPS, *RUN, "--max-failures", "few", *TRAINING], "got 'few'"),
    ],
)
def test_bad_input(machine, script, arguments, message):
    result = machine(script, *arguments)
    assert result.returncode == 2 and message in result.stderr and result.stdout == "" and machine.calls() == []


def test_settings_of_flags_environment_and_file(machine, tmp_path):
    config = tmp_path / "my settings.env"
    text = (
        "# mine\n\nSORA_NAME=my-slice\nSORA_PROJECT=file\nSORA_ZONE=file\nSORA_NETWORK='my net'\nSORA_SUBNETWORK=$(id)"
    )
    config.write_text(text)
    given = [*CHIPS, "--zone", "flag", "--dry-run"]
    environment = {"SORA_CONFIG": str(config), "SORA_PROJECT": "environment", "SORA_ZONE": "environment"}
    (words,) = commands(machine("create", *given, **environment))
    assert {"my-slice", "--project=environment", "--zone=flag", "--network=my net", "--subnetwork=$(id)"} <= set(words)
    config.write_text("SORA_NAMME=x\n")
    result = machine("create", "--config", str(config))
    assert result.returncode == 2 and "SORA_NAMME=x" in result.stderr


def test_config_example_is_enough_for_every_script(machine):
    example = str(ROOT / "tpu_setup" / "config.env.example")
    for script in SCRIPTS:
        rest = TRAINING if script in ("launch", "resume") else []
        assert commands(machine(script, "--config", example, "--dry-run", *rest))


@pytest.mark.parametrize("directory", ["sora", "it's mine"])
def test_install_and_launch_on_a_host(machine, directory):
    """The commands for the hosts are run, in a home directory of their own, by the shell that a host would run."""
    home = machine.fake / "home"
    (home / directory / "source" / "removed").mkdir(parents=True)
    where = [*SLICE, "--directory", directory]
    result = machine("install", *where, "--python", "3.11", "--data", "gs://my-bucket/my data")
    assert result.returncode == 0, result.stderr
    installed = home / directory
    assert (installed / "source" / "tpu_setup" / "create.sh").exists() and (installed / "installed").exists()
    assert not (installed / "source" / "removed").exists()
    assert ["storage", "rsync", "--recursive", "gs://my-bucket/my data", "data"] in machine.calls()
    assert "--python 3.11" in (machine.fake / "uv").read_text()
    check = (machine.fake / "python").read_text().split("\0")[1]
    compile(check, "check", "exec")
    assert "jax.distributed.initialize()" in check

    result = machine("launch", *where, "--workdir", "gs://my-bucket/my run", "--", "sora_xl", *AWKWARD)
    assert result.returncode == 0, result.stderr
    given = (machine.fake / "python").read_text().split("\0")[:-1]
    train = ["-u", "experiments/train.py", "sora_xl"]
    assert given == [*train, *AWKWARD, "--workdir", "gs://my-bucket/my run", "--multihost"]
    assert (machine.fake / "cwd").read_text() == f"{installed / 'source'}\n"

    (machine.fake / "active").touch()
    result = machine("launch", *where, *RUN, *TRAINING)
    assert result.returncode == 1 and "running already" in result.stderr


RECREATE = ["delete", "create", "install", "launch"]


@pytest.mark.parametrize(
    ("answers", "actions"),
    [
        ({"done": ["yes"], "slice": ["PREEMPTED"]}, []),
        ({"done": ["no", "yes"], "slice": ["gone"]}, ["create", "install", "launch"]),
        ({"done": ["no", "yes"], "slice": ["PREEMPTED"]}, RECREATE),
        ({"done": ["no", "yes"], "slice": ["READY"], "job": ["active"]}, []),
        ({"done": ["no", "yes"], "slice": ["READY"], "job": ["deactivating"]}, []),
        ({"done": ["no", "yes"], "slice": ["READY"], "job": ["inactive"]}, ["launch"]),
        ({"done": ["no", "yes"], "slice": ["READY"], "job": ["failed"]}, ["launch"]),
        ({"done": ["no", "yes"], "slice": ["READY"], "job": ["missing"]}, ["install", "launch"]),
        ({"done": ["no", "yes"], "slice": ["CREATING"]}, []),
        ({"done": ["no", "no", "no", "yes"], "slice": ["READY", "PREEMPTED", "READY"], "job": ["active"]}, RECREATE),
        # whatever cannot be asked is no reason to delete anything
        ({"done": ["error", "error", "yes"], "slice": ["PREEMPTED"]}, []),
        ({"done": ["no", "no", "yes"], "slice": ["error"]}, []),
        ({"done": ["no", "no", "yes"], "slice": ["READY"], "job": ["nonsense"]}, []),
    ],
)
def test_resume_tells_done_from_preempted(machine, answers, actions):
    machine.answers(**answers)
    result = machine("resume", *SLICE, *CHIPS, *RUN, "--provisioning", "spot", *TRAINING)
    assert result.returncode == 0, result.stderr
    assert "done: gs://my-bucket/runs/xl/DONE" in result.stderr
    assert machine.actions() == actions


@pytest.mark.parametrize(
    ("answers", "actions"),
    [
        ({"done": ["no", "yes"], "slice": ["gone"], "request": ["gone", "ACTIVE"]}, ["create", "install", "launch"]),
        ({"done": ["no", "yes"], "slice": ["gone"], "request": ["SUSPENDED", "PROVISIONING", "ACTIVE"]}, RECREATE),
        ({"done": ["no", "yes"], "slice": ["PREEMPTED"], "request": ["ACTIVE"]}, RECREATE),
        ({"done": ["no", "yes"], "slice": ["PREEMPTED"], "request": ["SUSPENDING"]}, []),
        ({"done": ["no", "no", "yes"], "slice": ["gone"], "request": ["WAITING_FOR_RESOURCES"]}, []),
        ({"done": ["no", "no", "yes"], "slice": ["gone"], "request": ["error"]}, []),
    ],
)
def test_resume_in_the_queue(machine, answers, actions):
    machine.answers(**answers)
    result = machine("resume", *SLICE, *CHIPS, *RUN, "--provisioning", "queued-spot", *TRAINING)
    assert result.returncode == 0, result.stderr
    assert machine.actions() == actions


def test_resume_gives_up_on_a_training_that_fails(machine):
    machine.answers(done=["no"], slice=["READY"], job=["failed"])
    result = machine("resume", *SLICE, *CHIPS, *RUN, "--max-failures", "2", *TRAINING)
    assert result.returncode == 1 and "failure 3, more than --max-failures 2" in result.stderr
    assert machine.actions() == ["launch", "launch"]


def test_resume_waits_for_capacity_but_not_for_a_wrong_request(machine):
    full = 'There is no more capacity in the zone "us-west4-a"'
    machine.answers(done=["no"] * 6 + ["yes"], slice=["gone"], create=[full] * 5 + [""])
    result = machine("resume", *SLICE, *CHIPS, *RUN, "--max-failures", "1", *TRAINING)
    assert result.returncode == 0 and machine.actions() == ["create"] * 6 + ["install", "launch"]
    machine.answers(done=["no"], create=["Unknown accelerator type"])
    result = machine("resume", *SLICE, *CHIPS, *RUN, "--max-failures", "1", *TRAINING)
    assert result.returncode == 1 and "Unknown accelerator type" in result.stderr


def test_a_failed_request_ends_the_waiting(machine):
    machine.answers(request=["WAITING_FOR_RESOURCES", "FAILED"])
    result = machine("create", *NEEDED["create"], "--provisioning", "queued", "--wait")
    assert result.returncode == 1 and "FAILED" in result.stderr
