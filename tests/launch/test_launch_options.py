"""From the command line of the launcher to each worker's environment."""

import sys

import pytest

from keras_allreduce.launch.options import environments, parse, parse_hosts


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


def test_workers_of_one_host_share_a_token_that_no_other_start_has(script):
    options = parse(["--workers", "2", script])
    tokens = [
        added["KERAS_ALLREDUCE_JOB_TOKEN"]
        for _ in range(2)
        for added in environments(
            options, ["127.0.0.1:1", "127.0.0.1:2"]
        ).values()
    ]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]


def test_of_several_hosts_the_token_is_the_users(script):
    options = parse(["--hosts", "a:1,b:1", "--host-index", "1", script])
    added = environments(options, options.hosts)[1]
    assert "KERAS_ALLREDUCE_JOB_TOKEN" not in added


def test_one_device_per_worker_leaves_the_environment_to_the_user(script):
    options = parse(["--workers", "1", script])
    added = environments(options, ["127.0.0.1:1001"])[0]
    assert "KERAS_ALLREDUCE_HOST_DEVICES" not in added


@pytest.mark.parametrize(
    "words",
    [
        ("{script}", "--workers", "7", "--", "x"),
        ("{script}", "-m", "json.tool"),
        ("{script}", "-np", "3", "python"),
        ("-m", "json.tool", "--workers", "7"),
    ],
    ids=" ".join,
)
def test_what_follows_the_script_or_module_is_its_own(words, script):
    command = tuple(word.format(script=script) for word in words)
    options = parse(["--workers", "2", *command])
    assert options.num_workers == 2
    assert options.command == command


def test_an_ipv6_address_stands_in_brackets():
    assert parse_hosts("[fd00::1]:1,[fd00::2]:1") == (
        "[fd00::1]:1",
        "[fd00::2]:1",
    )


HOSTS = "--hosts a:1,b:1"
BAD = {
    "no workers": ("--workers 0", "--workers must be at least 1"),
    "neither workers nor hosts": ("", "Pass --workers, or --hosts"),
    "no devices": (
        "--workers 1 --devices-per-worker 0",
        "--devices-per-worker must be at least 1",
    ),
    "fewer than no restarts": (
        "--workers 1 --restarts -1",
        "--restarts must be at least 0",
    ),
    "no grace at all": (
        "--workers 1 --grace-seconds nan",
        "--grace-seconds must be at least 0",
    ),
    "index too high": (
        f"{HOSTS} --host-index 2",
        "--host-index must be from 0 to 1",
    ),
    "index below zero": (
        f"{HOSTS} --host-index -1",
        "--host-index must be from 0 to 1",
    ),
    "no index": (HOSTS, "--hosts needs --host-index"),
    "index without hosts": (
        "--workers 2 --host-index 0",
        "--host-index goes with --hosts",
    ),
    "workers and hosts": (
        f"{HOSTS} --host-index 0 --workers 2",
        "one worker per host",
    ),
    "a host twice": (
        "--hosts a:1,a:1 --host-index 0",
        "must have its own address",
    ),
    "no port": (
        "--hosts a,b:1 --host-index 0",
        "Received: 'a', which does not end in a port",
    ),
    "no host": ("--hosts :1 --host-index 0", "host:port of each"),
    "port not a number": ("--hosts a:x --host-index 0", "host:port of each"),
    "port too high": ("--hosts a:65536 --host-index 0", "host:port of each"),
    "port zero": ("--hosts a:0 --host-index 0", "host:port of each"),
    "bare IPv6": ("--hosts fd00::1:80 --host-index 0", "host:port of each"),
    "no hosts": ("--hosts= --host-index 0", "host:port of each"),
    "workers of mpirun": (
        "-np 2",
        "There is no option -np. Received: -np 2. Pass --workers W",
    ),
    "processes of mpirun": ("-n 2", "There is no option -n. Received: -n 2."),
    "hosts of horovodrun": ("-H a:1,b:1", "Pass --hosts A:PORT,B:PORT"),
    "workers of torchrun": (
        "--nproc-per-node 2",
        "There is no option --nproc-per-node. Received: --nproc-per-node 2. "
        "Pass --workers W",
    ),
    "its older spelling": ("--nproc_per_node=2", "Pass --workers W"),
    "after an option of ours": ("--workers 2 -np 2", "Pass --workers W"),
    "unknown option": ("--worker 2", "unrecognized arguments: --worker"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_end_with_code_2_and_the_rule(
    words, message, script, capsys
):
    with pytest.raises(SystemExit) as error:
        parse([*words.split(), script])
    assert error.value.code == 2
    # The parser breaks no line of its errors.
    assert message in capsys.readouterr().err


def test_a_script_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as error:
        parse(["--workers", "2", "no/such.py"])
    assert error.value.code == 2
    assert "There is no script 'no/such.py'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "python", ["python", "python3", "python3.12", sys.executable]
)
def test_a_script_needs_no_python_before_it(python, script, capsys):
    with pytest.raises(SystemExit) as error:
        parse(["--workers", "2", python, script])
    assert error.value.code == 2
    assert f"Leave `{python}` out." in capsys.readouterr().err


BAD_COMMANDS = {
    "nothing": ([], "Pass a training script, or -m and a module."),
    "no module": (["-m"], "-m must be followed by a module."),
    "module that is not there": (
        ["-m", "no_such_package.train", "x"],
        "There is no module 'no_such_package.train'.",
    ),
    "module that has no name": (["-m", ".x"], "There is no module '.x'."),
    "option for a module": (["-m", "--x"], "There is no module '--x'."),
}


@pytest.mark.parametrize(
    ("command", "message"), BAD_COMMANDS.values(), ids=BAD_COMMANDS
)
def test_a_command_that_cannot_run_is_named(command, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(["--workers", "2", *command])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("columns", "left"), [(80, "69"), (10, "20")])
def test_the_prefix_of_a_line_is_taken_from_the_columns(script, columns, left):
    options = parse(["--workers", "1", script])
    added = environments(options, ["127.0.0.1:1001"], columns)[0]
    assert added["COLUMNS"] == added["KERAS_ALLREDUCE_COLUMNS"] == left


def test_without_a_terminal_the_columns_stay_as_they_are(script):
    options = parse(["--workers", "1", script])
    added = environments(options, ["127.0.0.1:1001"])[0]
    assert not any("COLUMNS" in name for name in added)


def test_the_folder_of_the_output_is_made_or_named(script, tmp_path, capsys):
    folder = tmp_path / "new" / "logs"
    words = ["--workers", "1", "--output-dir"]
    assert parse([*words, str(folder), script]).output_dir == folder
    assert folder.is_dir()
    with pytest.raises(SystemExit):
        parse([*words, script, script])  # A file has that name.
    error = capsys.readouterr().err
    assert "--output-dir must be a folder that can be written" in error
