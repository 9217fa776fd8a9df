"""Connections of ranks that cannot be made, and what is seen of other ranks."""

import json
import socket
import threading
import types

import pytest
import torch
import torch.distributed as dist
from conftest import CPU

from mien.core.distribute import failure, group
from mien.core.distribute.ranks import Ranks
from mien.core.system.processes import process_space


def _fail(words):
    def fail(*_args, **_settings):
        raise RuntimeError(words)

    return fail


def test_gpus_that_nccl_cannot_connect_are_told_with_what_helps(monkeypatch):
    monkeypatch.setattr(failure, "_SEARCH_S", 0)
    for name, value in {
        "get_device_properties": lambda device: types.SimpleNamespace(uuid="a GPU"),
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "set_device": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(dist, "new_group", _fail("No space left on device\nat line 3"))
    with pytest.raises(ValueError, match="^NCCL cannot connect the GPUs of 1 rank") as refusal:
        group.Group(Ranks(), dist.HashStore()).use_gpu(CPU)
    text = str(refusal.value)
    assert "(No space left on device); NCCL_DEBUG=INFO has it say why. /dev/shm has " in text
    assert "--shm-size=1g" in text
    assert "\n" not in text
    monkeypatch.setattr(group.shutil, "disk_usage", _refuse)
    assert "/dev/shm is not there; " in group._shared_memory()


@pytest.mark.parametrize("is_here", [False, True])
def test_a_rank_of_another_container_of_the_same_name_has_not_ended(is_here):
    """Its number means nothing here; of this one's own it means that the process is gone."""
    space = process_space() if is_here else "another-boot.1"
    other = {"host": socket.gethostname(), "space": space, "pid": 2**30, "gpu": None}
    store = dist.HashStore()
    store.set("member/0", json.dumps(other))
    members = failure.Members(Ranks(1, 2, 0, 1), store)
    text = members.lost().failure.text if is_here else members.lost()
    assert text == (f"rank 0 (pid {2**30}) has ended" if is_here else None)
    assert members.is_speaker, "of its own machine, as far as it can see"


def _refuse(path):
    raise FileNotFoundError(path)


def test_interfaces_are_named_where_there_are_other_machines(monkeypatch):
    monkeypatch.setattr(dist, "TCPStore", _fail("timed out"))
    for name, value in {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="other ranks at 10.0.0.1:29500") as refusal:
        group.open_group(Ranks(1, 4, 1, 2))
    assert "set GLOO_SOCKET_IFNAME, and with GPUs NCCL_SOCKET_IFNAME, to" in str(refusal.value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT$"):
        group.open_group(Ranks(1, 4, 1, 4))


def test_a_process_whose_group_cannot_be_left_is_refused_another(monkeypatch):
    """As after a failure on GPUs, which may be waited for for ever."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    failed = group.Group(Ranks(), dist.HashStore())
    failed.is_broken, failed._gpus = True, dist.group.WORLD
    failed.close()
    with pytest.raises(ValueError, match="^torch.distributed has .* start the program anew$"):
        group.open_group(Ranks(1, 2, 1, 2))
    failed._gpus = None
    failed.close()
    assert not dist.is_initialized()


def test_a_name_that_nobody_knows_is_refused_where_all_ranks_are_here(monkeypatch):
    def unknown(host, port):
        raise group.socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(group.socket, "getaddrinfo", unknown)
    for name, value in {"MASTER_ADDR": "nowhere", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"nowhere, which .* know \(Name .*\); .* 127.0.0.1$"):
        group.open_group(Ranks(1, 2, 1, 2))


def test_a_rank_that_waits_says_for_whom(monkeypatch):
    told, is_told = [], threading.Event()

    def connect(*_args, **_settings):
        assert is_told.wait(60)
        raise RuntimeError("too late")

    def hear(text):
        told.append(text)
        is_told.set()

    monkeypatch.setattr(group, "_SILENCE_S", 0)
    monkeypatch.setattr(dist, "TCPStore", connect)
    for name, value in {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="too late"):
        group.open_group(Ranks(1, 4, 0, 2), when_slow=hear)
    [text] = told
    assert text.startswith("rank 1 waits for the 3 other ranks at 10.0.0.1:29500, for 5 minutes at")
    assert "GLOO_SOCKET_IFNAME" in text


def test_memory_that_grows_is_refused_where_a_graph_exchanges():
    for environment in (
        {},
        {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_GRAPH_REGISTER": "0"},
    ):
        group.check_allocator(environment)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        with pytest.raises(ValueError, match=f"^{name} has expandable_segments, .*unset it"):
            group.check_allocator({name: "max_split_size_mb:64, expandable_segments: True"})
