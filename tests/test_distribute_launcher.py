"""The launcher of ranks: streams, signals, exit codes, and what follows where a rank is lost."""

import os
import select
import signal
import subprocess
import sys
import tomllib

import pytest

from mien.cli import main
from mien.core.config import DistributeConfig, from_dict
from mien.core.console.outcome import Outcome
from mien.core.distribute import launcher
from mien.core.distribute.launcher import Ended, Place, exit_code, launch, lost_rank
from mien.core.distribute.places import places_on_cpu, places_on_gpus

TWO = [Place("GPU 0", "0"), Place("GPU 2", "2")]
HEAD = """
import os, signal, sys
rank, size, restart = (
    int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
)
"""
START = [sys.executable, "-I", "-S", "-c"]


@pytest.fixture
def run():
    """Launch a script as every rank; the exit code and the lines that were reported."""

    def run(script, places=TWO, restarts=0):
        reported = []
        code = launch(
            lambda restart: [*START, HEAD + script, str(restart)],
            places,
            restarts=restarts,
            saved=lambda: "iteration 5 is saved",
            report=reported.append,
        )
        return code, reported

    return run


def test_ranks_have_what_torchrun_would_give_them_and_the_first_one_the_streams(run, capfd):
    script = """
names = "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
print(rank, size, *(os.environ[name] for name in names), restart)
print("rank 1: a line" if rank else "a line", file=sys.stderr)
print("an odd line \\x1b", file=sys.stderr)
if rank: sys.exit(sys.stdin.read() != "")
"""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    assert run(script) == (0, [])
    out, err = capfd.readouterr()
    assert out == "0 2 0 2 127.0.0.1 0,2 PCI_BUS_ID 0\n"
    told = ["a line", "an odd line \x1b", "rank 1: a line", "rank 1: an odd line \x1b"]
    assert sorted(err.splitlines()) == told


