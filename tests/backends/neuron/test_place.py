from __future__ import annotations

from trainfw.backends import Place
from trainfw.backends.neuron.place import read_place


def write(root, **files: str):
    for name, text in files.items():
        (root / name).write_text(text + "\n")
    return root


def test_hosts_of_an_ultraserver_stay_together_in_ring_order():
    hosts = [Place(server, node, f"h{i}") for i, (server, node) in enumerate([("b", 2), ("a", 3), ("b", 0), ("a", 0)])]
    assert [(h.server_id, h.node_id) for h in sorted(hosts)] == [("a", 0), ("a", 3), ("b", 0), ("b", 2)]


def test_hosts_without_a_place_are_sorted_by_name():
    assert [h.fqdn for h in sorted([Place("0", -1, "b"), Place("0", -1, "a")])] == ["a", "b"]


def test_the_drivers_files(tmp_path):
    assert read_place(4, tmp_path) is None
    write(tmp_path, server_id_4="3f00a1", node_id_4="2", server_id_2="77", node_id_2="1", ultraserver_mode="1,3,4")
    assert read_place(4, tmp_path) == Place("3f00a1", 2)
    assert read_place(2, tmp_path) == Place("77", 1)


def test_before_the_election_there_is_no_place(tmp_path):
    write(tmp_path, server_id_4="0000000000000000", node_id_4="-1")
    assert read_place(4, tmp_path) is None


def test_the_names_of_trainium3(tmp_path):
    assert read_place(4, write(tmp_path, reservation_id="r-1", node_id="3")) == Place("r-1", 3)
