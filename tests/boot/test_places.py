from pathlib import Path

import pytest

from app.boot.places import Filesystem, default_places, filesystem, folder_limit, memory_limits
from tests.boot.places import GIB, Machine, mounted

MOUNTS = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 master:2 - overlay overlay rw,lowerdir=/a
30 27 0:27 / /dev/shm rw - tmpfs shm rw,size=65536k
31 27 0:40 / /workspace rw - ext4 /dev/nvme0n1 rw
32 27 0:41 / /workspace rw - fuse.juicefs JuiceFS:volume rw
33 27 0:42 / /mnt/my\040disk rw - xfs /dev/sdb1 rw
34 27 0:43 /a /mnt/block rw - ext4 /dev/nbd0p1 rw
nonsense
"""


@pytest.mark.parametrize(
    ("path", "kind", "local"),
    [
        ("/usr/lib", "overlay", True),
        ("/dev/shm/x/y", "tmpfs", True),
        ("/dev/shmoo", "overlay", True),
        ("/workspace/a.pth", "fuse.juicefs", False),  # mounted over the disk
        ("/mnt/my disk/a.pth", "xfs", True),
        ("/mnt/block/a.pth", "ext4", False),  # a disk over the network
    ],
)
def test_filesystem_is_the_innermost_mount(tmp_path, path, kind, local):
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(MOUNTS)
    found = filesystem(Path(path), tmp_path)
    assert (found.kind, found.local) == (kind, local)


def test_links_are_followed_to_the_file_system_they_lead_to(tmp_path):
    machine = Machine(tmp_path)
    (machine.tmp / "link").symlink_to(machine.volume)
    assert machine.places().filesystem(machine.tmp / "link/x").kind == "nfs4"


@pytest.mark.parametrize(
    "kind", ["nfs4", "cifs", "smb3", "fuse.mfs", "9p", "virtiofs", "ceph", "lustre", "unheard-of"]
)
def test_remote_and_unknown_kinds_are_not_local(kind):
    assert not Filesystem(kind, "server:/x", Path("/workspace")).local


def test_without_proc_nothing_is_known_and_nothing_fails(tmp_path):
    assert not filesystem(Path("/usr"), tmp_path).local
    assert memory_limits(tmp_path, tmp_path) == []


def test_this_machine_can_be_read():
    places = default_places()
    assert [str(place.folder) for place in places.order] == ["/dev/shm", "/tmp"]
    assert places.filesystem(Path(__file__)).kind != "unknown"
    assert memory_limits(places.proc, places.cgroup)[0].total > 1 << 28
    assert folder_limit(Path("/tmp")).total > 0


def limits(machine: Machine) -> list[tuple[int, int]]:
    found = memory_limits(machine.proc, machine.cgroup)
    return [(limit.free, limit.total) for limit in found if "container" in limit.name]


def test_limit_of_version_2_counts_cached_files_as_free(tmp_path):
    machine = Machine(tmp_path)
    machine.limit_v2(most=10 * GIB, used=7 * GIB, cached=2 * GIB)
    assert limits(machine) == [(5 * GIB, 10 * GIB)]
    machine.limit_v2(most=10 * GIB, used=7 * GIB, cached=GIB, active=3 * GIB)
    assert limits(machine) == [(7 * GIB, 10 * GIB)], "what was read twice is dropped as well"


def test_limit_of_version_2_on_a_parent_counts(tmp_path):
    machine = Machine(tmp_path)
    machine.limit_v2(most=10 * GIB, used=4 * GIB, group="pod/container")
    machine.write("cgroup/pod/memory.max", f"{8 * GIB}\n")
    machine.write("cgroup/pod/memory.current", f"{5 * GIB}\n")
    machine.write("cgroup/pod/container/child/memory.max", "max\n")
    machine.write("cgroup/pod/container/child/memory.current", "17\n")
    assert limits(machine) == [(6 * GIB, 10 * GIB), (3 * GIB, 8 * GIB)]


def test_limit_of_version_1_is_found_at_the_root_of_the_mount(tmp_path):
    machine = Machine(tmp_path)
    machine.limit_v1(most=6 * GIB, used=2 * GIB)
    assert limits(machine) == [(4 * GIB, 6 * GIB)]
    machine.limit_v1(most=6 * GIB, used=3 * GIB, cached=2 * GIB)
    assert limits(machine) == [(5 * GIB, 6 * GIB)]


def test_no_limit_of_version_1_is_no_limit(tmp_path):
    machine = Machine(tmp_path)
    machine.limit_v1(most=9223372036854771712, used=2 * GIB)
    assert limits(machine) == []


def test_a_group_outside_of_what_is_mounted(tmp_path):
    machine = Machine(tmp_path)
    machine.limit_v2(most=3 * GIB, used=GIB)
    machine.write("proc/self/cgroup", "0::/../../other/scope\n")
    assert limits(machine) == [(2 * GIB, 3 * GIB)]


def test_shortage_names_the_least_room_with_its_numbers(tmp_path):
    machine = Machine(tmp_path)
    shm, tmp = machine.places(keep=0.1).order
    places = machine.places(keep=0.1)
    assert places.shortage(shm, 1000) is None
    machine.limit_v2(most=10 * GIB, used=6 * GIB)
    assert places.shortage(shm, 3 * GIB - 1000) is None
    said = places.shortage(shm, 3 * GIB + 1000)
    assert said == (
        "the container's memory limit leaves 4.3 GB of 10.7 GB, and 3.2 GB with 1.1 GB kept free are needed"
    )
    machine.memory(available=7 * GIB)
    assert "the machine's memory leaves 7.5 GB of 68.7 GB" in str(places.shortage(shm, 2 * GIB))
    assert "the folder leaves" in str(places.shortage(tmp, 1 << 58))


def test_memory_limits_do_not_count_for_a_disk(tmp_path):
    machine = Machine(tmp_path)
    machine.limit_v2(most=1000, used=1000)
    shm, tmp = machine.places().order
    assert machine.places().shortage(shm, 10) is not None
    assert machine.places().shortage(tmp, 10) is None


def test_room_of_a_real_small_folder(tmp_path):
    machine = Machine(tmp_path)
    with mounted(machine.shm, "size=8m"):
        shm, _ = machine.places(keep=0.5).order
        assert machine.places().shortage(shm, 3 << 20) is None
        assert "the folder leaves 8.4 MB of 8.4 MB" in str(machine.places().shortage(shm, 5 << 20))