def test_what_mien_says_in_several_ranks_is_told_once(run, capfd):
    script = """
print("mien train: no such folder", file=sys.stderr)
if rank == 2: sys.stderr.write("mien train: another thing")
sys.exit(2)
"""
    assert run(script, [*TWO, Place("GPU 3", "3")]) == (2, [])
    assert capfd.readouterr().err.splitlines() == [
        "mien train: no such folder",
        "rank 2: mien train: another thing",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_ends_the_run_is_forwarded_to_every_rank(run, number):
    script = f"""
signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])
open("/proc/self/comm")  # a call, so that both are blocked before it is sent
if rank: os.kill(os.getppid(), {int(number)})
signal.sigwait([{int(number)}])
sys.exit(4)
"""
    assert run(script) == (Outcome.STOPPED, [])


def test_a_signal_before_ranks_listen_is_no_loss(run):
    script = "if rank: os.kill(os.getppid(), signal.SIGTERM)\nsignal.pause()"
    assert run(script) == (4, ["SIGTERM received before training began"])


def test_a_request_goes_to_the_first_rank_alone(run):
    script = """
asked = [signal.SIGUSR1, signal.SIGUSR2]
signal.pthread_sigmask(signal.SIG_BLOCK, asked)
if rank == 0:
    for each in asked: os.kill(os.getppid(), each)
    sys.exit({signal.sigwait(asked), signal.sigwait(asked)} != set(asked))
"""
    assert run(script) == (0, [])


def test_a_lost_rank_ends_the_others_and_is_told_in_one_line(run, monkeypatch):
    monkeypatch.setattr(launcher, "_GRACE_S", 0.2)
    script = "os.kill(os.getpid(), signal.SIGKILL) if rank else signal.pause()"
    code, reported = run(script)
    assert code == Outcome.HALTED
    assert len(reported) == 1
    assert reported[0].startswith("rank 1 (GPU 2, pid ")
    assert reported[0].endswith(
        ") was ended by SIGKILL; iteration 5 is saved; start again to go on"
    )


def test_what_the_first_rank_has_told_of_a_lost_one_is_not_told_again(run, capfd):
    script = """
if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
print(f"mien train: rank 1 (pid {os.getpid()}) has ended", file=sys.stderr)
sys.exit(3)
"""
    code, reported = run(script, [*TWO, Place("GPU 3", "3")], restarts=1)
    assert (code, reported) == (3, ["restart 1 of 1 goes on with GPU 0, GPU 3"])


def test_the_others_can_see_how_a_rank_has_ended(run, tmp_path, capfd):
    script = f"""
if rank == 1:
    with open("{tmp_path}/own", "w") as file: file.write(str(os.getpid()))
    os.rename("{tmp_path}/own", "{tmp_path}/pid")
    os.kill(os.getpid(), signal.SIGKILL)
stat = ""
while not stat.endswith(" 9"):
    if os.path.exists("{tmp_path}/pid"):
        with open("{tmp_path}/pid") as file: pid = file.read()
        with open(f"/proc/{{pid}}/stat") as file: stat = file.read().strip()
sys.exit(3)
"""
    assert run(script) == (3, [])


def test_the_run_goes_on_with_the_places_that_are_left(run, capfd):
    script = """
if restart == 0 and rank == 1: os.kill(os.getpid(), signal.SIGSEGV)
if restart == 1 and rank == 0: sys.exit(1)
if restart < 2: sys.exit(2)
print(size, os.environ["CUDA_VISIBLE_DEVICES"], sys.argv[1])
"""
    code, reported = run(script, [*TWO, Place("GPU 3", "3")], restarts=5)
    assert code == 0
    assert [line.partition("pid")[0] for line in reported] == ["rank 1 (GPU 2, ", "rank 0 (GPU 0, "]
    assert reported[0].endswith(
        "was ended by SIGSEGV; iteration 5 is saved; restart 1 of 5 goes on with GPU 0, GPU 3"
    )
    assert reported[1].endswith(
        "failed with exit code 1; iteration 5 is saved; restart 2 of 5 goes on with GPU 3"
    )
    assert capfd.readouterr().out == "1 3 2\n"


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_how_a_run_has_ended_by_itself_is_no_reason_for_a_restart(run, code):
    assert run(f"sys.exit({code})", restarts=3) == (code, [])


def test_no_place_is_left(run):
    code, reported = run("sys.exit(1)", restarts=9)
    assert code == 1
    assert len(reported) == 2
    assert reported[-1].endswith("start again to go on")


def _ended(rank, code, *, was_killed=False):
    return Ended(rank, Place("CPU"), 1, code, was_killed)


@pytest.mark.parametrize(
    ("ended", "stopped", "code", "lost"),
    [
        ([_ended(1, 0), _ended(0, 0)], False, 0, None),
        ([_ended(1, -9), _ended(0, 3)], False, 3, 1),
        ([_ended(0, 3), _ended(1, -9)], False, 3, 1),
        ([_ended(1, 1), _ended(0, -9)], False, 1, 0),
        ([_ended(0, -9), _ended(1, 3)], False, 3, 0),
        ([_ended(0, -9), _ended(1, -9, was_killed=True)], False, 3, 0),
        ([_ended(1, 2), _ended(0, -9, was_killed=True)], False, 2, None),
        ([_ended(0, 0), _ended(1, -11)], False, 0, None),
        ([_ended(1, -15), _ended(0, -15)], True, 4, None),
    ],
)
def test_exit_codes(ended, stopped, code, lost):
    assert exit_code(ended, stopped=stopped) == code
    if not stopped:
        assert lost_rank(ended) == next((each for each in ended if each.rank == lost), None)


LAUNCHER = """
import sys
from mien.core.distribute.launcher import Place, launch
script = "import os, signal, time; BEGIN; os.write(2, b'%d ' % os.getpid() + bytes([10]));"
script += "time.sleep(600)"
script = script.replace("BEGIN", sys.argv[1])
places = [Place("CPU"), Place("CPU")]
sys.exit(launch(lambda _: [sys.executable, "-I", "-S", "-c", script], places, restarts=0,
                saved=str, report=print))
"""


@pytest.fixture
def launched():
    """Launch two ranks that wait from a process of its own; it and a handle of each rank."""
    processes, handles = [], []

    def start(what_ranks_do="pass"):
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, what_ranks_do],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        lines = [process.stderr.readline() for _ in range(2)]
        handles.extend(os.pidfd_open(int(line.rpartition(":")[2])) for line in lines)
        return process, handles

    yield start
    for handle in handles:
        os.close(handle)
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def _wait_for(handles):
    for handle in handles:
        assert select.select([handle], [], [], 60)[0], "a rank has outlived its launcher"


def test_a_launcher_that_is_killed_leaves_no_rank(launched):
    process, ranks = launched()
    process.kill()
    _wait_for(ranks)


def test_a_second_signal_ends_all_at_once(launched):
    process, ranks = launched("signal.signal(15, lambda *_: os.write(2, b'noted' + bytes([10])))")
    process.send_signal(signal.SIGTERM)
    for _ in ranks:
        assert process.stderr.readline().endswith("noted\n")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    _wait_for(ranks)


# What faceswap calls it


