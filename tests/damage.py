"""Random damage to files: bytes, JSON, tensors and whole folders; and what a loader must not do with them.

A loader gives a clean error or a right result, runs no code and writes nothing.
"""

import io
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

import featpatch as fp

MARKS = [
    "<script>window.hacked=1</script>", "</script><script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>",
    "]]><svg onload=window.hacked=1>", "${window.hacked=1}", "{{ 7*7 }}{% raw %}", "\" onmouseover=\"window.hacked=1", "'><b>",
    "javascript:window.hacked=1", "a\x00b", "\u202eevil\u2066", "\u2028\u2029", "<!--", "<!-- <script>", "</title></style></template>",
    "&lt;script&gt;", "\\", "%s%d{0}", "../../evil", "/tmp/evil", "..\\evil", "[red]x[/red]", "ünï→", "", " ", "NaN", "__proto__",
]  # fmt: skip
TEXTS = st.sampled_from(MARKS) | st.text(max_size=12)
SCALARS = st.none() | st.booleans() | st.sampled_from(
    [0, -1, 1, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**40, 10**400, 0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf")]
) | st.integers(-3, 12) | st.floats() | TEXTS | st.just("\ud800")  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "clean", "\ud800"]), inner, max_size=3), max_leaves=5
) | st.sampled_from([19, 60, 600, 100_000]).map(lambda deep: Deep(deep))  # fmt: skip


NUMBER = (
    st.sampled_from([0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 5e-324, 1e-200, 3.4e38])
    | st.floats()
)


class Deep:
    """As JSON, so many lists within one another."""

    def __init__(self, levels: int) -> None:
        self.text = "[" * levels + "]" * levels


def as_json(value: Any) -> str:
    """Also of what `json` can't write, such as numbers of many digits within its own limits."""
    if isinstance(value, Deep):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {as_json(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_json, value)) + "]"
    return json.dumps(value)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """The bytes with a few of them cut off, changed, inserted, removed or doubled."""
    for _ in range(draw(st.integers(0, 3))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(1, 40))
        piece = draw(st.binary(max_size=4) | st.sampled_from(
            [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n\n", b"\xed\xa0\x80", b'"', b"[" * 2000, b"x" * 200_000, b"1e999", b"NaN", b"-", b",", b"{}", b"9" * 5000]
        ))  # fmt: skip
        content = draw(st.sampled_from([
            content[:at], content[:at] + piece + content[at:], content[:at] + piece + content[at + length :],
            content[:at] + content[at + length :], content[: at + length] + content[at:], piece + content, content.replace(b"\n", piece),
        ]))  # fmt: skip
    return content


@st.composite
def swapped(draw: Any, content: Any) -> Any:
    """The value with some of its parts replaced, left out or added, at any depth."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    if isinstance(content, dict):
        chosen = dict(content)
        for name in draw(st.lists(st.sampled_from([*content, "unknown"]), max_size=2)):
            if draw(st.integers(0, 3)) == 0:
                chosen.pop(name, None)
            else:
                chosen[name] = draw(swapped(content[name]) if name in content else VALUES)
        return chosen
    if isinstance(content, list) and content:
        at = draw(st.integers(0, len(content) - 1))
        changed = [draw(swapped(content[at]))] * draw(st.integers(0, 2))
        return [*content[:at], *changed, *content[at + 1 :]]
    return draw(VALUES | st.just(content))


def clean(call: Callable[[], Any]) -> Any:
    """What it gives, None where it refuses; anything but a FeatpatchError is passed on and fails."""
    try:
        return call()
    except fp.FeatpatchError as raised:
        refusal = raised
    assert type(refusal) is fp.FeatpatchError
    assert str(refusal).encode()
    return None


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@st.composite
def changed_tensors(draw: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other values, dtypes, shapes and sizes; tensors that are missing, and others under strange names."""
    made = dict(tensors)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2)):
        tensor = made.get(name, tensors[name]).clone()
        flat = tensor.reshape(-1)
        way = draw(st.sampled_from(["value", "value", "value", "all", "type", "shape", "cut", "double", "drop", "again"]))
        if way in ("value", "all") and tensor.is_floating_point() and len(flat):
            flat[slice(None) if way == "all" else draw(st.integers(0, len(flat) - 1))] = torch.tensor(
                draw(NUMBER), dtype=torch.float64
            )
        elif way in ("value", "all") and len(flat):
            flat[0] = torch.tensor(draw(st.sampled_from([-1, 0, 1, 2, 7, 2**31 - 1]))).to(flat.dtype)
        elif way == "type":
            kind = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool])
            tensor = tensor.to(draw(kind))
        elif way == "shape":
            tensor = tensor.reshape(
                draw(st.sampled_from([(-1,), (1, *tensor.shape), (*tensor.shape, 1), tuple(tensor.shape[::-1])]))
            )
        elif way == "cut" and tensor.ndim:
            tensor = tensor[: draw(st.integers(0, len(tensor)))].clone()
        elif way == "double":
            tensor = (
                torch.cat([flat, flat])
                if tensor.ndim < 2
                else torch.cat([tensor, tensor], dim=draw(st.integers(0, tensor.ndim - 1)))
            )
        made[name] = tensor
        if way == "drop":
            del made[name]
        if way == "again":
            made[draw(st.sampled_from(["../../evil", "/tmp/evil", "", "\x00", "threshold", "b_dec", f"{name}.x"]))] = tensor
    return made


