"""The bookkeeping of a dataset of 450,000 edit pairs, as large as InstructPix2Pix's: start-up and memory.

    python -m bench.many_pairs

Writes the index of such a dataset, without its pictures, and measures in a process of its own, from Python's
first line on: reading it, grouping it by instruction, and drawing items, which is all that happens before the
first picture is opened. Both layouts: one `metadata.jsonl`, and shards as `data_making.pictures` writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
MEASURE = """
import resource, time
start = time.perf_counter()
from dataset import VisualPromptDataset, read_pairs
imported, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pairs = read_pairs({data!r})
read = time.perf_counter()
data = VisualPromptDataset(pairs, size=256)
grouped = time.perf_counter()
for i in range(0, len(data), len(data) // 10_000 or 1):
    data.draw(i)
drawn, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = imported - start, read - imported, grouped - read, drawn - grouped
print(len(data), *times, before / 1024, memory / 1024)
"""


def write_index(folder: Path, pairs: int, each: int, shards: int) -> None:
    """`each` pairs of every instruction, captions of the usual length; in so many shards, 0 for none."""
    for shard in range(max(shards, 1)):
        where = folder / "train" / (f"{shard:03d}" if shards else "")
        where.mkdir(parents=True)
        with open(where / "metadata.jsonl", "w") as file:
            for i in range(shard, pairs // each * each, max(shards, 1)):
                group = i // (max(shards, 1) * each) * max(shards, 1) + shard
                caption = f"a photograph of thing number {i} in a field beside the river, late in the day"
                row = {"input_file_name": f"{i:07d}_0.jpg", "output_file_name": f"{i:07d}_1.jpg"}
                row |= {"instruction": f"make it look as if painter number {group} had painted it"}
                row |= {"input_caption": caption, "output_caption": f"{caption}, by painter number {group}"}
                file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.many_pairs", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=450_000)
    parser.add_argument("--each", type=int, default=4, help="pairs of an instruction")
    args = parser.parse_args()
    print("| layout | pairs | import, s | read | group | 10,000 draws | memory, MiB | of which imports |")
    print("| --- |" + " ---: |" * 7)
    for name, shards in (("one file", 0), ("256 shards", 256)):
        with tempfile.TemporaryDirectory() as folder:
            write_index(Path(folder), args.pairs, args.each, shards)
            program = MEASURE.format(data=folder)
            ended = subprocess.run(
                [sys.executable, "-c", program], cwd=HERE, stdout=subprocess.PIPE, text=True, check=True
            )
        count, *seconds, before, memory = map(float, ended.stdout.split())
        times = " | ".join(f"{value:.2f}" for value in seconds)
        print(f"| {name} | {count:,.0f} | {times} | {memory:.0f} | {before:.0f} |", flush=True)


if __name__ == "__main__":
    main()
