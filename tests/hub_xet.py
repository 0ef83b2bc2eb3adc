"""What the small Hub needs to take uploads over Xet, the default of huggingface_hub: a store that `hf_xet` fills.

The client gets the store's folder from the Hub and writes to it by hf_xet's own local mode, as it would write to Xet's
servers. A commit then names a file by its sha256, which is looked up here.
"""

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hf_xet


ENTRY = 48  # bytes of every record in a shard
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30


class XetStore:
    """A folder that outlives the clients that write to it, and no longer than this object."""

    def __init__(self):
        self._home = tempfile.TemporaryDirectory(prefix="hub-xet-")
        self.folder = Path(self._home.name)
        self.url = f"local://{self.folder}"

    def read(self, sha256: str) -> bytes | None:
        """The content of the file with this sha256, put together from its chunks; `None` if it was not uploaded."""
        for path in self.folder.rglob("shards/*.mdb"):
            for name, uploaded, size in list_files(path.read_bytes()):
                if uploaded == sha256:
                    with tempfile.TemporaryDirectory() as folder:
                        with hf_xet.XetSession().new_file_download_group(endpoint=self.url) as group:
                            group.start_download_file(hf_xet.XetFileInfo(name, size), f"{folder}/file")
                        return Path(folder, "file").read_bytes()
        return None


def list_files(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """Xet's name, sha256 and size of each file that a shard describes."""
    position = ENTRY  # behind the header
    while (name := shard[position : position + 32]) != b"\xff" * 32:
        flags, num_parts = struct.unpack_from("<II", shard, position + 32)
        position += ENTRY
        sizes = [struct.unpack_from("<I", shard, position + ENTRY * part + 36)[0] for part in range(num_parts)]
        position += ENTRY * num_parts * (2 if flags & HAS_VERIFICATION else 1)
        if flags & HAS_SHA256:
            yield _to_hex(name), _to_hex(shard[position : position + 32]), sum(sizes)
            position += ENTRY


def _to_hex(name: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", name))
