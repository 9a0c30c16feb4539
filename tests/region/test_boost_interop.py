"""Interoperation with C++: the server and client of Boost.Interprocess' documentation, and forkshm's."""

from __future__ import annotations

import os
import secrets
import shutil
import struct
import subprocess

import pytest

from forkshm import MappedRegion, SharedMemoryObject, remove_on_exit
from forkshm.errors import RegionExistsError

# The two programs of "Sharing memory between processes", with the name as an argument. Additions: another size, a part,
# and an offset_ptr. Boost's client removes the object before it opens it; this one does not.
PROGRAM = r"""
#include <boost/interprocess/shared_memory_object.hpp>
#include <boost/interprocess/mapped_region.hpp>
#include <boost/interprocess/offset_ptr.hpp>
#include <cstring>
#include <iostream>
#include <string>

using namespace boost::interprocess;

struct Node {
    int value;
    offset_ptr<Node> next;
};

int server(const char *name) {
    // Create a shared memory object.
    shared_memory_object shm(create_only, name, read_write);
    // Set size
    shm.truncate(1000);
    // Map the whole shared memory in this process
    mapped_region region(shm, read_write);
    // Write all the memory to 1
    std::memset(region.get_address(), 1, region.get_size());
    return 0;
}

int client(const char *name) {
    // Open already created shared memory object.
    shared_memory_object shm(open_only, name, read_only);
    // Map the whole shared memory in this process
    mapped_region region(shm, read_only);
    // Check that memory was initialized to 1
    const char *mem = static_cast<char *>(region.get_address());
    for (std::size_t i = 0; i < region.get_size(); ++i) {
        if (*mem++ != 1) {
            std::cout << "Error checking memory!" << std::endl;
            return 1;
        }
    }
    std::cout << "Test successful! " << region.get_size() << std::endl;
    return 0;
}

int part(const char *name) {
    shared_memory_object shm(open_or_create, name, read_write);
    mapped_region region(shm, read_write, 5001, 3);
    std::cout << std::string(static_cast<char *>(region.get_address()), region.get_size()) << std::endl;
    std::memcpy(region.get_address(), "C++", 3);
    return 0;
}

int list(const char *name) {
    shared_memory_object shm(open_or_create, name, read_write);
    shm.truncate(4096);
    mapped_region region(shm, read_write);
    Node *nodes = static_cast<Node *>(region.get_address());
    // 0 -> 2 -> 1 -> 1
    const int next[] = {2, 1, 1};
    for (int i = 0; i < 3; ++i) {
        new (nodes + i) Node();
        nodes[i].value = 10 * (i + 1);
        nodes[i].next = nodes + next[i];
    }
    new (nodes + 3) Node();  // the end: null
    std::cout << sizeof(Node) << " " << offsetof(Node, next) << std::endl;
    return 0;
}

int walk(const char *name) {
    shared_memory_object shm(open_only, name, read_only);
    mapped_region region(shm, read_only);
    const Node *node = static_cast<Node *>(region.get_address());
    for (; node; node = node->next.get())
        std::cout << node->value << " ";
    std::cout << std::endl;
    return 0;
}

int main(int, char **argv) {
    const std::string what = argv[1];
    try {
        if (what == "server") return server(argv[2]);
        if (what == "client") return client(argv[2]);
        if (what == "part") return part(argv[2]);
        if (what == "list") return list(argv[2]);
        if (what == "walk") return walk(argv[2]);
        if (what == "remove") {
            std::cout << shared_memory_object::remove(argv[2]) << std::endl;
            return 0;
        }
    } catch (interprocess_exception &ex) {
        std::cout << ex.get_error_code() << " " << ex.get_native_error() << std::endl;
        return 3;
    }
    return 2;
}
"""


@pytest.fixture(scope="module")
def boost(tmp_path_factory):
    """Run the C++ program with a command and the name; return its output."""
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: apt-get install g++")
    folder = tmp_path_factory.mktemp("boost")
    source, program = folder / "program.cpp", folder / "program"
    look = subprocess.run(
        [compiler, "-x", "c++", "-E", "-"],
        input="#include <boost/interprocess/shared_memory_object.hpp>\n",
        capture_output=True,
        text=True,
    )
    if look.returncode:
        pytest.skip("no Boost headers: apt-get install libboost-dev")
    source.write_text(PROGRAM)
    done = subprocess.run(
        [compiler, "-std=c++17", "-w", "-o", program, source, "-lrt", "-pthread"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    def run(what, name, code=0):
        ran = subprocess.run([program, what, name], capture_output=True, text=True, timeout=60)
        assert ran.returncode == code, f"{ran.returncode}: {ran.stdout}{ran.stderr}"
        return ran.stdout.strip()

    return run


@pytest.fixture
def name():
    """Provide an unused name, which is unused again afterwards."""
    made = f"forkshm-test-{os.getpid()}-{secrets.token_hex(8)}"
    with remove_on_exit(made):
        yield made


pytestmark = pytest.mark.slow


def test_their_server_and_our_client(boost, name):
    boost("server", name)
    with SharedMemoryObject("open_only", name, "read_only") as shm, MappedRegion(shm, "read_only") as region:
        assert (shm.size, region.size) == (1000, 1000)
        assert bytes(region.buf) == bytes([1]) * 1000
    with pytest.raises(RegionExistsError):
        SharedMemoryObject("create_only", name)
    assert SharedMemoryObject.remove(name) is True
    assert boost("remove", name) == "0"


def test_our_server_and_their_client(boost, name):
    with SharedMemoryObject("create_only", name) as shm:
        shm.truncate(1000)
        with MappedRegion(shm) as region:
            region.buf[:] = bytes([1]) * 1000
            assert boost("client", name) == "Test successful! 1000"
            region.buf[999] = 2
            assert boost("client", name, code=1) == "Error checking memory!"
    # 9: already_exists_error, 7: not_found_error.
    assert boost("server", name, code=3).split()[0] == "9"
    assert boost("remove", name) == "1"
    assert SharedMemoryObject.remove(name) is False
    assert boost("client", name, code=3).split()[0] == "7"


def test_an_object_of_ours_without_a_size_is_empty_for_them(boost, name):
    with SharedMemoryObject("create_only", name) as shm:
        assert boost("client", name, code=3).split()[1] == "22"  # EINVAL
        shm.truncate(1)
        boost("client", name, code=1)


def test_both_map_the_same_part(boost, name):
    with SharedMemoryObject("create_only", name) as shm:
        shm.truncate(5010)
        with MappedRegion(shm, offset=5000) as region:
            region.buf[:] = b".our......"
            assert boost("part", name) == "our"
            assert bytes(region.buf) == b".C++......"


def test_an_offset_ptr_is_the_distance_from_itself_and_null_is_1(boost, name):
    size, place = map(int, boost("list", name).split())
    assert (size, place) == (16, 8)
    with SharedMemoryObject("open_only", name) as shm, MappedRegion(shm) as region:
        nodes = [struct.unpack_from("=ixxxxq", region.buf, number * size) for number in range(4)]
        assert [value for value, _ in nodes] == [10, 20, 30, 0]
        # The distance is from the pointer, not from the node, to the node.
        assert [distance for _, distance in nodes] == [2 * size - place, -place, -size - place, 1]
        # A list written by forkshm, for Boost to walk: 0 -> 1 -> 3 -> 2 -> null.
        for number, (value, following) in enumerate([(1, 1), (2, 3), (4, None), (3, 2)]):
            distance = 1 if following is None else (following - number) * size - place
            struct.pack_into("=ixxxxq", region.buf, number * size, value, distance)
        assert boost("walk", name) == "1 2 3 4"
