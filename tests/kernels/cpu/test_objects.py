"""Which of the compiled objects a CPU can run, and the choice among them."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel_parnet import ParNetError
from parallel_parnet.kernels.cpu import instruction_sets, objects, pages
from parallel_parnet.kernels.cpu.instruction_sets import AMX, HERE, MACHINE, SETS
from parallel_parnet.kernels.cpu.objects import NotCompiledError
from small import OPTIONAL

pytestmark = pytest.mark.skipif("native" not in OPTIONAL, reason="the CPU kernels were not compiled")

CPU = Path("/proc/cpuinfo")
AS_LINUX_SAYS = {"bmi": "bmi1", "lzcnt": "abm", "avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni",
                 "avx512bf16": "avx512_bf16"} | {need: need.replace("-", "_") for need in AMX}  # fmt: skip
# of a panel
FLOATS = {"amx": 32, "avx512bf16": 32, "avx512vnni": 32, "avx512": 32, "avxvnni": 16, "avx2": 16, "sse": 8, "neon": 16}


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PARNET_ISA", raising=False)
    caches = objects.in_use, objects.runnable, objects.load
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Objects that may be damaged."""
    for path in HERE.glob("*.so"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(objects, "HERE", tmp_path)
    return tmp_path


@pytest.mark.skipif(not CPU.exists() or MACHINE != "x86_64", reason="asks Linux, which names the features of x86")
def test_this_cpu_has_what_linux_says() -> None:
    (flags, *_) = (line.split(":")[1].split() for line in CPU.read_text().splitlines() if line.startswith("flags"))
    if ctypes.CDLL(None).syscall(158, 0x1023, 18):  # which asks for AMX's registers; a sandbox may not give them
        flags = [flag for flag in flags if flag != "amx_tile"]
    expected = [s.name for s in SETS[MACHINE] if {AS_LINUX_SAYS.get(need, need) for need in s.needs} <= set(flags)]
    assert list(objects.runnable()) == expected
    assert objects.in_use() == expected[0]


def test_an_object_is_what_its_name_says() -> None:
    assert FLOATS.keys() == {known.name for sets in SETS.values() for known in sets}, "also those of other CPUs"
    for name in objects.runnable():
        assert objects.load(name).panel_width() == FLOATS[name]


def test_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", *objects.runnable()):
        monkeypatch.setenv("PARNET_ISA", name)
        objects.in_use.cache_clear()
        assert objects.in_use() == (name or objects.runnable()[0])


@pytest.mark.parametrize("name", ["avx3", "AVX2", "../native", "neon64", "\udcff"])
def test_no_instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARNET_ISA", name)
    with pytest.raises(ParNetError) as said:
        objects.in_use()
    reason = "there is no such instruction set; choose one of"
    assert said.value.args[0] == f"PARNET_ISA={name}: {reason} {', '.join(objects.runnable())}"


def test_a_cpu_that_lacks_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rich = SETS[MACHINE][-1]._replace(name="rich", needs=("avx4096",))
    shutil.copy(folder / f"native_{SETS[MACHINE][-1].name}.so", folder / "native_rich.so")
    monkeypatch.setitem(SETS, MACHINE, (rich, *SETS[MACHINE]))
    refused("rich", "this CPU lacks it", monkeypatch)


@pytest.mark.skipif(len(SETS.get(MACHINE, ())) < 2, reason="there is one object alone")
def test_one_that_was_not_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = SETS[MACHINE][0].name
    (folder / f"native_{gone}.so").unlink()
    refused(gone, "it was not compiled", monkeypatch)


@pytest.mark.skipif(len(SETS.get(MACHINE, ())) < 2, reason="there is one object alone")
def test_the_one_that_says_what_a_cpu_has(folder: Path) -> None:
    """Without it the others are not chosen from; what lacks is named."""
    (folder / f"native_{SETS[MACHINE][-1].name}.so").unlink()
    with pytest.raises(NotCompiledError, match=rf"^native_{SETS[MACHINE][-1].name}\.so of the CPU kernels was not"):
        objects.in_use()


def refused(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name not in objects.runnable() and objects.in_use() == objects.runnable()[0]
    monkeypatch.setenv("PARNET_ISA", name)
    objects.in_use.cache_clear()
    with pytest.raises(ParNetError, match=f"PARNET_ISA={name}: {reason}; choose one of {objects.runnable()[0]}"):
        objects.in_use()


def test_objects_of_other_sources_are_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "sources", lambda: "edited")
    with pytest.raises(
        NotCompiledError, match=r"native_\w+\.so was compiled from other sources: .*build_ext --inplace$"
    ):
        objects.in_use()


def test_sources_are_all_the_c_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (*HERE.glob("*.c"), HERE / "instruction_sets.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(instruction_sets, "HERE", tmp_path)
    seen = {instruction_sets.sources()}
    for name in ("native.c", "object.c", "instruction_sets.py", "new.h"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        seen.add(instruction_sets.sources())
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "were not compiled: with gcc"), (b"damaged", "cannot be loaded")]
)
def test_what_cannot_be_loaded(content: bytes | None, reason: str, folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(NotCompiledError, match=f"the CPU kernels {reason}") as said:
        objects.in_use()
    assert str(said.value).isprintable()


def test_a_machine_that_nothing_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "MACHINE", "abacus")
    with pytest.raises(NotCompiledError, match="the CPU kernels are for x86_64 and aarch64, and this is abacus"):
        objects.in_use()


def test_memory_that_cannot_be_had() -> None:
    with pytest.raises(MemoryError, match=f"{1 << 60} bytes cannot be had"):
        pages.zeros(1 << 60)