def read_tensors(name: str, content: bytes) -> dict[str, torch.Tensor]:
    """The tensors in a file, read without the library."""
    return torch.load(io.BytesIO(content), weights_only=True) if name.endswith(".pt") else load(content)


def as_file(name: str, tensors: dict[str, torch.Tensor]) -> bytes:
    if not name.endswith(".pt"):
        return save({key: value.clone().contiguous() for key, value in tensors.items()})
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


YAML = [
    "!!python/object/apply:os.system ['touch {evil}']", "a: !!python/name:os.system", "!!bool x", "a: !!int ''", "a: !!timestamp x",
    "a: &a [*a]", "a: &a {b: *a}", "? [a, b]\n: c", "a: [" * 2000, "a: 1\na: 2", "a: 9999-99-99", "\"\\ud800\": 1", "--- a\n--- b", "a: !!set {b}",
    "transcoders: &a [b, b]", "a: " + "9" * 6000, "<<: 3", "<<: [1]", "\ta: b", "a: !!binary x", "a: 1:99999:1", "a: .inf", "a: 0b", "a: ~",
    "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "\ntranscoders: *i",
]  # fmt: skip
"""YAML with tags that run code, with values that PyYAML can't convert, and with lists that are huge once they are printed."""


class Folder(dict[str, bytes | None]):
    """The contents of a folder's files, by name; None is a folder of that name."""

    def __repr__(self) -> str:
        short = {
            name: content if content is None or len(content) < 600 else f"{len(content)} bytes"
            for name, content in self.items()
        }
        return f"{type(self).__name__}({short}; {self.told})"

    told = ""


@st.composite
def damaged_folder(draw: Any, files: Mapping[str, bytes], evil: Path) -> Folder:
    """A folder, one or two of whose files are damaged.

    Args:
        evil: the file that code in a file would create.
    """
    made = Folder(files)
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2)):
        content, way = files[name], draw(st.integers(0, 19))
        if way == 0:
            del made[name]
            return made
        if way == 1:
            made[name] = draw(st.sampled_from([None, b"", *(files[other] for other in sorted(files))]))
        elif way <= 6:
            made[name] = draw(damaged(content))
        elif name.endswith(".json"):
            made[name] = as_json(draw(swapped(json.loads(content)))).encode("utf-8", "surrogatepass")
        elif name.endswith(".yaml"):
            import yaml

            said = swapped(yaml.safe_load(content)).map(as_json) | st.sampled_from(YAML).map(
                lambda text: text.replace("{evil}", str(evil))
            )
            made[name] = draw(said).encode("utf-8", "surrogatepass")
        elif way == 7:
            hidden = Evil(evil)
            made[name] = draw(
                st.sampled_from([pickle.dumps(hidden), as_file("x.pt", {"W_enc": hidden}), as_file("x.pt", hidden)])
            )  # type: ignore[dict-item, arg-type]
        else:
            tensors = draw(changed_tensors(read_tensors(name, content)))
            made[name], made.told = (
                as_file(name, tensors),
                ", ".join(f"{key} {list(of.shape)} {of.dtype}" for key, of in tensors.items()),
            )
    return made


def write_folder(folder: Path, files: Mapping[str, bytes | None]) -> None:
    """Replace the contents of a folder."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    for name, content in files.items():
        (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)


CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "shutil.",
)
STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.",
    "socket.connect",
    "pickle.find_class",
    "ctypes.dlopen",
)
seen: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if seen is None:
        return
    if event.startswith((*CHANGES, *STARTS)) or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        seen.append(f"{event} {arguments}")


@contextmanager
def harmless(folder: Path) -> Iterator[None]:
    """Within this context no file is written, no process or connection is begun and no class is unpickled.

    Python reports these to audit hooks; what libraries do without Python shows in `folder`.
    """
    global seen
    before = sorted(folder.rglob("*"))
    seen = []
    try:
        yield
    finally:
        done, seen = seen, None
    assert done == []
    assert sorted(folder.rglob("*")) == before


sys.addaudithook(_audit)
