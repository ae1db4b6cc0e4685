from __future__ import annotations

import pytest

from trinfer import ConfigError
from trinfer.server.node import SINGLE, Node, find_node, first_host

DATATROVE = {"DATATROVE_NODE_RANK": "1", "DATATROVE_NODE_IPS": "10.0.0.1, 10.0.0.2"}
SLURM = {"SLURM_NODEID": "2", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "gpu[03-05,12]"}
TORCHRUN = {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "head"}


@pytest.mark.parametrize(
    ("environ", "spans", "expected"),
    [
        ({}, True, SINGLE),
        (DATATROVE, True, Node(1, 2, "10.0.0.1")),
        (DATATROVE, False, Node(1, 2, "10.0.0.1")),  # datatrove's word counts for every engine
        ({**DATATROVE, **SLURM}, True, Node(1, 2, "10.0.0.1")),
        ({"DATATROVE_NODE_RANK": "-1", **SLURM}, True, SINGLE),
        ({"DATATROVE_NODE_RANK": "0"}, True, Node(0, 1, None)),
        ({"DATATROVE_NODE_RANK": "3"}, True, Node(3, 4, None)),
        (SLURM, True, Node(2, 4, "gpu03")),
        (SLURM, False, SINGLE),
        ({"SLURM_NODEID": "0", "SLURM_NNODES": "1"}, True, SINGLE),
        (TORCHRUN, True, Node(1, 2, "head")),
        (TORCHRUN, False, SINGLE),
        ({"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}, True, SINGLE),
    ],
)
def test_what_the_environment_says(environ, spans, expected):
    assert find_node(environ, multi_node=None, spans_nodes=spans) == expected


def test_the_config_can_silence_the_environment_or_insist_on_it():
    assert find_node(DATATROVE, multi_node=False, spans_nodes=True) == SINGLE
    with pytest.raises(ConfigError, match="nothing tells this node's rank"):
        find_node({}, multi_node=True, spans_nodes=True)


def test_a_rank_that_is_no_number_is_named():
    with pytest.raises(ConfigError, match="DATATROVE_NODE_RANK is 'one'"):
        find_node({"DATATROVE_NODE_RANK": "one"}, multi_node=None, spans_nodes=True)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-07,12],cpu1", "gpu03"),
        ("rack[1-2]-gpu", "rack1-gpu"),
        ("gpu[7,9]", "gpu7"),
        ("", None),
    ],
)
def test_first_host_of_a_slurm_node_list(nodelist, host):
    assert first_host(nodelist) == host