@pytest.mark.parametrize(
    ("words", "meant", "told"),
    [
        ("-D default", "distribute.gpus=", "left out; without --gpus one GPU trains"),
        ("-D mirrored", "distribute.gpus=all", "distribute.gpus is all; the batch is that of all"),
        ("-D mirrored --gpus 0,2", "distribute.gpus=0,2", "distribute.gpus is all"),
        ("--distributed", "distribute.gpus=all", "distribute.gpus is all; the batch is that"),
        ("-D central-storage", "optimizer.placement=host", "optimizer.placement is host"),
    ],
)
def test_strategies_of_faceswap_are_translated_and_told(words, meant, told, capsys):
    assert main(["train", *words.split(), "--print-config"]) == 0
    said = capsys.readouterr()
    name, _, value = meant.partition("=")
    section, _, key = name.partition(".")
    assert tomllib.loads(said.out)[section][key] == value
    assert said.err.startswith(f"Note: {'--dist' if '-D' in words else '--distributed'}")
    assert told in said.err
    assert said.err.count("\n") == 1


# Which GPUs


@pytest.mark.parametrize(
    ("gpus", "excluded", "visible", "chosen"),
    [
        ("all", (), None, "0 1 2 3"),
        (2, (), None, "0 1"),
        ("2", ("0",), None, "1 2"),
        ("3,0", (), None, "3 0"),
        ("0, 2,3", ("2",), None, "0 3"),
        ("3,", (), None, "3"),
        ("", ("0", "1"), None, "2"),
        ("all", "1, 2", None, "0 3"),
        ("all", [1, 2], None, "0 3"),
        ("all", 3, "7,5, GPU-9,6", "7 5 GPU-9"),
    ],
)
def test_gpus_are_chosen(gpus, excluded, visible, chosen):
    config = DistributeConfig(gpus=gpus, exclude_gpus=excluded)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    places = places_on_gpus(config, 4, environment)
    assert [place.visible for place in places] == chosen.split()


@pytest.mark.parametrize(
    ("gpus", "excluded", "num_gpus", "said"),
    [
        ("0,4", (), 4, "distribute.gpus names GPU 4, but there is GPU 0 to 3; see nvidia-smi"),
        ("all", ("1",), 1, "distribute.exclude_gpus names GPU 1, but there is only GPU 0"),
        ("3", ("1",), 3, "distribute.gpus is 3, but there are only 2: 0, 2; use --gpus all"),
        ("1,2", ("1", "2"), 3, "distribute.exclude_gpus leaves none of GPU 0 to 2; leave one"),
        ("all", ("0",), 1, "distribute.exclude_gpus leaves none of only GPU 0"),
    ],
)
def test_gpus_that_are_not_there_are_refused(gpus, excluded, num_gpus, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        places_on_gpus(DistributeConfig(gpus=gpus, exclude_gpus=excluded), num_gpus, {})


@pytest.mark.parametrize("gpus", ["0", "-1", "two", "1,,2", ",", "0x2", "1000", "２"])
def test_what_names_no_gpus_is_refused(gpus):
    with pytest.raises(ValueError, match="^distribute.gpus must be all, how many"):
        from_dict({"distribute": {"gpus": gpus}})


@pytest.mark.parametrize("excluded", ["all", [-1], [True], ["1.5"], {"a": 1}])
def test_what_excludes_no_gpus_is_refused(excluded):
    with pytest.raises(ValueError, match="^distribute.exclude_gpus must be numbers of GPUs"):
        from_dict({"distribute": {"exclude_gpus": excluded}})


def test_processes_of_the_cpu_are_counted():
    assert len(places_on_cpu(DistributeConfig(gpus="3"))) == 3
    for gpus in ("all", "0,1"):
        with pytest.raises(ValueError, match="but train.device is cpu; say how many processes"):
            places_on_cpu(DistributeConfig(gpus=gpus))


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["--gpus", "2"], {}, "distribute.gpus and exclude_gpus choose among GPUs, but there"),
        (["-X", "0", "1"], {}, "distribute.gpus and exclude_gpus choose among GPUs, but there"),
        (["--gpus", "2", "--device", "cuda:1"], {}, "train.device is cuda:1, one GPU, and distr"),
        (["--restarts", "2"], {}, "distribute.restarts goes on with the GPUs that are left"),
        (["--gpus", "2", "--set", "loss.eye_multiplier=0"], {}, "loss.eye_multiplier must be"),
        (
            ["--gpus", "17", "--device", "cpu", "-b", "16"],
            {},
            "train.batch_size must be at least 17, a face of a side for each of the 17 ranks",
        ),
        (
            ["--gpus", "2", "--device", "cpu"],
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            "this process is rank 1 of 4 already, by its environment",
        ),
    ],
)
def test_a_mistake_is_one_line_before_any_rank_is_started(
    words, variables, said, tmp_path, monkeypatch, capsys
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "-m", str(tmp_path / "model"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mien train: {said}")
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()
