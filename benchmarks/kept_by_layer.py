"""What pruners keep of each kind of layer in a sweep: shares of weights over all blocks and seeds.

    python -m benchmarks.kept_by_layer FOLDER benchmarks/results/vit_layers.json

FOLDER holds the records of a sweep. Layers whose names differ in numbers alone, as of blocks, are of one kind.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path


def shares(records):
    """The kept share of each kind of layer, by pruner and compression."""
    counts = defaultdict(lambda: [0, 0])
    for record in records:
        settings = record["settings"]
        for layer in record["pruning"]["layers"]:
            kind = re.sub(r"\b\d+/", "", layer["name"])
            count = counts[settings["pruner"], f"{settings['compression']:g}", kind]
            count[0] += layer["kept"]
            count[1] += layer["total"]
    result = {}
    for (pruner, compression, kind), (kept, total) in sorted(counts.items()):
        result.setdefault(pruner, {}).setdefault(compression, {})[kind] = round(kept / total, 4)
    return result


def main():
    """Write the shares of a folder's records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    records = [json.loads(file.read_text()) for file in sorted(options.folder.glob("runs/*/record.json"))]
    options.output.write_text(json.dumps(shares(records), indent=1) + "\n")


if __name__ == "__main__":
    main()
