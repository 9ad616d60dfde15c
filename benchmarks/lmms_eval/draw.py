"""Questions about drawn scenes as a parquet file with their images, for lmms-eval.

python benchmarks/lmms_eval/draw.py "scenes:test/0+100*2" questions.parquet
"""

from __future__ import annotations

import argparse

import datasets

from visrl.data.sources import read_samples
from visrl.scenes import draw_ref


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes", help="scenes:POOL/START+COUNT, as `visrl eval` takes it")
    parser.add_argument("out", help="the parquet file to write")
    given = parser.parse_args()
    rows = [
        {"id": one.id, "image": draw_ref(one.image), "question": one.question, "answer": one.answer, "kind": one.source}
        for one in read_samples(given.scenes)
    ]
    datasets.Dataset.from_list(rows).to_parquet(given.out)
    print(f"{len(rows)} questions: {given.out}")


if __name__ == "__main__":
    main()
